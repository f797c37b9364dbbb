"""How long planning takes: `snakemake -n` of a survey of many exposures.

    python benchmarks/dry_run.py 1000 5000
    python benchmarks/dry_run.py 5000 --calibs night-sky
    python benchmarks/dry_run.py 5000 --calibs sets      frames of each night, in sets of their own
    python benchmarks/dry_run.py 1000 --granularity fine --pointings visits.csv
    python benchmarks/dry_run.py 1000 --profile slurm --granularity fine --batch all=1/10
    python benchmarks/dry_run.py 1000 --added       one exposure added to 1,000 that are finished
    python benchmarks/dry_run.py 100000 --night 1000    the last 1,000 named, nothing else planned
    python benchmarks/dry_run.py 5000 --job         what one job of a cluster adds to a Snakemake

Makes the tables of a survey in a temporary folder (no pixels are needed to plan), with bias, dark
and flats of all bands as users have them, and prints the number of jobs, the wall and CPU time, and
the peak memory of one dry run. ``--bare`` repeats it with a Snakefile that has the same jobs and
files and nothing else.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

import numpy as np
from astropy import units
from astropy.coordinates import Angle

from coaddflow.tables.exposures import ExposureRow, write_exposures
from coaddflow.tables.paths import MANIFEST

SNAKEFILE = Path(__file__).parents[1] / "Snakefile"
PROFILES = SNAKEFILE.parent / "profiles"

SETTINGS = """
camera: {camera}
exposures: exposures.ecsv
refcat: {{path: stars.csv}}
calibs:
  longitude: 180
  sets: {{gap: {gap}}}
  bias: {{source: {bias}}}
  dark: {{source: {dark}}}
  flat: {{source: {flat}}}
  defects: {{source: {defects}}}
parallel: {{calexp: {calexp}, coadd: {coadd}}}
"""

GRANULARITY = {
    "fine": {"calexp": "ccd", "coadd": "patch"},
    "coarse": {"calexp": "exposure", "coadd": "tract"},
}

CALIBS = {
    "frames": dict.fromkeys(("bias", "dark", "flat", "defects"), "frames"),
    "night-sky": {"bias": "frames", "dark": "frames", "flat": "night_sky", "defects": "frames"},
    "sets": dict.fromkeys(("bias", "dark", "flat", "defects"), "frames"),
    "none": dict.fromkeys(("bias", "dark", "flat", "defects"), "none"),
}

CALIBRATION_FRAMES = 10
"""Biases, darks and flats of each band."""

Pointing = tuple[str, str, float, float, float]
"""Id, band, ra, dec (degrees), MJD."""


def random_pointings(n: int) -> list[Pointing]:
    """Return the pointings of a survey that covers 3 degrees by 3 degrees per 60."""
    rng = np.random.default_rng(1)
    width = 3.0 * np.sqrt(n / 60.0)
    ra, dec = 150.0 + width * rng.uniform(size=n), width * (rng.uniform(size=n) - 0.5)
    return [
        (f"v{i:06d}", "grizy"[i % 5], float(ra[i] % 360), float(dec[i]), 60000.0 + i / 500)
        for i in range(n)
    ]


def pointings_of_table(path: Path, n: int) -> list[Pointing]:
    """Return the first n pointings of a CSV file like that of the HiTS survey."""
    with path.open(encoding="utf-8") as stream:
        rows = {row["visit_num"]: row for row in csv.DictReader(stream)}
    return [
        (
            number,
            row["filter"],
            float(Angle(row["ra"], units.hourangle).deg),
            float(Angle(row["dec"], units.deg).deg),
            float(row["image_mjd"]),
        )
        for number, row in list(rows.items())[:n]
    ]


def calibration_rows(bands: Sequence[str], night: int) -> list[ExposureRow]:
    """Return biases, darks and flats of some bands, taken in a night (MJD)."""
    kinds = [("bias", ""), ("dark", ""), *(("flat", band) for band in bands)]
    return [
        ExposureRow(
            exposure=f"{kind}{band}{night}_{i:03d}",
            kind=kind,
            band=band,
            ra=None,
            dec=None,
            rotation=None,
            mjd=float(night),
            exposure_time=10.0,
            path=f"raw/{kind}{band}{night}_{i:03d}.fits",
        )
        for kind, band in kinds
        for i in range(CALIBRATION_FRAMES)
    ]


def make_survey(
    folder: Path, pointings: Sequence[Pointing], camera: str, granularity: str, calibs: str
) -> None:
    """Write settings and tables of a survey, and empty raw files where there are none."""
    science = [
        ExposureRow(
            exposure=name,
            kind="science",
            band=band,
            ra=ra,
            dec=dec,
            rotation=0.0,
            mjd=mjd,
            exposure_time=200.0,
            path=f"raw/{name}.fits",
        )
        for name, band, ra, dec, mjd in pointings
    ]
    # at a longitude of 180 degrees nights begin with the day of the MJD
    nights = sorted({int(row.mjd) for row in science}) if calibs == "sets" else [59999]
    bands = sorted({row.band for row in science})
    rows = [row for night in nights for row in calibration_rows(bands, night)] + science
    write_exposures(folder / "exposures.ecsv", rows)
    (folder / "raw").mkdir(exist_ok=True)
    # a file with a later time would count as replaced
    for path in (folder / row.path for row in rows):
        if not path.exists():
            path.touch()
    if not (stars := folder / "stars.csv").exists():
        stars.write_text("ra,dec,mag\n150.0,0.0,18.0\n")
    gap = 0 if calibs == "sets" else "null"
    settings = SETTINGS.format(camera=camera, gap=gap, **GRANULARITY[granularity], **CALIBS[calibs])
    (folder / "config.yaml").write_text(settings)


BARE_RULE = """
rule {name}:
    input: lambda wildcards: INPUTS["{name}"]["/".join(wildcards)]
    output: "{output}"
    shell: "exit 1"
"""


def make_bare_snakefile(folder: Path) -> Path:
    """Write a Snakefile with the jobs and files of a survey's plan and nothing else."""
    from coaddflow.workflow.stage import load_workflow
    from coaddflow.workflow.stages import STAGES, targets

    with chdir(folder):
        workflow = load_workflow(SNAKEFILE)
        # the modules of Snakemake import each other: these come last
        from snakemake.dag import DAG
        from snakemake.jobs import Job

        plan, dag = workflow.globals["PLAN"], DAG(workflow, rules=[])
        rules = {rule.name: rule for rule in workflow.rules}
        inputs: dict[str, dict[str, list[str]]] = {}
        for stage in STAGES.values():
            for names in stage.units(plan):
                output = stage.products[0].path
                order = re.findall(r"{(\w+)}", output)
                job = Job(rules[stage.name], dag, names)
                of_job = inputs.setdefault(stage.name, {})
                of_job["/".join(names[name] for name in order)] = list(map(str, job.input))
        (folder / "inputs.json").write_text(json.dumps([targets(plan), inputs]))
    snakefile = folder / "bare.smk"
    patterns = 'wildcard_constraints: ccd="[0-9]+", tract="[0-9]+", patch="[0-9]+_[0-9]+"\n'
    snakefile.write_text(
        "import json\nTARGETS, INPUTS = json.load(open('inputs.json'))\n"
        + patterns
        + "rule all:\n    input: lambda wildcards: TARGETS\n"
        + "".join(
            BARE_RULE.format(name=name, output=STAGES[name].products[0].path) for name in inputs
        )
    )
    return snakefile


def finish_survey(folder: Path) -> None:
    """Make a survey look as if it had run: manifests, other products empty, Snakemake's records."""
    from coaddflow.settings import load_settings
    from coaddflow.settings.keys import read_file
    from coaddflow.tables.manifest import CcdRow, write_manifest
    from coaddflow.workflow.plan import make_plan
    from coaddflow.workflow.stages import STAGES, targets

    with chdir(folder):
        plan = make_plan(load_settings(read_file("config.yaml")), cache=None)
        for path in targets(plan):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch()
        for stage in ("calexp", "manifest", "exposure"):
            for names in STAGES[stage].units(plan):
                if "ccd" in names:
                    Path(STAGES[stage].products[0].path.format(**names)).write_text("{}")
        for exposure, row in plan.science.items():
            first = CcdRow(
                exposure=exposure,
                ccd=0,
                band=row.band,
                mjd=row.mjd,
                exposure_time=row.exposure_time,
                state="done",
                path="results/calexp/none.fits",
                footprint_ra=[row.ra] * 32,
                footprint_dec=[row.dec] * 32,
                seeing=0.7,
                zero_point=33.0,
            )
            rows = [first.model_copy(update={"ccd": ccd}) for ccd in plan.ccds]
            write_manifest(f"results/summary/{exposure}.ecsv", rows)
    # Snakemake waits 0.1 s for every job whose products it touches
    code = (
        "from snakemake.executors import touch; touch.Executor.SLEEPING_TIME = 0; "
        "from snakemake.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "-s", str(SNAKEFILE), "-d", str(folder)]
    command += ["--touch", "--forceall", "--cores", "1", "--quiet", "all"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def planned(folder: Path, snakefile: Path, more: Sequence[str] = ()) -> None:
    """Print what a dry run takes."""
    command = [sys.executable, "-m", "snakemake", "-s", str(snakefile), "-d", str(folder)]
    command += ["-n", "--quiet", "rules", *more]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - started
        output.seek(0)
        text = output.read()
    if status:
        sys.exit(text)
    jobs = re.search(r"^total +(\d+)", text, re.MULTILINE)
    print(
        f"  {snakefile.name}: {jobs[1] if jobs else 0} jobs, {wall:.1f} s, "
        f"{usage.ru_utime + usage.ru_stime:.1f} s CPU, {usage.ru_maxrss / 1000:.0f} MB",
        flush=True,
    )


ONE_RULE = """
rule exposure:
    output: "results/summary/{exposure}.ecsv"
    shell: "exit 1"
"""

JOB = [
    *("--mode", "remote", "--force", "--nolock", "--ignore-incomplete", "--no-hooks"),
    *("--cores", "1", "-n", "--quiet", "all", "--target-files-omit-workdir-adjustment"),
    *("--allowed-rules", "exposure", "--target-jobs"),
]


def time_job(folder: Path, exposure: str, repeats: int = 5) -> None:
    """Print what the Snakemake inside a cluster's job takes to plan it, beside a bare one."""
    one = folder / "one.smk"
    one.write_text(ONE_RULE)
    taken: dict[str, list[float]] = {}
    for snakefile in (SNAKEFILE, one) * (repeats + 1):
        command = [sys.executable, "-m", "snakemake", "-s", str(snakefile), "-d", str(folder)]
        before = os.times()
        subprocess.run(
            [*command, *JOB, f"exposure:exposure={exposure}"], check=True, capture_output=True
        )
        taken.setdefault(snakefile.name, []).append(sum(os.times()[2:4]) - sum(before[2:4]))
    # the first of each fills the caches
    ours, bare = (float(np.median(seconds[1:])) for seconds in taken.values())
    print(f"  a job: {ours:.2f} s CPU, bare {bare:.2f}, more: {ours - bare:.2f}", flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exposures", type=int, nargs="+")
    parser.add_argument("--camera", default="hsc")
    parser.add_argument("--pointings", type=Path, help="table of visits (CSV)")
    parser.add_argument("--granularity", choices=GRANULARITY, default="coarse")
    parser.add_argument("--calibs", choices=CALIBS, default="frames")
    parser.add_argument("--bare", action="store_true", help="plan the same jobs without coaddflow")
    parser.add_argument("--added", action="store_true", help="all but one exposure are finished")
    parser.add_argument("--night", type=int, help="ask for the last exposures only, so many")
    parser.add_argument("--job", action="store_true", help="also what each job of a cluster takes")
    parser.add_argument("--batch", help="as of Snakemake, such as all=1/10")
    parser.add_argument("--profile", help="profile of a cluster; groups take time to plan")
    options = parser.parse_args()
    more = ["--batch", options.batch] if options.batch else []
    more += ["--profile", str(PROFILES / options.profile)] if options.profile else []
    for n in options.exposures:
        all_pointings = n + options.added
        if options.pointings:
            pointings = pointings_of_table(options.pointings, all_pointings)
        else:
            pointings = random_pointings(all_pointings)
        kind = options.camera, options.granularity, options.calibs
        print(f"{n} exposures, {', '.join(kind)}:", flush=True)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if options.added:
                make_survey(folder, pointings[:-1], *kind)
                finish_survey(folder)
            make_survey(folder, pointings, *kind)
            night = [name for name, *_ in pointings[-options.night :]] if options.night else []
            named = ["--", *(MANIFEST.format(exposure=name) for name in night)]
            for _ in range(1 + bool(options.added or night)):
                # the second time the plan is in its cache
                planned(folder, SNAKEFILE, [*more, *named] if night else more)
            if options.bare:
                planned(folder, make_bare_snakefile(folder), more)
            if options.job:
                time_job(folder, pointings[0][0])


if __name__ == "__main__":
    main()
