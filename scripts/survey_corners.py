"""Bring the corner database of the survey up to date."""

from coaddflow.joblog import job_log

with job_log(snakemake.log[0], snakemake.threads):
    from coaddflow.plan import make_plan
    from coaddflow.settings import load_settings
    from coaddflow.skymap import make_skymap
    from coaddflow.survey import make_survey_database

    plan = make_plan(load_settings(snakemake.config))
    make_survey_database(
        snakemake.output.database,
        snakemake.input.manifests,
        make_skymap(plan.skymap),
        plan.overlaps,
    )
