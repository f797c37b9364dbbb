"""Make the corner database of a band on a tract."""

from coaddflow.runtime.log import job_log

with job_log(snakemake.log[0], snakemake.threads):
    from coaddflow.corners.build import build_tract_database
    from coaddflow.settings.skymap import SkymapSettings
    from coaddflow.skymap.maps import make_skymap

    skymap = make_skymap(SkymapSettings.model_validate(snakemake.params.skymap))
    build_tract_database(
        snakemake.output.database,
        snakemake.input.manifests,
        skymap.tract(int(snakemake.wildcards.tract)),
    )
