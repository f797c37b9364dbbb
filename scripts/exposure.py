"""Make the calexps of an exposure and its manifest, scattered over workers."""

from coaddflow.runtime.log import job_log

with job_log(snakemake.log[0]):
    from coaddflow.exposure.job import make_exposure

    params = snakemake.params
    images = params.get("images", [])
    make_exposure(
        {
            "manifest": snakemake.output.manifest,
            "exposure": params.get("facts"),
            "images": images,
            "ccds": params.get("ccds") or [{"ccd": i["ccd"], "raw": i["path"]} for i in images],
            "config": snakemake.config,
            "sections": [*params.settings, "exposure"],
        },
        workers=snakemake.resources.get("tasks", snakemake.threads + 1) - 1,  # rank 0 gathers
        memory_mb=snakemake.resources.mem_mb,
    )
