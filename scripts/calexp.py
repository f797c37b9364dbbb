"""Calibrate one CCD: raw frame to calexp, sources and row."""

from coaddflow.joblog import job_log

with job_log(snakemake.log[0], snakemake.threads):
    from coaddflow.camera import load_camera
    from coaddflow.exposure import CcdFiles, Pointing, make_calexp
    from coaddflow.plan import CALIB_KINDS
    from coaddflow.settings import load_settings

    make_calexp(
        Pointing(**snakemake.params.facts),
        int(snakemake.wildcards.ccd),
        CcdFiles(
            raw=snakemake.params.raw,
            calibs={
                kind: snakemake.input.get(kind) for kind in CALIB_KINDS if snakemake.input.get(kind)
            },
            row=snakemake.output.row,
            manifest=f"results/summary/{snakemake.wildcards.exposure}.ecsv",
        ),
        load_camera(snakemake.config["camera"]),
        load_settings(snakemake.config).only(*snakemake.params.settings),
    )
