"""Make the calexps of an exposure and its manifest, scattered over workers."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.exposure.job import make_exposure

    images = job.params.get("images", [])
    make_exposure(
        {
            "manifest": job.output.manifest,
            "exposure": job.params.get("table_row"),
            "images": images,
            "ccds": [{"ccd": i["ccd"], "raw": i["path"]} for i in images] or job.raw_ccds,
            "config": job.config,
            "sections": job.sections(),
            "verdict": job.params.verdict,
        },
        workers=job.workers,
        memory_mb=job.memory_mb,
    )
