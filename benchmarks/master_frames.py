"""What the master frames of one CCD of DECam (2048 x 4096 pixels) cost.

    python benchmarks/master_frames.py --frames 5 --repeat 3

Simulates calibration exposures (needs the extra `simulate`), makes bias, dark, flat and defects
from them, each in a process of its own as in the workflow, and prints medians of CPU and wall
seconds with and without imports, and the memory. The first round compiles and does not count.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

CCD = 35
FIRST = {"bias": 101, "dark": 201, "flat": 301}
SECONDS = {"bias": 0.0, "dark": 300.0, "flat": 10.0}
NEEDS = {"bias": (), "dark": ("bias",), "flat": ("bias", "dark"), "defects": ("dark", "flat")}


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=5, help="exposures of each kind")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    parser.add_argument("--make", choices=NEEDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(Path(arguments.folder), arguments.make, arguments.frames)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        simulate(Path(folder), arguments.frames)
        report(folder, arguments.frames, arguments.repeat)


def simulate(folder: Path, n_frames: int) -> None:
    """Write the raw frames."""
    simulation = {
        "camera": "decam",
        "ccds": [CCD],
        "bands": {"r": {"exposures": 1, "zero_point": 26.0, "sky": 21.0}},
        "stars": {"density": 12.0, "brightest": 13.0, "faintest": 24.0},
        "calibration": dict.fromkeys(FIRST, n_frames),
    }
    (folder / "simulation.yaml").write_text(yaml.safe_dump(simulation))
    command = [sys.executable, "-m", "coaddflow", "simulate", "simulation.yaml", "data"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def report(folder: str, n_frames: int, repeat: int) -> None:
    """Print medians over rounds."""
    print(f"{'master':8s} {'CPU s':>6s} {'wall s':>7s} {'of it imports, CPU s':>21s} {'MB':>6s}")
    rows: dict[str, list[list[float]]] = {kind: [] for kind in NEEDS}
    for number in range(repeat + 1):
        for kind in NEEDS:
            options = ["--make", kind, "--folder", folder, "--frames", str(n_frames)]
            command = [sys.executable, __file__, *options]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            if number:
                rows[kind].append(json.loads(said.splitlines()[-1]))
    for kind, of_kind in rows.items():
        cpu, wall, imports, memory = (statistics.median(row) for row in zip(*of_kind, strict=True))
        print(f"{kind:8s} {cpu:6.2f} {wall:7.2f} {imports:21.2f} {memory:6.0f}")


def make(folder: Path, kind: str, n_frames: int) -> None:
    """Make a master as its job does; print what it took."""
    began = time.perf_counter()
    from coaddflow.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    from coaddflow.calib.masters import make_defects, make_master
    from coaddflow.instrument.camera import load_camera
    from coaddflow.settings import Settings

    settings = Settings()
    imports = time.process_time()
    paths = {one: str(folder / f"{one}.fits") for one in NEEDS}
    masters = {one: paths[one] for one in NEEDS[kind]}
    if kind == "defects":
        make_defects(paths[kind], masters, settings)
    else:
        numbers = range(FIRST[kind], FIRST[kind] + n_frames)
        raw = {f"{folder}/data/raw/DECam_{i}.fits.fz": SECONDS[kind] for i in numbers}
        make_master(paths[kind], kind, raw, masters, load_camera("decam"), CCD, settings)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    wall = time.perf_counter() - began
    print(json.dumps([time.process_time(), wall, imports, usage.ru_maxrss / 1024]))


if __name__ == "__main__":
    main()
