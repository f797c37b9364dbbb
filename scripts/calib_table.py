"""List the calibration frames of a band."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.calib.table import make_calib_table

    make_calib_table(job.output.table, job.params.calibs, job.wildcards.band)
