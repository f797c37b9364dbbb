# Coadds, and a picture of each tract.
#
# `parallel.coadd: patch` is the rule `coadd`, one job a patch and band, grouped by tract with the
# tract's warps. `parallel.coadd: tract` is the rule `tract`, which warps and coadds a tract in one
# job; it depends on the corner database alone, which changes with each manifest of its exposures.


if is_planned("coadd"):

    rule coadd:
        """Coadd a patch in one band."""
        input:
            database=paths.TRACT_CORNERS,
            warps=INPUTS.coadd,
        output:
            image=paths.COADD,
        log:
            "logs/coadd/{band}/{tract}/{patch}.log",
        benchmark:
            "results/benchmarks/coadd/{band}/{tract}/{patch}.tsv"
        group:
            group_of("coadd")
        threads: 1
        resources:
            mem_mb=memory("coadd"),
            runtime=minutes("coadd"),
        params:
            skymap=PARAMS.skymap(),
            made_by=PARAMS.made_by("coadd"),
        message:
            "coadd: band {wildcards.band}, tract {wildcards.tract}, patch {wildcards.patch}"
        script:
            "../scripts/coadd.py"


if is_planned("tract"):

    rule tract:
        """Warp and coadd a band on a tract in one job."""
        input:
            database=paths.TRACT_CORNERS,
        output:
            table=paths.COADD_TABLE,
        log:
            "logs/tract/{band}/{tract}.log",
        benchmark:
            "results/benchmarks/tract/{band}/{tract}.tsv"
        group:
            group_of("tract")
        threads: cores("tract")
        resources:
            mem_mb=memory("tract"),
            runtime=minutes("tract"),
            mpi=mpi_allocation(),
            tasks=tasks("tract"),
            mem_mb_per_cpu=task_memory("tract"),
        params:
            skymap=PARAMS.skymap(),
            patches=PARAMS.patches,
            made_by=PARAMS.made_by("tract"),
        message:
            "tract: band {wildcards.band}, tract {wildcards.tract}"
        script:
            "../scripts/tract.py"


rule picture:
    """Make a colour picture of a tract from its coadds."""
    input:
        coadds=INPUTS.on_tract("coadd", "tract"),
    output:
        picture=paths.PICTURE,
    log:
        "logs/picture/{tract}.log",
    group:
        group_of("picture")
    threads: 1
    resources:
        mem_mb=memory("picture"),
        runtime=minutes("picture"),
    params:
        skymap=PARAMS.skymap(),
        made_by=PARAMS.made_by("picture"),
    message:
        "picture: tract {wildcards.tract}"
    script:
        "../scripts/picture.py"
