"""One job for a tract against one job for each warp and coadd: time, CPU, opened files, bytes.

    python benchmarks/tract_job.py [--exposures 8] [--ccds 6] [--patches 3] [--workers 2] [--swarp]

A survey of dithered and turned exposures is made in a temporary folder (each exposure fills the
tract; with ``--ccd-size`` it is a block of CCDs of that size, somewhere on it), and coadded twice:
by `parallel.coadd: patch`, with a Python process for each exposure's warps and for each patch, so
many at a time as there are workers (Snakemake itself, which takes 1 to 2 s of CPU more for each,
is left out); and by `parallel.coadd: tract`, one job with so many workers. The coadds are
compared. Both are done once more under strace, which counts what is opened, read and written.

With ``--swarp`` the job of the tract and SWarp, which makes one image of the tract from the same
files with as many threads, take turns instead; medians are printed, also per pixel that goes in.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from astropy.wcs import WCS
from child_time import cost_of
from traced import count, traced
from warp_coadd_vs_swarp import swarp_command

from coaddflow.coadd.patch import make_coadd
from coaddflow.coadd.tract_job import make_tract_coadds
from coaddflow.corners.build import build_tract_database
from coaddflow.files import sha256_of
from coaddflow.geometry.wcs_header import wcs_to_header
from coaddflow.image.masked_image import MaskedImage, masked_image_hdus, write_fits
from coaddflow.runtime.log import job_log
from coaddflow.runtime.threads import single_threaded
from coaddflow.settings import Settings
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.maps import make_skymap
from coaddflow.skymap.tract import Tract
from coaddflow.tables.manifest import CcdRow, write_manifest
from coaddflow.warp.job import make_warps

SCALE, RA, DEC = 0.2, 150.0, 2.2
BORDER = 100
PARTS = ("calexp", "warp", "spool", "coadd")
SCRIPT = str(Path(__file__).resolve())


def skymap_settings(arguments: argparse.Namespace) -> SkymapSettings:
    """Return a tract of patches x patches patches."""
    side = arguments.patches * arguments.patch_size * SCALE / 3600
    return SkymapSettings(
        kind="tangent",
        pixel_scale=SCALE,
        patch_inner_size=arguments.patch_size,
        patch_border=BORDER,
        tangent={"ra": RA, "dec": DEC, "width": side, "height": side},
    )


def make_survey(tract: Tract, arguments: argparse.Namespace) -> list[str]:
    """Write calexps that fill the tract, manifests and the database; return the exposures."""
    rng = np.random.default_rng(1)
    exposures = [f"e{number:03}" for number in range(arguments.exposures)]
    columns = int(np.ceil(arguments.ccds**0.5))
    lines = -(-arguments.ccds // columns)
    nx, ny = arguments.ccd_size or (-(-tract.width // columns), -(-tract.height // lines))
    size, extent = np.array([tract.width, tract.height]), np.array([columns * nx, lines * ny])
    reach = np.maximum((size - extent) / 2, 60)
    for number, exposure in enumerate(exposures):
        shift, turn = rng.uniform(-reach, reach), np.radians(rng.uniform(-3, 3))
        rows = []
        for ccd in range(arguments.ccds):
            wcs = WCS(naxis=2)
            wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], [RA, DEC]
            matrix = [[-np.cos(turn), np.sin(turn)], [np.sin(turn), np.cos(turn)]]
            wcs.wcs.cd = np.array(matrix) * SCALE / 3600
            place = np.array([ccd % columns * nx, ccd // columns * ny])
            wcs.wcs.crpix = extent / 2 + shift - place
            wcs.pixel_shape = (nx, ny)
            rows.append(write_ccd(exposure, ccd, wcs, rng))
        write_manifest(f"summary/{exposure}.ecsv", rows)
        print(f"made exposure {number + 1} of {len(exposures)}", file=sys.stderr)
    manifests = [f"summary/{exposure}.ecsv" for exposure in exposures]
    build_tract_database("corners.sqlite", manifests, tract)
    return exposures


def write_ccd(exposure: str, ccd: int, wcs: WCS, rng: np.random.Generator) -> CcdRow:
    """Write a calexp of noise with some cosmic rays."""
    nx, ny = wcs.pixel_shape
    image = rng.normal(0.0, 5.0, (ny, nx)).astype(np.float32)
    image[rng.random(image.shape, np.float32) < 1e-4] += 500.0
    pixels = MaskedImage(image, np.full((ny, nx), 25.0), np.zeros((ny, nx), np.int32))
    path = f"calexp/{exposure}/{ccd}.fits"
    write_fits(path, masked_image_hdus(pixels, wcs_to_header(wcs), "electron"))
    outline = wcs.calc_footprint()
    return CcdRow(
        exposure=exposure,
        ccd=ccd,
        band="r",
        mjd=60000.0,
        exposure_time=30.0,
        state="done",
        path=path,
        nx=nx,
        ny=ny,
        footprint_ra=outline[:, 0].tolist(),
        footprint_dec=outline[:, 1].tolist(),
        zero_point=31.0,
        sky_noise=5.0,
        seeing=0.8,
    )


def do_step(step: list[str], arguments: argparse.Namespace) -> None:
    """Do one job, in a process of its own."""
    kind, *what = step
    settings = Settings(parallel={"coadd": "tract", "backend": "processes"})
    skymap = skymap_settings(arguments)
    tract = make_skymap(skymap).tract(0)
    with job_log(f"logs/{'-'.join(step)}.log"):
        if kind == "warp":
            make_warps(f"warp/{what[0]}.ecsv", f"summary/{what[0]}.ecsv", tract, settings)
        elif kind == "coadd":
            tables = sorted(Path("warp").glob("*.ecsv"))
            path = f"coadd/r/0/{what[0]}.fits"
            make_coadd(path, "corners.sqlite", tables, tract, "r", what[0], settings)
        else:
            make_tract_coadds(
                "coadd/r/0.ecsv",
                "corners.sqlite",
                skymap.model_dump(mode="json"),
                0,
                "r",
                tract.patch_ids(),
                settings,
                workers=arguments.workers,
            )


def run_steps(
    steps: list[list[str]], arguments: argparse.Namespace, workers: int, trace: str | None = None
) -> None:
    """Run jobs, so many at a time."""
    # as for the scripts of the workflow, before they load a numerical library
    environment = single_threaded({**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    names = ("patches", "patch_size", "workers")
    options = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in names]

    def run(step: list[str]) -> None:
        command = [sys.executable, SCRIPT, *options, "--step", *step]
        if trace:
            command = traced(command, f"{trace}.{'-'.join(step)}")
        subprocess.run(command, check=True, env=environment)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, steps))


def part_of(path: str, folder: str) -> str | None:
    """Return which part of the products a file belongs to."""
    if "coaddflow-spool" in path:
        return "spool"
    if path.startswith("/") and not path.startswith(folder):
        return None
    return next((part for part in PARTS if f"{part}/" in path.removeprefix(folder)), None)


def measure(mode: str, rounds: list[list[list[str]]], arguments: argparse.Namespace) -> str:
    """Run all jobs of a mode twice, timed and counted; return a line of the table."""
    folder = str(Path.cwd())

    def work() -> None:
        for steps in rounds:
            run_steps(steps, arguments, arguments.workers)

    cost = cost_of(work)
    line = f"| `{mode}` | {cost.wall:.1f} | {cost.cpu:.1f} |"
    if mode == "tract":
        told = Path("logs/tract.log").read_text().splitlines()
        print(*(text for text in told if "idle" in text or "room" in text), sep="\n")
    if arguments.no_trace:
        return line
    for steps in rounds:
        run_steps(steps, arguments, arguments.workers, f"{folder}/trace")
    seen = count(f"{folder}/trace", lambda path: part_of(path, folder))
    for part in PARTS:
        numbers = (seen["read"][part] / 1e6, seen["written"][part] / 1e6)
        line += f" {seen['opened'][part]} / {numbers[0]:.0f} / {numbers[1]:.0f} |"
    return line


def megapixels(files: list[Path]) -> float:
    """Return the pixels of calexps, in millions."""
    return sum(file.stat().st_size for file in files) / 12e6


def compile_ahead() -> None:
    """Compile all functions, so that no job does when it is measured."""
    command = [sys.executable, "-m", "coaddflow", "compile"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def against_swarp(tract: Tract, arguments: argparse.Namespace) -> None:
    """Let the job of the tract and SWarp take turns; print medians."""
    files = sorted(Path("calexp").glob("*/*.fits"))
    n_pixels = megapixels(files)
    command = swarp_command(tract, files, Path("swarp"), arguments.workers)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ways = {
        "coaddflow": lambda: run_steps([["tract"]], arguments, 1),
        "SWarp": lambda: subprocess.run(command, check=True, env=environment),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(arguments.runs):
        for name, way in ways.items():
            cost = cost_of(way)
            times[name].append((cost.wall, cost.cpu))
    medians = {n: [statistics.median(v) for v in zip(*t, strict=True)] for n, t in times.items()}
    print(f"{n_pixels:.0f} Mpixel, {arguments.workers} workers, medians of {arguments.runs} runs")
    print("| | wall, s | CPU, s | CPU, ms a Mpixel |\n|---|---|---|---|")
    for name, (wall, cpu) in medians.items():
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {1e3 * cpu / n_pixels:.0f} |")
    wall, cpu = (medians["SWarp"][k] / medians["coaddflow"][k] for k in (0, 1))
    print(f"SWarp takes {wall:.1f} times the wall time, {cpu:.1f} times the CPU time")


def main() -> None:
    """Make the survey, measure both modes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exposures", type=int, default=8)
    parser.add_argument("--ccds", type=int, default=6, help="of each exposure")
    parser.add_argument("--patches", type=int, default=3, help="along each side of the tract")
    parser.add_argument("--patch-size", type=int, default=1000, help="pixels")
    parser.add_argument("--ccd-size", type=int, nargs=2, metavar=("NX", "NY"), help="pixels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-trace", action="store_true", help="do not count with strace")
    parser.add_argument("--swarp", action="store_true", help="compare with SWarp")
    parser.add_argument("--runs", type=int, default=3, help="with --swarp")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        do_step(arguments.step, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tract = make_skymap(skymap_settings(arguments)).tract(0)
        exposures = make_survey(tract, arguments)
        compile_ahead()
        if arguments.swarp:
            against_swarp(tract, arguments)
            os.chdir(Path(SCRIPT).parent)
            return
        warps = [["warp", exposure] for exposure in exposures]
        coadds = [["coadd", patch] for patch in tract.patch_ids()]
        by_patch = measure("patch", [warps, coadds], arguments)
        expected = {path.name: sha256_of(path) for path in Path("coadd/r/0").glob("*.fits")}
        shutil.rmtree("coadd")
        as_one = measure("tract", [[["tract"]]], arguments)
        found = {path.name: sha256_of(path) for path in Path("coadd/r/0").glob("*.fits")}
        if found != expected:
            sys.exit("the coadds differ")
        print(
            "| | wall, s | CPU, s |",
            *(f" {part}: opens / MB read / MB written |" for part in PARTS),
        )
        print("|---" * (3 + len(PARTS)) + "|")
        print(by_patch, as_one, sep="\n")
        os.chdir(Path(SCRIPT).parent)


if __name__ == "__main__":
    main()
