# Coadds, and a picture of each tract.
#
# `parallel.coadd: patch` is the rule `coadd`, one job a patch and band, grouped by tract with the
# tract's warps. `parallel.coadd: tract` is the rule `tract`, which warps and coadds a tract in one
# job; it hangs on the corner database alone, which changes with each manifest of its exposures.


if SETTINGS.parallel.coadd == "patch":

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


if SETTINGS.parallel.coadd == "tract":

    rule tract:
        input:
            database="results/corners/{band}/{tract}.sqlite",
        output:
            table="results/coadd/{band}/{tract}.ecsv",
        log:
            "logs/tract/{band}/{tract}.log",
        benchmark:
            "results/benchmarks/tract/{band}/{tract}.tsv"
        group:
            TRACT_GROUP
        threads: tract_threads
        resources:
            mem_mb=tract_memory,
            runtime=tract_runtime,
            mpi=mpi_allocation,
            tasks=tract_tasks,
            mem_mb_per_cpu=tract_task_memory,
        params:
            skymap=PLAN.skymap_settings(),
            patches=patches_of_tract,
            settings=PLAN.triggers("coadd", "selection", "warp", "products"),
        script:
            "../scripts/tract.py"


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
