"""Warp and coadd a band on a tract."""

from coaddflow.runtime.log import job_log

# one thread: the workers are what runs in parallel
with job_log(snakemake.log[0]):
    from coaddflow.coadd.tract_job import make_tract_coadds
    from coaddflow.settings import load_settings

    make_tract_coadds(
        snakemake.output.table,
        snakemake.input.database,
        snakemake.params.skymap,
        int(snakemake.wildcards.tract),
        snakemake.wildcards.band,
        snakemake.params.patches,
        load_settings(snakemake.config).only(*snakemake.params.settings, "parallel"),
        workers=snakemake.resources.get("tasks", snakemake.threads + 1) - 1,  # rank 0 gathers
        memory_mb=snakemake.resources.mem_mb,
    )
