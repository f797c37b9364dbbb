"""Make the master dark of a CCD."""

from coaddflow.runtime.log import job_log

with job_log(snakemake.log[0], snakemake.threads):
    from coaddflow.calib.masters import make_dark
    from coaddflow.instrument.camera import load_camera
    from coaddflow.settings import load_settings
    from coaddflow.workflow.plan import CALIB_KINDS

    make_dark(
        snakemake.output.master,
        snakemake.params.exposure_times,
        {kind: path for kind, path in snakemake.input.items() if kind in CALIB_KINDS},
        load_camera(snakemake.config["camera"]),
        int(snakemake.wildcards.ccd),
        load_settings(snakemake.config).only(*snakemake.params.settings),
    )
