"""Warp and coadd a band on a tract."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.coadd.tract_job import make_tract_coadds

    make_tract_coadds(
        job.output.table,
        job.input.database,
        job.params.skymap,
        int(job.wildcards.tract),
        job.wildcards.band,
        job.params.patches,
        job.settings("parallel"),
        workers=job.workers,
        memory_mb=job.memory_mb,
    )
