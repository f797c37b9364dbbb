"""Make a calexp and its row from an image that was calibrated elsewhere."""

from coaddflow.runtime.log import job_log

with job_log(snakemake.log[0], snakemake.threads):
    from coaddflow.calexp.job import CcdFiles, make_calexp_from_image
    from coaddflow.settings import load_settings
    from coaddflow.tables.exposures import ImageRow

    image = ImageRow(**snakemake.params.facts)
    make_calexp_from_image(
        image,
        CcdFiles(
            raw=image.path,
            calibs={},
            row=snakemake.output.row,
            manifest=f"results/summary/{image.exposure}.ecsv",
        ),
        load_settings(snakemake.config).only(*snakemake.params.settings),
    )
