# Warps: the CCDs of one exposure on the pixels of one tract.
#
# A warp depends on the manifest of its own exposure and on nothing else: what other exposures do
# never makes it again. Its table is what it promises Snakemake, and is written last. With
# `parallel.coadd: tract` there are none: the job of the tract keeps them in memory.


if is_planned("warp"):

    rule warp:
        """Warp the CCDs of an exposure to a tract."""
        input:
            manifest=paths.MANIFEST,
        output:
            table=paths.WARP_TABLE,
        log:
            "logs/warp/{tract}/{exposure}.log",
        benchmark:
            "results/benchmarks/warp/{tract}/{exposure}.tsv"
        group:
            group_of("warp")
        threads: cores_with_spare("warp")
        resources:
            mem_mb=memory("warp"),
            runtime=minutes("warp"),
        params:
            skymap=PARAMS.skymap(),
            made_by=PARAMS.made_by("warp"),
        message:
            "warp: exposure {wildcards.exposure}, tract {wildcards.tract}"
        script:
            "../scripts/warp.py"
