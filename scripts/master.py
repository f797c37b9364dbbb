"""Make a master calibration frame of a CCD: bias, dark, flat or defects."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.calib.masters import make_defects, make_master

    settings, kind = job.settings(), job.stage.name.removeprefix("master_")
    if kind == "defects" and settings.calibs.defects.source != "night_sky":
        flats = job.input.get("flats", [])
        make_defects(job.output.master, job.input.get("dark"), flats, settings)
    else:
        frames = job.params.exposure_times, job.calibs, job.camera, job.ccd
        make_master(job.output.master, kind, *frames, settings)
