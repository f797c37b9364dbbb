# Corner databases: which CCDs cover which patches, and how good they are.
#
# A coadd asks the database of its band and tract, made from the manifests of the exposures that
# can touch it, so that an added exposure redoes nothing elsewhere. The survey's database is for
# people and for planning; nothing depends on it. It is brought up to date in place, so Snakemake must
# not remove it before the job, nor copy it (`workflow/snakemake_patches.py`).


rule tract_corners:
    """Make the corner database of a band on a tract."""
    input:
        manifests=INPUTS.tract_corners,
    output:
        database=paths.TRACT_CORNERS,
    log:
        "logs/tract_corners/{band}/{tract}.log",
    group:
        group_of("tract_corners")
    threads: 1
    resources:
        mem_mb=memory("tract_corners"),
        runtime=minutes("tract_corners"),
    params:
        skymap=PARAMS.skymap(),
        made_by=PARAMS.made_by("tract_corners"),
    message:
        "tract_corners: band {wildcards.band}, tract {wildcards.tract}"
    script:
        "../scripts/tract_corners.py"


rule survey_corners:
    """Bring the corner database of the survey up to date."""
    input:
        manifests=INPUTS.survey_corners,
    output:
        database=update(paths.SURVEY_CORNERS),
    log:
        "logs/survey_corners.log",
    threads: 1
    resources:
        mem_mb=memory("survey_corners"),
        runtime=minutes("survey_corners"),
    params:
        skymap=PARAMS.skymap(),
        made_by=PARAMS.made_by("survey_corners"),
    message:
        "survey_corners: all exposures"
    script:
        "../scripts/survey_corners.py"
