"""What one full-size CCD costs from the raw frame to the calexp: the workflow's own job.

    python benchmarks/raw_to_calexp.py --exposures 4

Simulates exposures of one CCD of DECam (2048 x 4096 pixels) with their calibration frames (needs
the extra `simulate`), runs the workflow to the manifests on one core, and prints what Snakemake
measured for each job, interpreter and imports included. The first job compiles kernels.
"""

import argparse
import contextlib
import csv
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
CCD = 35
BAND = "r"


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exposures", type=int, default=4, help="science exposures")
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run(Path(folder), arguments.exposures)
        report(Path(folder))


@contextlib.contextmanager
def finished_ccd(folder: Path | None) -> Iterator[Path]:
    """Yield a folder in which the CCD has been made once; None: a temporary one."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "results" / "summary").is_dir():
            run(folder, 1)
        yield folder


def run(folder: Path, n_exposures: int) -> None:
    """Simulate the CCD and run the workflow to the manifests."""
    simulation = {
        "camera": "decam",
        "ccds": [CCD],
        "bands": {BAND: {"exposures": n_exposures, "zero_point": 26.0, "sky": 21.0}},
        "stars": {"density": 12.0, "brightest": 13.0, "faintest": 24.0},
        "galaxies": {"density": 10.0},
        "calibration": {"bias": 3, "dark": 3, "flat": 3},
    }
    settings = {
        "camera": "decam",
        "exposures": "exposures.ecsv",
        "exclude_ccds": [ccd for ccd in range(1, 63) if ccd != CCD and has_ccd(ccd)],
        "refcat": {"path": "data/refcat.fits", "fallback": {"magnitude": f"mag_{BAND}"}},
        "skymap": {"kind": "tangent", "pixel_scale": 0.27},
    }
    (folder / "simulation.yaml").write_text(yaml.safe_dump(simulation))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    coaddflow = [sys.executable, "-m", "coaddflow"]
    call([*coaddflow, "simulate", "simulation.yaml", "data"], folder)
    call([*coaddflow, "ingest", "data/raw"], folder)
    snakemake = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile")]
    call([*snakemake, "--cores", "1", "--until", "manifest"], folder)


def has_ccd(ccd: int) -> bool:
    """Return whether the camera file knows this CCD."""
    from coaddflow.instrument.camera import load_camera

    return any(detector.id == ccd for detector in load_camera("decam").detectors)


def call(command: list[str], folder: Path) -> None:
    """Run a command; show what it said if it fails."""
    ended = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    if ended.returncode != 0:
        sys.exit(ended.stdout + ended.stderr)


def report(folder: Path) -> None:
    """Print CPU seconds, wall seconds and memory of the jobs."""
    print(f"{'job':10s} {'n':>3s} {'CPU s':>8s} {'wall s':>8s} {'max CPU s':>10s} {'MB':>8s}")
    for stage in ("calibs", "calexp"):
        rows = []
        for path in sorted((folder / "results" / "benchmarks" / stage).glob("**/*.tsv")):
            with path.open() as stream:
                rows += list(csv.DictReader(stream, delimiter="\t"))
        cpu, wall, memory = (
            [float(row[name]) for row in rows] for name in ("cpu_time", "s", "max_rss")
        )
        print(
            f"{stage:10s} {len(rows):3d} {statistics.median(cpu):8.1f} "
            f"{statistics.median(wall):8.1f} {max(cpu):10.1f} {max(memory):8.0f}"
        )


if __name__ == "__main__":
    main()
