"""Calibrate one CCD: raw frame to calexp, sources and row."""

from coaddflow.runtime.log import job_log

with job_log(snakemake.log[0], snakemake.threads):
    from coaddflow.calexp.job import CcdFiles, make_calexp
    from coaddflow.instrument.camera import load_camera
    from coaddflow.settings import load_settings
    from coaddflow.tables.exposures import ExposureRow
    from coaddflow.workflow.plan import CALIB_KINDS

    exposure = ExposureRow(**snakemake.params.facts)
    make_calexp(
        exposure,
        int(snakemake.wildcards.ccd),
        CcdFiles(
            raw=exposure.path,
            calibs={
                kind: snakemake.input.get(kind) for kind in CALIB_KINDS if snakemake.input.get(kind)
            },
            row=snakemake.output.row,
            manifest=f"results/summary/{exposure.exposure}.ecsv",
        ),
        load_camera(snakemake.config["camera"]),
        load_settings(snakemake.config).only(*snakemake.params.settings),
    )
