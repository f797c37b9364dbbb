"""Make the calexps of an exposure and its manifest, scattered over workers."""

from coaddflow.joblog import job_log

with job_log(snakemake.log[0]):
    from coaddflow.scatter import run_job
    from coaddflow.settings import load_settings

    params = snakemake.params
    images = params.get("images", [])
    parallel = load_settings(snakemake.config).parallel
    # rank 0 of MPI gathers
    workers = snakemake.resources.get("tasks", snakemake.threads + 1) - 1
    if parallel.backend == "dask" and parallel.dask_address:
        workers = parallel.workers  # none of them is in this job
    run_job(
        "coaddflow.exposure_job",
        {
            "manifest": snakemake.output.manifest,
            "exposure": params.get("facts"),
            "images": images,
            "ccds": params.get("ccds") or [{"ccd": i["ccd"], "raw": i["path"]} for i in images],
            "config": snakemake.config,
            "sections": [*params.settings, "exposure"],
            "workers": workers,
        },
        parallel,
        workers=workers,
        memory_mb=snakemake.resources.mem_mb,
    )
