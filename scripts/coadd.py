"""Coadd a patch in one band."""

from coaddflow.joblog import job_log

with job_log(snakemake.log[0], snakemake.threads):
    from coaddflow.settings import load_settings
    from coaddflow.settings.skymap import SkymapSettings
    from coaddflow.skymap import make_skymap
    from coaddflow.tract import make_coadd

    skymap = make_skymap(SkymapSettings.model_validate(snakemake.params.skymap))
    make_coadd(
        snakemake.output.image,
        snakemake.input.database,
        snakemake.input.warps,
        skymap.tract(int(snakemake.wildcards.tract)),
        snakemake.wildcards.band,
        snakemake.wildcards.patch,
        load_settings(snakemake.config).only(*snakemake.params.settings),
    )
