"""Simulated surveys: raw exposures of any camera file, with a truth to compare with.

The one function to call is `survey.run_simulation`, with settings from
`settings.load_simulation_settings`. GalSim is needed (the extra ``simulate``).
"""
