"""Gather the rows of an exposure into its manifest."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.exposure.gather import Planned, make_manifest
    from coaddflow.tables.exposures import ExposureRow
    from coaddflow.tables.manifest import read_row

    # what lets an exposure pass must not make those again that have passed: not in the params
    settings = job.settings("calexp", "prediction")
    row = job.params.table_row
    make_manifest(
        job.output.manifest,
        [read_row(path) for path in job.input.rows],
        settings.calexp,
        Planned(ExposureRow(**row), job.camera, settings.prediction.margin) if row else None,
        job.params.verdict,
    )
