"""Coadd a patch in one band."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.coadd.patch import make_coadd

    make_coadd(
        job.output.image,
        job.input.database,
        job.input.warps,
        job.tract,
        job.wildcards.band,
        job.wildcards.patch,
        job.settings(),
    )
