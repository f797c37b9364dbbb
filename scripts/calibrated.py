"""Make a calexp and its row from an image that was calibrated elsewhere."""

from coaddflow.workflow.stage import stage

with stage(snakemake) as job:
    from coaddflow.calexp.job import CcdFiles, make_calexp
    from coaddflow.tables.exposures import ImageRow
    from coaddflow.tables.paths import MANIFEST

    image = ImageRow(**job.params.table_row)
    manifest = MANIFEST.format(exposure=image.exposure)
    files = CcdFiles(image.path, {}, job.output.row, manifest)
    make_calexp(image, image.ccd, files, None, job.settings())
