"""Make the picture of a tract."""

from coaddflow.runtime.log import job_log

with job_log(snakemake.log[0], snakemake.threads):
    from coaddflow.coadd.patch import make_picture
    from coaddflow.settings.skymap import SkymapSettings
    from coaddflow.skymap.maps import make_skymap

    skymap = make_skymap(SkymapSettings.model_validate(snakemake.params.skymap))
    make_picture(
        snakemake.output.picture,
        skymap.tract(int(snakemake.wildcards.tract)),
        snakemake.input.coadds,
    )
