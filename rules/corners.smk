# Corner databases: which CCDs cover which patches, and how good they are.
#
# A coadd asks the database of its band and tract, made from the manifests of the exposures that
# can touch it, so that an added exposure redoes nothing elsewhere. The survey's database is for
# people and for planning; nothing hangs on it. It is brought up to date rather than made anew.


rule tract_corners:
    input:
        manifests=manifests_of_tract,
    output:
        database="results/corners/{band}/{tract}.sqlite",
    log:
        "logs/tract_corners/{band}/{tract}.log",
    group:
        TRACT_GROUP
    threads: 1
    resources:
        mem_mb=growing(needs.SMALL_STEP_MB),
        runtime=growing(10),
    params:
        skymap=PLAN.skymap_settings(),
    script:
        "../scripts/tract_corners.py"


rule survey_corners:
    input:
        manifests=all_manifests,
    output:
        database=update("results/corners.sqlite"),
    log:
        "logs/survey_corners.log",
    threads: 1
    resources:
        mem_mb=growing(2 * needs.SMALL_STEP_MB),
        runtime=growing(60),
    params:
        skymap=PLAN.skymap_settings(),
        prediction=PLAN.triggers("prediction"),
    script:
        "../scripts/survey_corners.py"
