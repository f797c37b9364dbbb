"""Map the depth of the coadds of a tract."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.coadd.depth import make_depth

    make_depth(job.output.table, job.input.coadds, job.tract, job.settings())
