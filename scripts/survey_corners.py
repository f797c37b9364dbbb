"""Bring the corner database of the survey up to date."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.corners.survey import make_survey_database
    from coaddflow.settings import load_settings
    from coaddflow.workflow.plan import make_plan

    overlaps = make_plan(load_settings(job.config), is_job=True).overlaps
    make_survey_database(job.output.database, job.input.manifests, job.skymap, overlaps)
