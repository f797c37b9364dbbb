"""Make the picture of a tract."""

from coaddflow.joblog import job_log

with job_log(snakemake.log[0], snakemake.threads):
    from coaddflow.settings.skymap import SkymapSettings
    from coaddflow.skymap import make_skymap
    from coaddflow.tract import make_picture

    skymap = make_skymap(SkymapSettings.model_validate(snakemake.params.skymap))
    make_picture(
        snakemake.output.picture,
        skymap.tract(int(snakemake.wildcards.tract)),
        snakemake.input.coadds,
    )
