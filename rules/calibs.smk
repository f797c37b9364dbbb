# Master calibration frames, one of each kind a CCD (flats and defects: a CCD and band). They are made
# from the calibration exposures of the table, from dithered science exposures (`night_sky`), or
# given.
#
# The job of an exposure depends on one small table of all calibration frames of its band, which
# changes when one of them does; that of a CCD on those of the CCD.
#
# Every calexp depends on them: a bias or dark added here makes the whole survey again, a flat its
# band. With sets for different nights (calibs.sets) it makes the exposures of its set again; then
# files are in a folder of their set, and jobs have the wildcard `set`.


if PLAN.science:

    rule frame_table:
        """List the raw frames of calibration frames, where a file has all CCDs."""
        input:
            INPUTS.frame_table,
        output:
            table=paths.FRAME_TABLE,
        log:
            "logs/frame_table/{frames}.log",
        localrule: True
        threads: 1
        resources:
            mem_mb=memory("frame_table"),
            runtime=minutes("frame_table"),
        params:
            exposure_times=PARAMS.times_of_frames,
            made_by=PARAMS.made_by("frame_table"),
        message:
            "frame_table: {wildcards.frames}"
        script:
            "../scripts/frame_table.py"

    rule master_bias:
        """Combine the bias frames of a CCD."""
        input:
            unpack(INPUTS.bias),
        output:
            master=in_set("master_bias", paths.CALIB.replace("{kind}", "bias")),
        log:
            in_set("master_bias", "logs/calibs/bias/{ccd}.log"),
        benchmark:
            in_set("master_bias", "results/benchmarks/calibs/bias/{ccd}.tsv")
        group:
            group_of("master_bias")
        threads: 1
        resources:
            mem_mb=memory("master_bias"),
            runtime=minutes("master_bias"),
        params:
            made_by=PARAMS.master("master_bias"),
            camera=PARAMS.camera_of_ccd,
            exposure_times=PARAMS.exposure_times("master_bias"),
        message:
            naming_set("master_bias", "master_bias: CCD {wildcards.ccd}")
        script:
            "../scripts/master.py"

    use rule master_bias as master_dark with:
        input:
            unpack(INPUTS.dark),
        output:
            master=in_set("master_dark", paths.CALIB.replace("{kind}", "dark")),
        log:
            in_set("master_dark", "logs/calibs/dark/{ccd}.log"),
        benchmark:
            in_set("master_dark", "results/benchmarks/calibs/dark/{ccd}.tsv")
        resources:
            mem_mb=memory("master_dark"),
            runtime=minutes("master_dark"),
        params:
            made_by=PARAMS.master("master_dark"),
            camera=PARAMS.camera_of_ccd,
            exposure_times=PARAMS.exposure_times("master_dark"),
        message:
            naming_set("master_dark", "master_dark: CCD {wildcards.ccd}")

    use rule master_bias as master_flat with:
        input:
            unpack(INPUTS.flat),
        output:
            master=in_set("master_flat", paths.FLAT),
        log:
            in_set("master_flat", "logs/calibs/flat/{band}/{ccd}.log"),
        benchmark:
            in_set("master_flat", "results/benchmarks/calibs/flat/{band}/{ccd}.tsv")
        resources:
            mem_mb=memory("master_flat"),
            runtime=minutes("master_flat"),
        params:
            made_by=PARAMS.master("master_flat"),
            camera=PARAMS.camera_of_ccd,
            exposure_times=PARAMS.exposure_times("master_flat"),
        message:
            naming_set(
                "master_flat",
                "master_flat: band {wildcards.band}, CCD {wildcards.ccd}",
            )

    if is_planned("defects"):

        use rule master_bias as defects with:
            input:
                unpack(INPUTS.defects),
            output:
                master=in_set("defects", paths.DEFECTS),
            log:
                in_set("defects", "logs/calibs/defects/{band}/{ccd}.log"),
            benchmark:
                in_set("defects", "results/benchmarks/calibs/defects/{band}/{ccd}.tsv")
            resources:
                mem_mb=memory("defects"),
                runtime=minutes("defects"),
            params:
                made_by=PARAMS.master("defects"),
                camera=PARAMS.camera_of_ccd,
                exposure_times=PARAMS.exposure_times("defects"),
            message:
                naming_set(
                    "defects", "defects: band {wildcards.band}, CCD {wildcards.ccd}"
                )

    if is_planned("night_sky_defects"):

        use rule master_bias as night_sky_defects with:
            input:
                unpack(INPUTS.night_sky_defects),
            output:
                master=in_set(
                    "night_sky_defects", paths.CALIB.replace("{kind}", "defects")
                ),
            log:
                in_set("night_sky_defects", "logs/calibs/night_sky_defects/{ccd}.log"),
            benchmark:
                in_set(
                    "night_sky_defects",
                    "results/benchmarks/calibs/night_sky_defects/{ccd}.tsv",
                )
            resources:
                mem_mb=memory("night_sky_defects"),
                runtime=minutes("night_sky_defects"),
            params:
                made_by=PARAMS.master("night_sky_defects"),
                camera=PARAMS.camera_of_ccd,
                exposure_times=PARAMS.exposure_times("night_sky_defects"),
            message:
                naming_set(
                    "night_sky_defects", "night_sky_defects: CCD {wildcards.ccd}"
                )

    if is_planned("calib_table"):

        rule calib_table:
            """List the calibration frames of a band, for the jobs of its exposures."""
            input:
                calibs=INPUTS.calib_table,
            output:
                table=in_set("calib_table", paths.CALIB_TABLE),
            log:
                in_set("calib_table", "logs/calib_table/{band}.log"),
            localrule: True
            threads: 1
            resources:
                mem_mb=memory("calib_table"),
                runtime=minutes("calib_table"),
            params:
                calibs=PARAMS.calibs_of_band,
                made_by=PARAMS.made_by("calib_table"),
            message:
                naming_set("calib_table", "calib_table: band {wildcards.band}")
            script:
                "../scripts/calib_table.py"
