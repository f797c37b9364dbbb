"""Make the corner database of a band on a tract."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.corners.build import build_tract_database

    build_tract_database(job.output.database, job.input.manifests, job.tract)
