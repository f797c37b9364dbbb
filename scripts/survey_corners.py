"""Bring the corner database of the survey up to date."""

from coaddflow.joblog import job_log

with job_log(snakemake.log[0], snakemake.threads) as log:
    from coaddflow.corners import update_survey_database
    from coaddflow.settings.skymap import SkymapSettings
    from coaddflow.skymap import make_skymap

    skymap = make_skymap(SkymapSettings.model_validate(snakemake.params.skymap))
    update = update_survey_database(snakemake.output.database, snakemake.input.manifests, skymap)
    log.info(
        "%d exposures added, %d redone, %d dropped, %d as before",
        *map(len, (update.added, update.redone, update.dropped, update.unchanged)),
    )
