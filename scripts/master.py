"""Make a master calibration frame of a CCD: bias, dark, flat or defects."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.calib import masters

    settings = job.settings()
    frames = (job.params.exposure_times, job.calibs, job.camera, job.ccd, settings)
    if job.stage.name != "defects":
        make = getattr(masters, job.stage.name.replace("master", "make"))
        make(job.output.master, *frames)
    elif settings.calibs.defects.source == "night_sky":
        masters.make_night_sky_defects(job.output.master, *frames)
    else:
        flats = job.input.get("flats", [])
        masters.make_defects(job.output.master, job.input.get("dark"), flats, settings)
