"""Crosstalk of 1e-3 between CCDs: measured, corrected, and what the correction costs.

    python benchmarks/crosstalk.py --exposures 10 --picture docs/images/crosstalk.jpg
    python benchmarks/crosstalk.py --cost

The first simulates exposures of the demo camera whose coefficients between CCDs are made 1e-3
(needs the extra `simulate`), measures all coefficients, measures them once more on the corrected
pixels, and makes a picture of a part of a CCD before and after. The second corrects CCDs of 2048 x
4096 pixels of noise, and measures what the measurement costs.
"""

import argparse
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from scipy import ndimage

from coaddflow.calexp.ccd import begin_detrending, detrend_ccd, finish_detrending
from coaddflow.calib.crosstalk_fit import (
    CrosstalkSums,
    MeasuredCrosstalk,
    MeasurementSettings,
    find_bright_pixels,
    group_sums,
    subtract_sky,
)
from coaddflow.image.masked_image import MaskPlane
from coaddflow.instrument.camera import Camera, camera_file, load_camera
from coaddflow.instrument.raw import read_raw_ccd
from coaddflow.isr.crosstalk import (
    Aggressor,
    AmplifierSignal,
    VictimNoise,
    collect_aggressors,
    subtract_ghosts,
)
from coaddflow.isr.detrend import CcdCalibs, PartlyDetrendedCcd, correct_crosstalk
from coaddflow.settings import Settings

COEFFICIENT = 1e-3
EXPOSURE_TIME = 20.0
SETTINGS = Settings(cosmics={"enabled": False}, interpolation={"planes": []})
SHOWN = 240
"""Side of the part of a CCD in the picture, pixels."""


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exposures", type=int, default=10, help="simulated exposures")
    parser.add_argument("--picture", help="write a picture before and after the correction")
    parser.add_argument("--cost", action="store_true", help="measure time and memory instead")
    arguments = parser.parse_args()
    if arguments.cost:
        print("amplifiers  aggressors each  CPU s  MB beside the pixels")
        for n_amplifiers, n_others in ((2, 0), (2, 16), (4, 16), (16, 0), (16, 16)):
            cost(n_amplifiers, n_others)
        measurement_cost()
        return
    with tempfile.TemporaryDirectory() as folder:
        camera = simulate(Path(folder), arguments.exposures)
        files = sorted((Path(folder) / "data/raw").glob("*.fits*"))
        report(camera, measure(camera, files, corrected=False), measure(camera, files, True))
        if arguments.picture:
            picture(camera, files, Path(arguments.picture))


def simulate(folder: Path, n_exposures: int) -> Camera:
    """Simulate the survey and return its camera."""
    from coaddflow.simulate.settings import SimulationSettings
    from coaddflow.simulate.survey import run_simulation

    content = yaml.safe_load(camera_file("demo").read_text(encoding="utf-8"))
    for link in content["crosstalk"]:
        link["coefficient"] = COEFFICIENT
    path = folder / "camera.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    settings = SimulationSettings.model_validate(
        {
            "camera": str(path),
            "bands": {
                "r": {
                    "exposures": n_exposures,
                    "exposure_time": EXPOSURE_TIME,
                    "zero_point": 25.6,
                    "sky": 22.0,
                }
            },
            "stars": {"density": 20.0, "brightest": 13.0, "faintest": 20.0},
            "calibration": {"bias": 0, "dark": 0, "flat": 0},
        }
    )
    run_simulation(settings, folder / "data")
    return load_camera(path)


def begin(camera: Camera, path: Path) -> dict[int, PartlyDetrendedCcd]:
    """Return all CCDs of an exposure as they are before the correction."""
    return {
        one.id: begin_detrending(read_raw_ccd(path, camera, one), SETTINGS)
        for one in camera.detectors
    }


def aggressors_of(
    camera: Camera, begun: dict[int, PartlyDetrendedCcd]
) -> dict[int, tuple[Aggressor, ...]]:
    """Return the amplifiers of other CCDs that leave ghosts on each CCD of an exposure."""
    signals = {
        (ccd, name): signal
        for ccd, one in begun.items()
        for name, signal in one.signals(camera.crosstalk_aggressors(ccd)).items()
    }
    return {ccd: collect_aggressors(camera.crosstalk_into(ccd), signals) for ccd in begun}


def measure(camera: Camera, files: list[Path], corrected: bool) -> list[MeasuredCrosstalk]:
    """Measure all coefficients, also those that are left after the correction."""
    sums = CrosstalkSums(camera.detectors, MeasurementSettings())
    for path in files:
        begun = begin(camera, path)
        if corrected:
            for ccd, aggressors in aggressors_of(camera, begun).items():
                correct_crosstalk(begun[ccd], aggressors)
        sums.add_exposure(begun.__getitem__)
    return sums.results()


def stated(camera: Camera) -> Iterator[tuple[tuple, float]]:
    """Yield the pairs of amplifiers that have crosstalk, with their coefficients."""
    for one in camera.detectors:
        names = [amplifier.name for amplifier in one.amplifiers]
        for victim, row in zip(names, one.crosstalk or (), strict=False):
            for aggressor, value in zip(names, row, strict=True):
                if value:
                    yield ((one.id, aggressor), (one.id, victim)), value
    for link in camera.crosstalk:
        yield (link.aggressor, link.victim), link.coefficient


def report(camera: Camera, before: list[MeasuredCrosstalk], after: list[MeasuredCrosstalk]) -> None:
    """Print what was measured beside what is true."""
    true = dict(stated(camera))
    left = {(one.aggressor, one.victim): one for one in after}
    print("aggressor victim      true  measured     error   after correction")
    for one in before:
        pair = one.aggressor, one.victim
        if pair in true:
            names = [f"{ccd} {amplifier}" for ccd, amplifier in pair]
            print(
                f"{names[0]:9} {names[1]:6} {true[pair]:9.2e} {one.coefficient:9.2e} "
                f"{one.error:9.1e} {left[pair].coefficient:+9.1e} +- {left[pair].error:.1e}"
            )
    for name, measured, value in (("before", before, true), ("after", after, {})):
        pulls = np.array(
            [
                (one.coefficient - value.get((one.aggressor, one.victim), 0.0)) / one.error
                for one in measured
                if np.isfinite(one.error)
            ]
        )
        print(
            f"{name}: {len(pulls)} pairs of amplifiers differ from the truth by "
            f"{np.sqrt(np.mean(pulls**2)):.2f} errors rms, {np.abs(pulls).max():.1f} at most"
        )


def picture(camera: Camera, files: list[Path], path: Path) -> None:
    """Write the part of a CCD with most ghosts: before, after, and what was subtracted."""
    detrend = SETTINGS.detrend.model_copy(update={"crosstalk": False})
    uncorrected = SETTINGS.model_copy(update={"detrend": detrend})
    largest, panels = -1.0, []
    for file in files:
        begun = begin(camera, file)
        aggressors = aggressors_of(camera, begun)
        for ccd, one in begun.items():
            after = finish_detrending(
                one, CcdCalibs(), EXPOSURE_TIME, SETTINGS, aggressors[ccd]
            ).masked_image
            flagged = after.has_any(MaskPlane.CROSSTALK)
            area = ndimage.uniform_filter(flagged.astype(float), SHOWN, mode="constant")
            if area.max() <= largest:
                continue
            largest = area.max()
            y, x = np.unravel_index(np.argmax(area), area.shape)
            corner = [
                max(0, min(c - SHOWN // 2, n - SHOWN))
                for c, n in zip((y, x), area.shape, strict=True)
            ]
            part = np.s_[corner[0] : corner[0] + SHOWN, corner[1] : corner[1] + SHOWN]
            raw = read_raw_ccd(file, camera, camera.detector(ccd))
            before = detrend_ccd(raw, CcdCalibs(), EXPOSURE_TIME, uncorrected)
            sky, noise = np.median(after.image), np.sqrt(np.median(after.variance))
            images = [before.masked_image.image, after.image]
            panels = [
                (one[part][::-1] - sky) / noise for one in (*images, images[0] - after.image + sky)
            ]
    # smoothed as the eye does from a distance: ghosts are wide, and faint in single pixels
    panels = [ndimage.gaussian_filter(np.nan_to_num(one), 1.5) for one in panels]
    gap = np.full((SHOWN, 4), np.inf)
    grey = np.hstack([panels[0], gap, panels[1], gap, panels[2]])
    grey = np.clip((grey + 0.5) / 3.0, 0.0, 1.0)
    pixels = Image.fromarray((255 * grey).astype(np.uint8))
    size = 2 * pixels.width, 2 * pixels.height
    pixels.resize(size, Image.Resampling.BICUBIC).save(path, quality=70)


def cost(n_amplifiers: int, n_others: int) -> None:
    """Print what the correction of a CCD costs, with all its own amplifiers as aggressors."""
    rng = np.random.default_rng(1)
    shape = (4096, 2048 // n_amplifiers)

    def noise() -> np.ndarray:
        return rng.normal(300.0, 10.0, shape).astype(np.float32)

    counts = [noise()[:, :: 1 - 2 * (i % 2)] for i in range(n_amplifiers)]
    saturated = rng.integers(0, shape[0] * shape[1], 5000)
    others = [(1e-4, AmplifierSignal(noise(), saturated)) for _ in range(n_others)]
    sources = [
        [(1e-4, j) for j in range(n_amplifiers) if j != i] + others for i in range(n_amplifiers)
    ]
    arguments = sources, [VictimNoise(1.5, 5.0)] * n_amplifiers, [saturated] * n_amplifiers, 0.25
    seconds = []
    for _ in range(5):
        begin_time = time.process_time()
        subtract_ghosts(counts, *arguments)
        seconds.append(time.process_time() - begin_time)
    tracemalloc.start()
    subtract_ghosts(counts, *arguments)
    memory = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    n_aggressors = n_amplifiers - 1 + n_others
    print(f"{n_amplifiers:10d} {n_aggressors:16d} {statistics.median(seconds):6.2f} {memory:14.1f}")


def measurement_cost() -> None:
    """Print what the measurement costs, for an amplifier of 1024 x 4096 pixels with 1,500 stars."""
    rng = np.random.default_rng(1)
    counts = rng.normal(1000.0, 20.0, (4096, 1024)).astype(np.float32)
    y, x = np.mgrid[-8:9, -8:9]
    star = np.exp(-0.5 * (x**2 + y**2) / 1.8**2)
    for row, column in zip(rng.integers(8, 4088, 1500), rng.integers(8, 1016, 1500), strict=True):
        peak = np.exp(rng.uniform(5.0, 10.8))
        counts[row - 8 : row + 9, column - 8 : column + 9] += peak * star
    signal = AmplifierSignal(counts, np.empty(0, np.intp))
    settings = MeasurementSettings()
    seconds: dict[str, list[float]] = {"sky of an amplifier": [], "pair of amplifiers": []}
    for _ in range(5):
        begin_time = time.process_time()
        amplifier = subtract_sky(signal)
        bright = find_bright_pixels(amplifier, settings.min_counts, settings.max_groups)
        between = time.process_time()
        for i in range(9):  # the ghosts, and eight places beside them
            group_sums(bright, amplifier, settings.max_coefficient, (i, i))
        seconds["sky of an amplifier"].append(between - begin_time)
        seconds["pair of amplifiers"].append(time.process_time() - between)
    for name, values in seconds.items():
        print(f"measurement, {name}: {statistics.median(values):.3f} CPU s")


if __name__ == "__main__":
    main()
