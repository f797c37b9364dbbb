"""Make the map of bad pixels of a CCD."""

from coaddflow.runtime.log import job_log

with job_log(snakemake.log[0], snakemake.threads):
    from coaddflow.calib.masters import make_defects, make_night_sky_defects
    from coaddflow.instrument.camera import load_camera
    from coaddflow.settings import load_settings
    from coaddflow.workflow.plan import CALIB_KINDS

    settings = load_settings(snakemake.config).only(*snakemake.params.settings)
    if settings.calibs.defects.source == "night_sky":
        make_night_sky_defects(
            snakemake.output.master,
            snakemake.params.exposure_times,
            {kind: path for kind, path in snakemake.input.items() if kind in CALIB_KINDS},
            load_camera(snakemake.config["camera"]),
            int(snakemake.wildcards.ccd),
            settings,
        )
    else:
        make_defects(
            snakemake.output.master,
            snakemake.input.get("dark"),
            snakemake.input.get("flats", []),
            settings,
        )
