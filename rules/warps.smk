# Warps: the CCDs of one exposure on the pixels of one tract.
#
# A warp hangs on the manifest of its own exposure and on nothing else: what other exposures do
# never makes it again. Its table is what it promises Snakemake, and is written last. With
# `parallel.coadd: tract` there are none: the job of the tract keeps them in memory.


if SETTINGS.parallel.coadd == "patch":

    rule warp:
        input:
            manifest="results/summary/{exposure}.ecsv",
        output:
            table="results/warp/{tract}/{exposure}.ecsv",
        log:
            "logs/warp/{tract}/{exposure}.log",
        benchmark:
            "results/benchmarks/warp/{tract}/{exposure}.tsv"
        group:
            group_of("tract_{tract}")
        threads: 1
        resources:
            mem_mb=warp_memory,
            runtime=warp_runtime,
        params:
            skymap=PLAN.skymap_settings(),
            settings=PLAN.triggers("warp", "products"),
        script:
            "../scripts/warp.py"
