"""Make the picture of a tract."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.coadd.picture import make_picture

    make_picture(job.output.picture, job.tract, job.input.coadds)
