"""Calibrate one CCD: raw frame to calexp, sources and row."""

from coaddflow.joblog import job_log

with job_log(snakemake.log[0], snakemake.threads):
    from coaddflow.camera import load_camera
    from coaddflow.exposure import CcdFiles, make_calexp
    from coaddflow.exposures import ExposureRow
    from coaddflow.plan import CALIB_KINDS
    from coaddflow.settings import load_settings

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
