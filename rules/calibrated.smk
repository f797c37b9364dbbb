# Images that were calibrated elsewhere enter here, in place of calexps made from raw frames, and
# from here on are treated alike: rows, manifest, corners, warps, coadds.


if is_planned("calibrated"):

    rule calibrated:
        """Take in an image that was calibrated elsewhere: calexp and row."""
        input:
            files=INPUTS.calibrated,
        output:
            row=paths.ROW,
        log:
            "logs/calibrated/{exposure}/{ccd}.log",
        benchmark:
            "results/benchmarks/calibrated/{exposure}/{ccd}.tsv"
        wildcard_constraints:
            exposure=IMPORTED,
        group:
            group_of("calibrated")
        threads: 1
        resources:
            mem_mb=memory("calibrated"),
            runtime=minutes("calibrated"),
        params:
            table_row=PARAMS.table_row,
            made_by=PARAMS.calibrated("calibrated"),
        message:
            "calibrated: exposure {wildcards.exposure}, CCD {wildcards.ccd}"
        script:
            "../scripts/calibrated.py"
