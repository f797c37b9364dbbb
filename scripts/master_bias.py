"""Make the master bias of a CCD."""

from coaddflow.runtime.log import job_log

with job_log(snakemake.log[0], snakemake.threads):
    from coaddflow.calib.masters import make_bias
    from coaddflow.instrument.camera import load_camera
    from coaddflow.settings import load_settings

    make_bias(
        snakemake.output.master,
        snakemake.params.exposure_times,
        load_camera(snakemake.config["camera"]),
        int(snakemake.wildcards.ccd),
        load_settings(snakemake.config).only(*snakemake.params.settings),
    )
