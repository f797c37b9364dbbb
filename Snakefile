# coaddflow: raw exposures of a mosaic camera to calibrated images and deep coadds.
#
#     snakemake -n                       the whole plan, to the last coadd
#     snakemake --profile profiles/local run it on this machine
#
# The rules are in rules/, in the order of the data, and the scripts that they call in scripts/.
# docs/workflow.md tells how it works.

from snakemake.utils import min_version

min_version("9.27")


include: "rules/common.smk"


localrules:
    all,


rule all:
    """Everything: calibration frames, calexps, corner databases, warps, coadds, depth, pictures."""
    default_target: True
    input:
        all_products,
    message:
        "all: all products of the survey"


include: "rules/calibs.smk"
include: "rules/calexp.smk"
include: "rules/calibrated.smk"
include: "rules/exposures.smk"
include: "rules/corners.smk"
include: "rules/warps.smk"
include: "rules/coadds.smk"
include: "rules/depth.smk"


onstart:
    report_start()


onsuccess:
    report_success()


onerror:
    report_failure()
