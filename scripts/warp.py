"""Warp an exposure to a tract."""

from coaddflow.runtime.log import job_log

with job_log(snakemake.log[0], snakemake.threads):
    from coaddflow.settings import load_settings
    from coaddflow.settings.skymap import SkymapSettings
    from coaddflow.skymap.maps import make_skymap
    from coaddflow.warp.job import make_warps

    skymap = make_skymap(SkymapSettings.model_validate(snakemake.params.skymap))
    make_warps(
        snakemake.output.table,
        snakemake.input.manifest,
        skymap.tract(int(snakemake.wildcards.tract)),
        load_settings(snakemake.config).only(*snakemake.params.settings),
    )
