"""Coadd a patch in one band."""

from coaddflow.runtime.log import job_log

with job_log(snakemake.log[0], snakemake.threads):
    from coaddflow.coadd.patch import make_coadd
    from coaddflow.settings import load_settings
    from coaddflow.settings.skymap import SkymapSettings
    from coaddflow.skymap.maps import make_skymap

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
