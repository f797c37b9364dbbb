"""Warp an exposure to a tract."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.warp.job import make_warps

    make_warps(job.output.table, job.input.manifest, job.tract, job.settings(), job.threads)
