# Calibrated images, one job an exposure (`parallel.calexp: exposure`): it scatters its CCDs over
# workers, keeps their pixels in memory, can solve for the exposure as a whole (section `exposure`
# of the settings), and gathers the manifest. No job and no row file of single CCDs: the
# scheduler sees exposures.


if is_planned("exposure"):

    rule exposure:
        """Calibrate the CCDs of an exposure in one job, and gather its manifest."""
        input:
            unpack(INPUTS.exposure),
        output:
            manifest=paths.MANIFEST,
        log:
            "logs/exposure/{exposure}.log",
        benchmark:
            "results/benchmarks/exposure/{exposure}.tsv"
        wildcard_constraints:
            exposure=RAW,
        group:
            group_of("exposure")
        threads: cores_with_spare("exposure")
        resources:
            mem_mb=memory("exposure"),
            runtime=minutes("exposure"),
            mpi=mpi_allocation(),
            tasks=tasks("exposure"),
            mem_mb_per_cpu=task_memory("exposure"),
        params:
            table_row=PARAMS.exposure_row,
            raw=PARAMS.raw,
            ccds=PARAMS.ccds(),
            camera=PARAMS.camera_of_exposure(),
            made_by=PARAMS.exposure,
            verdict=PARAMS.verdict,
        message:
            "exposure: exposure {wildcards.exposure}"
        script:
            "../scripts/exposure.py"


if is_planned("calibrated_exposure"):

    rule calibrated_exposure:
        """Take in the images of an exposure in one job, and gather its manifest."""
        input:
            files=INPUTS.calibrated_exposure,
        output:
            manifest=paths.MANIFEST,
        log:
            "logs/exposure/{exposure}.log",
        benchmark:
            "results/benchmarks/exposure/{exposure}.tsv"
        wildcard_constraints:
            exposure=IMPORTED,
        group:
            group_of("calibrated_exposure")
        threads: cores("calibrated_exposure")
        resources:
            mem_mb=memory("calibrated_exposure"),
            runtime=minutes("calibrated_exposure"),
            mpi=mpi_allocation(),
            tasks=tasks("calibrated_exposure"),
            mem_mb_per_cpu=task_memory("calibrated_exposure"),
        params:
            images=PARAMS.image_rows,
            made_by=PARAMS.calibrated("calibrated_exposure"),
            verdict=PARAMS.verdict,
        message:
            "calibrated_exposure: exposure {wildcards.exposure}"
        script:
            "../scripts/exposure.py"
