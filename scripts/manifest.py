"""Gather the rows of an exposure into its manifest."""

from coaddflow.runtime.log import job_log

with job_log(snakemake.log[0], snakemake.threads):
    from coaddflow.exposure.gather import make_manifest
    from coaddflow.instrument.camera import load_camera
    from coaddflow.settings import load_settings
    from coaddflow.tables.exposures import ExposureRow
    from coaddflow.tables.manifest import read_row

    # what lets an exposure pass must not make those again that have passed: not in the params
    settings = load_settings(snakemake.config).only("calexp", "prediction", "camera")
    facts = snakemake.params.facts
    make_manifest(
        snakemake.output.manifest,
        [read_row(path) for path in snakemake.input.rows],
        settings.calexp.max_failed_fraction,
        ExposureRow(**facts) if facts else None,
        load_camera(settings.camera) if facts else None,
        settings.prediction.margin,
    )
