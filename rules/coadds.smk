# Coadds: one job a patch and band; and a picture of each tract.
#
# `parallel.coadd: patch` is the rule `coadd`, grouped by tract with the tract's warps. A job that
# warps and coadds a whole tract in memory takes the place of both.


rule coadd:
    input:
        database="results/corners/{band}/{tract}.sqlite",
        warps=warps_of_patch,
    output:
        image="results/coadd/{band}/{tract}/{patch}.fits",
    log:
        "logs/coadd/{band}/{tract}/{patch}.log",
    benchmark:
        "results/benchmarks/coadd/{band}/{tract}/{patch}.tsv"
    group:
        group_of("tract_{tract}")
    threads: 1
    resources:
        mem_mb=coadd_memory,
        runtime=coadd_runtime,
    params:
        skymap=PLAN.skymap_settings(),
        settings=PLAN.triggers("coadd", "selection", "warp", "products"),
    script:
        "../scripts/coadd.py"


rule picture:
    input:
        coadds=coadds_of_tract,
    output:
        picture="results/coadd/{tract}.png",
    log:
        "logs/picture/{tract}.log",
    group:
        group_of("tract_{tract}")
    threads: 1
    resources:
        mem_mb=picture_memory,
        runtime=growing(10),
    params:
        skymap=PLAN.skymap_settings(),
    script:
        "../scripts/picture.py"
