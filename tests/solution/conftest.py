"""Small tracts with everything that the solution models."""

import pytest
from solved_tract import link, solve

from coaddflow.simulate.tract_stars import TractSimulation, simulate_tract


@pytest.fixture(scope="session")
def tract():
    """12 exposures of a mosaic of 12 CCDs near RA 0, in two epochs and two bands; no turbulence."""
    simulation = TractSimulation(n_exposures=12, dispersion_mas=20.0, outliers=0.01)
    return solve(link(simulate_tract(simulation)))


@pytest.fixture(scope="session")
def turbulent_tract():
    """The same under 7 mas of turbulence, linked but not solved."""
    return link(simulate_tract(TractSimulation(n_exposures=12, turbulence_mas=7.0)))


@pytest.fixture(scope="session")
def cloudy_tract():
    """The same under clouds and with an illumination error, linked but not solved."""
    simulation = TractSimulation(
        *(1, 16), cloud_mag=0.3, structure_mag=0.004, illumination_mag=0.02, outliers=0.005
    )
    return link(simulate_tract(simulation))
