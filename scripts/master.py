"""Make a master calibration frame of a CCD: bias, dark, flat or defects."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.calib.masters import make_defects, make_master
    from coaddflow.workflow.stages import CALIB_STAGES

    settings = job.settings()
    if job.stage.name == "defects":
        make_defects(job.output.master, job.calibs, settings)
    else:
        kind = CALIB_STAGES[job.stage.name]
        frames = job.exposure_times, job.calibs, job.camera, job.ccd
        make_master(job.output.master, kind, *frames, settings, job.calibs_of_frames)
