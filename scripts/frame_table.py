"""List the raw frames of a kind of calibration frames."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.tables.calibs import write_frame_table

    write_frame_table(job.output.table, job.params.exposure_times, job.wildcards.frames)
