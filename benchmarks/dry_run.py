"""How long planning takes: `snakemake -n` of a survey of many exposures.

    python benchmarks/dry_run.py 1000
    python benchmarks/dry_run.py 1000 --granularity coarse
    python benchmarks/dry_run.py 1000 --pointings visits.csv --batch all=1/10
    python benchmarks/dry_run.py 1000 --profile slurm

Makes the tables of a survey in a temporary folder (no raw files are needed to plan) and prints
the number of jobs, the wall and CPU time, and the peak memory of one dry run.
"""

import argparse
import csv
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from astropy import units
from astropy.coordinates import Angle

from coaddflow.tables.exposures import ExposureRow, write_exposures

SNAKEFILE = Path(__file__).parents[1] / "Snakefile"
PROFILES = SNAKEFILE.parent / "profiles"

SETTINGS = """
camera: {camera}
exposures: exposures.ecsv
refcat: {{path: stars.csv}}
calibs:
  bias: {{source: none}}
  dark: {{source: none}}
  flat: {{source: none}}
  defects: {{source: none}}
parallel: {{calexp: {calexp}, coadd: {coadd}}}
"""

GRANULARITY = {
    "fine": {"calexp": "ccd", "coadd": "patch"},
    "coarse": {"calexp": "exposure", "coadd": "tract"},
}


def random_pointings(n: int) -> list[tuple[str, str, float, float, float]]:
    """Return id, band, ra, dec, mjd of a survey that covers 3 degrees by 3 degrees per 60."""
    rng = np.random.default_rng(1)
    width = 3.0 * np.sqrt(n / 60.0)
    ra, dec = 150.0 + width * rng.uniform(size=n), width * (rng.uniform(size=n) - 0.5)
    return [
        (f"v{i:06d}", "grizy"[i % 5], float(ra[i] % 360), float(dec[i]), 60000.0 + i / 500)
        for i in range(n)
    ]


def pointings_of_table(path: Path, n: int) -> list[tuple[str, str, float, float, float]]:
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


def make_survey(folder: Path, pointings: list, camera: str, granularity: str) -> None:
    """Write settings and tables of a survey, and empty raw files."""
    rows = [
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
    write_exposures(folder / "exposures.ecsv", rows)
    (folder / "raw").mkdir()
    for row in rows:
        (folder / row.path).touch()
    (folder / "stars.csv").write_text("ra,dec,mag\n")
    (folder / "config.yaml").write_text(SETTINGS.format(camera=camera, **GRANULARITY[granularity]))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("exposures", type=int)
    parser.add_argument("--camera", default="hsc")
    parser.add_argument("--pointings", type=Path)
    parser.add_argument("--granularity", choices=GRANULARITY, default="fine")
    parser.add_argument("--batch")
    parser.add_argument("--profile", help="profile of a cluster; groups take time to plan")
    options = parser.parse_args()
    if options.pointings:
        pointings = pointings_of_table(options.pointings, options.exposures)
    else:
        pointings = random_pointings(options.exposures)
    with tempfile.TemporaryDirectory() as folder:
        make_survey(Path(folder), pointings, options.camera, options.granularity)
        command = [sys.executable, "-m", "snakemake", "-s", str(SNAKEFILE), "-d", folder]
        command += ["-n", "--quiet", "rules"]
        command += ["--batch", options.batch] if options.batch else []
        command += ["--profile", str(PROFILES / options.profile)] if options.profile else []
        started = time.monotonic()
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        wall = time.monotonic() - started
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        cache = (Path(folder) / ".snakemake/coaddflow/plan.json").stat().st_size
    print(output[output.index("job ") : output.index("Reasons") if "Reasons" in output else None])
    print(
        f"{len(pointings)} exposures: {wall:.0f} s, {usage.ru_utime + usage.ru_stime:.0f} s CPU, "
        f"{usage.ru_maxrss / 1000:.0f} MB, plan {cache / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
