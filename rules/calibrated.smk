# Images that were calibrated elsewhere enter here, in place of calexps made from raw frames, and
# from here on are treated alike: rows, manifest, corners, warps, coadds.


if PLAN.images and not WHOLE_EXPOSURES:

    rule calibrated:
        input:
            files=calibrated_inputs,
        output:
            row="results/calexp/{exposure}/{ccd}.json",
        log:
            "logs/calibrated/{exposure}/{ccd}.log",
        benchmark:
            "results/benchmarks/calibrated/{exposure}/{ccd}.tsv"
        wildcard_constraints:
            exposure=image_exposure_pattern(),
        group:
            group_of("exposure_{exposure}")
        threads: 1
        resources:
            mem_mb=ccd_memory,
            runtime=ccd_runtime,
        params:
            facts=ccd_facts,
            settings=PLAN.calibrated_settings(),
        script:
            "../scripts/calibrated.py"
