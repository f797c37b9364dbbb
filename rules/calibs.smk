# Master calibration frames, one of each kind a CCD (flats: a CCD and band). They are made from the
# calibration exposures of the table, from dithered science exposures (`night_sky`), or given.
#
# Everything hangs on them: a frame added here makes the whole survey again. Name the exposures
# (calibs.flat.exposures and so on) once a survey is under way.


if PLAN.science:

    rule master_bias:
        input:
            unpack(bias_inputs),
        output:
            master="results/calibs/bias/{ccd}.fits",
        log:
            "logs/calibs/bias/{ccd}.log",
        benchmark:
            "results/benchmarks/calibs/bias/{ccd}.tsv"
        group:
            group_of("calibs_{ccd}")
        threads: 1
        resources:
            mem_mb=calib_memory,
            runtime=calib_runtime,
        params:
            settings=PLAN.calib_settings("bias"),
            camera=ccd_fingerprint,
            exposure_times=exposure_times,
        script:
            "../scripts/master_bias.py"

    rule master_dark:
        input:
            unpack(dark_inputs),
        output:
            master="results/calibs/dark/{ccd}.fits",
        log:
            "logs/calibs/dark/{ccd}.log",
        benchmark:
            "results/benchmarks/calibs/dark/{ccd}.tsv"
        group:
            group_of("calibs_{ccd}")
        threads: 1
        resources:
            mem_mb=calib_memory,
            runtime=calib_runtime,
        params:
            settings=PLAN.calib_settings("dark"),
            camera=ccd_fingerprint,
            exposure_times=exposure_times,
        script:
            "../scripts/master_dark.py"

    rule master_flat:
        input:
            unpack(flat_inputs),
        output:
            master="results/calibs/flat/{band}/{ccd}.fits",
        log:
            "logs/calibs/flat/{band}/{ccd}.log",
        benchmark:
            "results/benchmarks/calibs/flat/{band}/{ccd}.tsv"
        group:
            group_of("calibs_{ccd}")
        threads: 1
        resources:
            mem_mb=calib_memory,
            runtime=calib_runtime,
        params:
            settings=PLAN.calib_settings("flat"),
            camera=ccd_fingerprint,
            exposure_times=exposure_times,
        script:
            "../scripts/master_flat.py"

    rule defects:
        input:
            unpack(defects_inputs),
        output:
            master="results/calibs/defects/{ccd}.fits",
        log:
            "logs/calibs/defects/{ccd}.log",
        benchmark:
            "results/benchmarks/calibs/defects/{ccd}.tsv"
        group:
            group_of("calibs_{ccd}")
        threads: 1
        resources:
            mem_mb=calib_memory,
            runtime=calib_runtime,
        params:
            settings=PLAN.calib_settings("defects"),
            camera=ccd_fingerprint,
            exposure_times=exposure_times,
        script:
            "../scripts/defects.py"
