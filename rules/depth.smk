# Depth: the magnitude of a point source at 5 sigma in each pixel of the coadds, and a table of
# medians for each tract, written last. It reads coadds and changes none of them.


rule depth:
    """Map the depth of the coadds of a tract in all bands."""
    input:
        coadds=INPUTS.on_tract("coadd", "tract"),
    output:
        table=paths.DEPTH_TABLE,
    log:
        "logs/depth/{tract}.log",
    benchmark:
        "results/benchmarks/depth/{tract}.tsv"
    group:
        group_of("depth")
    threads: 1
    resources:
        mem_mb=memory("depth"),
        runtime=minutes("depth"),
    params:
        skymap=PARAMS.skymap(),
        made_by=PARAMS.made_by("depth"),
    message:
        "depth: tract {wildcards.tract}"
    script:
        "../scripts/depth.py"
