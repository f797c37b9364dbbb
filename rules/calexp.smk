# Calibrated images (calexps): one job a CCD, and one that gathers an exposure.
#
# What a CCD's job promises Snakemake is its row, which is always written, and written last: a CCD
# that fails for reasons of its own has a row with the reason and no calexp. What later stages
# hang on is the exposure's manifest, made from the rows.
#
# `parallel.calexp: ccd` is these two rules. Both are of one group, so that a cluster gets one job
# an exposure. With `parallel.calexp: exposure` the rules of exposures.smk take their place and make
# the same manifest; nothing downstream sees the difference.


if PLAN.science and not WHOLE_EXPOSURES:

    rule calexp:
        input:
            unpack(calexp_inputs),
        output:
            row="results/calexp/{exposure}/{ccd}.json",
        log:
            "logs/calexp/{exposure}/{ccd}.log",
        benchmark:
            "results/benchmarks/calexp/{exposure}/{ccd}.tsv"
        wildcard_constraints:
            exposure=raw_exposure_pattern(),
        group:
            group_of("exposure_{exposure}")
        threads: 1
        resources:
            mem_mb=ccd_memory,
            runtime=ccd_runtime,
        params:
            facts=ccd_facts,
            camera=ccd_fingerprint,
            settings=calexp_settings,
        script:
            "../scripts/calexp.py"


if not WHOLE_EXPOSURES:

    rule manifest:
        input:
            rows=rows_of_exposure,
        output:
            manifest="results/summary/{exposure}.ecsv",
        log:
            "logs/manifest/{exposure}.log",
        group:
            group_of("exposure_{exposure}")
        threads: 1
        resources:
            mem_mb=growing(needs.SMALL_STEP_MB),
            runtime=growing(5),
        params:
            facts=exposure_facts,
            verdict=verdict,
        script:
            "../scripts/manifest.py"
