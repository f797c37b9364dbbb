"""Bring the corner database of the survey up to date."""

from coaddflow.runtime.log import job_log

with job_log(snakemake.log[0], snakemake.threads):
    from coaddflow.corners.survey import make_survey_database
    from coaddflow.settings import load_settings
    from coaddflow.skymap.maps import make_skymap
    from coaddflow.workflow.plan import make_plan

    plan = make_plan(load_settings(snakemake.config))
    make_survey_database(
        snakemake.output.database,
        snakemake.input.manifests,
        make_skymap(plan.skymap),
        plan.overlaps,
    )
