# Calibrated images (calexps): one job a CCD, and one that gathers an exposure.
#
# What a CCD's job promises Snakemake is its row, which is always written, and written last: a CCD
# that fails for reasons of its own has a row with the reason and no calexp. Later stages depend
# on the exposure's manifest, made from the rows.
#
# `parallel.calexp: ccd` is these two rules. Both are of one group, so that a cluster gets one job
# an exposure. With `parallel.calexp: exposure` the rules of exposures.smk take their place and make
# the same manifest; nothing downstream sees the difference.


if is_planned("calexp"):

    rule calexp:
        """Calibrate a CCD: from raw pixels to calexp, sources and row."""
        input:
            unpack(INPUTS.calexp),
        output:
            row=paths.ROW,
        log:
            "logs/calexp/{exposure}/{ccd}.log",
        benchmark:
            "results/benchmarks/calexp/{exposure}/{ccd}.tsv"
        wildcard_constraints:
            exposure=RAW,
        group:
            group_of("calexp")
        threads: cores_with_spare("calexp")
        resources:
            mem_mb=memory("calexp"),
            runtime=minutes("calexp"),
        params:
            table_row=PARAMS.table_row,
            camera=PARAMS.camera_of_ccd,
            made_by=PARAMS.calexp,
        message:
            "calexp: exposure {wildcards.exposure}, CCD {wildcards.ccd}"
        script:
            "../scripts/calexp.py"


if is_planned("manifest"):

    rule manifest:
        """Gather the rows of an exposure into its manifest."""
        input:
            rows=INPUTS.manifest,
        output:
            manifest=paths.MANIFEST,
        log:
            "logs/manifest/{exposure}.log",
        group:
            group_of("manifest")
        threads: 1
        resources:
            mem_mb=memory("manifest"),
            runtime=minutes("manifest"),
        params:
            table_row=PARAMS.exposure_row,
            made_by=PARAMS.made_by("manifest"),
            verdict=PARAMS.verdict,
        message:
            "manifest: exposure {wildcards.exposure}"
        script:
            "../scripts/manifest.py"
