"""Calibrate one CCD: raw frame to calexp, sources and row."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.calexp.job import CcdFiles, make_calexp
    from coaddflow.tables.exposures import ExposureRow
    from coaddflow.tables.paths import MANIFEST

    exposure = ExposureRow(**job.params.table_row)
    manifest = MANIFEST.format(exposure=exposure.exposure)
    files = CcdFiles(exposure.path, job.calibs, job.output.row, manifest)
    make_calexp(exposure, job.ccd, files, job.camera, job.settings(), job.threads)
