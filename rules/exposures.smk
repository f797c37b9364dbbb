# Calibrated images, one job an exposure (`parallel.calexp: exposure`): it scatters its CCDs over
# workers, keeps their pixels in memory, can solve for the exposure as a whole (section `exposure`
# of the settings), and gathers the manifest. No job and no row file of single CCDs: the
# scheduler sees exposures.


if PLAN.science and WHOLE_EXPOSURES:

    rule exposure:
        input:
            unpack(exposure_inputs),
        output:
            manifest="results/summary/{exposure}.ecsv",
        log:
            "logs/exposure/{exposure}.log",
        benchmark:
            "results/benchmarks/exposure/{exposure}.tsv"
        wildcard_constraints:
            exposure=raw_exposure_pattern(),
        group:
            group_of("exposure_{exposure}")
        threads: exposure_threads
        resources:
            mem_mb=exposure_memory,
            runtime=exposure_runtime,
            mpi=mpi_allocation,
            tasks=exposure_tasks,
            mem_mb_per_cpu=exposure_task_memory,
        params:
            facts=exposure_facts,
            ccds=ccds_of_exposure,
            camera=PLAN.exposure_fingerprint(),
            settings=exposure_settings,
            verdict=verdict,
        script:
            "../scripts/exposure.py"


if PLAN.images and WHOLE_EXPOSURES:

    rule calibrated_exposure:
        input:
            files=images_inputs,
        output:
            manifest="results/summary/{exposure}.ecsv",
        log:
            "logs/exposure/{exposure}.log",
        benchmark:
            "results/benchmarks/exposure/{exposure}.tsv"
        wildcard_constraints:
            exposure=image_exposure_pattern(),
        group:
            group_of("exposure_{exposure}")
        threads: exposure_threads
        resources:
            mem_mb=exposure_memory,
            runtime=exposure_runtime,
            mpi=mpi_allocation,
            tasks=exposure_tasks,
            mem_mb_per_cpu=exposure_task_memory,
        params:
            images=images_of_exposure,
            settings=PLAN.calibrated_settings(),
            verdict=verdict,
        script:
            "../scripts/exposure.py"
