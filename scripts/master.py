"""Make a master calibration frame of a CCD: bias, dark, flat or defects."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.calib import masters

    settings = job.settings()
    where = (job.camera, job.ccd, settings)
    if job.stage.name == "master_bias":
        masters.make_bias(job.output.master, job.params.exposure_times, *where)
    elif job.stage.name == "defects" and settings.calibs.defects.source != "night_sky":
        flats = job.input.get("flats", [])
        masters.make_defects(job.output.master, job.input.get("dark"), flats, settings)
    else:
        make = {
            "master_dark": masters.make_dark,
            "master_flat": masters.make_flat,
            "defects": masters.make_night_sky_defects,
        }[job.stage.name]
        make(job.output.master, job.params.exposure_times, job.calibs, *where)
