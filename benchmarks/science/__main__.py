"""The yardstick: a simulated survey through the whole workflow, against its truth and SWarp.

    make science
    make science SCIENCE_ARGS="--camera decam --ccds 1 2 3 --seed 5 --folder /tmp/science"

Simulates a survey, runs the workflow on it with Snakemake, coadds the same calexps with SWarp, and
compares all of it with the truth. Prints a table and writes `metrics.json`, `metrics.md` and plots
into the folder. docs/validation.md explains the figures. What is in the folder already is
not made again: with --measure-only nothing but the measuring is repeated.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from figures import measure_survey
from survey import make_survey

from coaddflow.errors import InputError
from coaddflow.qa.metrics import table_of, write_metrics


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="science", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--folder", type=Path, default=Path("science"), help="for everything (default: %(default)s)"
    )
    add("--camera", default="demo", help="name or file of the camera (default: %(default)s)")
    add("--ccds", type=int, nargs="+", help="only these CCDs, for large cameras")
    add("--seed", type=int, default=1, help="of all random numbers (default: %(default)s)")
    add("--bands", nargs="+", choices=("g", "r"), default=["g", "r"], help="default: g r")
    add("--exposures", type=int, default=8, help="for each band (default: %(default)s)")
    add("--exposure-time", type=float, default=120.0, help="s (default: %(default)s)")
    add(
        "--density", type=float, default=25.0, help="stars per square arcmin (default: %(default)s)"
    )
    add("--galaxies", type=float, default=25.0, help="per square arcmin (default: %(default)s)")
    add(
        "--saturated",
        type=float,
        default=0.8,
        help="saturated stars that are added per square arcmin (default: %(default)s)",
    )
    add("--seeing", type=float, default=0.85, help="median FWHM, arcsec (default: %(default)s)")
    add(
        "--seeing-scatter",
        type=float,
        default=0.12,
        help="of ln(FWHM) between exposures (default: %(default)s)",
    )
    add("--psf", choices=("moffat", "kolmogorov"), default="moffat", help="profile of the PSF")
    add(
        "--atmosphere",
        type=float,
        default=1.0,
        help="strength of turbulence, refraction, dispersion and the variation of the PSF over "
        "arcminutes: 1 as at a good site, 0 none (default: %(default)s)",
    )
    add("--no-distortion", action="store_true", help="optics without distortion")
    add("--cosmic-rays", type=float, default=0.3, help="hits per s and cm^2 (default: %(default)s)")
    add("--config", type=Path, help="YAML file with settings of the workflow that differ")
    add("-j", "--jobs", type=int, default=os.cpu_count() or 1, help="cores (default: all)")
    add("--measure-only", action="store_true", help="measure a folder that is complete")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the yardstick."""
    arguments = parse_arguments()
    try:
        survey = make_survey(arguments)
        metrics, material = measure_survey(survey, arguments.jobs)
    except InputError as error:
        print(f"science: {error}", file=sys.stderr)
        return 2
    write_metrics(metrics, survey.folder / "metrics.json")
    table = table_of(metrics)
    (survey.folder / "metrics.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    for note in survey.notes:
        print(note)
    print(f"figures with their definitions: {survey.folder / 'metrics.json'}")
    try:
        from plots import draw_all
    except ImportError as error:
        print(f"no plots: {error.name} is missing; pip install 'coaddflow[science]'")
        return 0
    for path in draw_all(material, metrics, survey.folder / "plots"):
        print(f"plot: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
