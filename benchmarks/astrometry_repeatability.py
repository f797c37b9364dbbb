"""How well positions repeat between exposures: each CCD solved by itself, and whole exposures.

    python benchmarks/astrometry_repeatability.py --exposures 5 --stars 8 20 60 --turbulence 10

Simulates dithered exposures of one field as lists of stars, without pixels. All exposures have the
same CCDs, which stand and turn a bit differently from what the camera file says, and a distortion
that the camera file does not know; each has its own pointing, rotation, scale and distortion. The
stars of the catalogue are measured with noise. The atmosphere moves all stars by a smooth random
field of its own in each exposure (DECam: 10 to 30 mas in 30 s, coherent over 5 to 10 arcmin;
Bernstein et al. 2017, PASP 129, 074503). Then other stars, whose pixel positions are exact,
are put to the sky by both kinds of WCS: what scatters is the WCS, and the atmosphere that it does
not follow.

For each number of catalogue stars on a CCD it prints, for CCDs by themselves / whole exposures:
CCDs without a solution; the scatter of a star's position between exposures (one axis, median over
stars); AM1, the scatter of the distance of two stars 5 arcmin apart (median over pairs); both in
milliarcseconds; and the CPU time of an exposure.
"""

import argparse
import logging
import time
from collections.abc import Callable

import numpy as np
from astropy.table import Table
from scipy.spatial import cKDTree

from coaddflow.astrometry.ccd import AstrometrySolution, CcdStars, solve_ccd
from coaddflow.astrometry.prediction import predicted_wcs
from coaddflow.astrometry.refcat import ccd_cone, exposure_cone, stars_in_cone
from coaddflow.errors import CcdFailure
from coaddflow.exposure.astrometry import solve_exposure
from coaddflow.geometry import sphere
from coaddflow.geometry.wcs import pixel_to_sky
from coaddflow.instrument.camera import Camera, load_camera
from coaddflow.settings.astrometry import AstrometrySettings
from coaddflow.settings.exposure_astrometry import ExposureAstrometrySettings

SETTINGS = AstrometrySettings(max_pointing_error=5.0)
FIELD = ExposureAstrometrySettings(enabled=True)
CENTRE = (150.0, 2.0)
TEST_STARS_PER_CCD = 20
AM1_DISTANCE, AM1_WIDTH = 5.0 / 60.0, 1.0 / 60.0


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--camera", default="decam", help="name or file of the camera")
    parser.add_argument("--exposures", type=int, default=5, help="number of exposures")
    parser.add_argument(
        "--stars", type=int, nargs="+", default=[8, 20, 60], help="catalogue stars on a CCD"
    )
    parser.add_argument("--noise", type=float, default=0.05, help="centroid noise, pixels")
    parser.add_argument(
        "--turbulence", type=float, default=0.0, help="rms motion by the atmosphere, one axis, mas"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    camera = load_camera(arguments.camera)
    print("stars  no solution  scatter (mas)      AM1 (mas)   CPU s per exposure")
    for n_stars in arguments.stars:
        alone, together = compare(camera, n_stars, arguments)
        cells = [f"{a:.3g} / {b:.3g}" for a, b in zip(alone, together, strict=True)]
        print(f"{n_stars:5d}" + "".join(f"{cell:>15s}" for cell in cells), flush=True)


def compare(camera: Camera, n_stars: int, arguments: argparse.Namespace) -> list[tuple]:
    """Return (CCDs without solution, scatter, AM1, CPU time) of both kinds of solution."""
    n_exposures = arguments.exposures
    rng = np.random.default_rng(1)
    truth = misplaced(camera, rng)
    catalogue, test = (
        field_stars(camera, n_stars, rng),
        field_stars(camera, TEST_STARS_PER_CCD, rng),
    )
    places = [[], []]
    failed, seconds = [0, 0], [0.0, 0.0]
    for _ in range(n_exposures):
        taken, pointing, header = observe(truth, rng)
        air = turbulence(rng, arguments.turbulence)
        stars = measure(taken, pointing, air(catalogue), arguments.noise, rng)
        for kind, solve in enumerate((solve_alone, solve_together)):
            start = time.process_time()
            solutions = solve(stars, camera, header, catalogue)
            seconds[kind] += time.process_time() - start
            failed[kind] += len(stars) - len(solutions)
            places[kind].append(positions(solutions, taken, pointing, air(test)))
    scatters = repeatability(np.array(places), test)
    return [(failed[kind], *scatters[kind], seconds[kind] / n_exposures) for kind in range(2)]


def misplaced(camera: Camera, rng: np.random.Generator) -> Camera:
    """Return the camera as built: CCDs off by a pixel, turned, and another distortion."""
    content = camera.model_dump()
    for detector in content["detectors"]:
        step = rng.normal(0.0, 1.0, 2) * camera.pixel_size
        detector["center"] = tuple(np.array(detector["center"]) + step)
        detector["rotation"] += float(np.degrees(rng.normal(0.0, 0.3) / max(detector["size"]) * 2))
    first, *others = camera.distortion or (0.0,)
    content["distortion"] = (first + 2e-4, *others)
    return Camera.model_validate(content)


def field_stars(camera: Camera, per_ccd: float, rng: np.random.Generator) -> Table:
    """Return random stars all over the field and around it."""
    *_, radius = exposure_cone(camera, camera.detectors, *CENTRE, 0.0, 0.2)
    nx, ny = camera.detectors[0].size
    n = int(per_ccd * np.pi * radius**2 / (nx * ny * (camera.pixel_scale / 3600.0) ** 2))
    r, angle = radius * np.sqrt(rng.random(n)), 2.0 * np.pi * rng.random(n)
    ra, dec = sphere.tan_deproject(r * np.cos(angle), r * np.sin(angle), *CENTRE)
    return Table({"ra": ra, "dec": dec, "mag": rng.uniform(15.0, 20.0, n)})


def observe(truth: Camera, rng: np.random.Generator) -> tuple[Camera, tuple, tuple]:
    """Return the camera of one exposure, where it points, and what its header says."""
    first, *others = truth.distortion
    taken = truth.model_copy(
        update={
            "pixel_scale": truth.pixel_scale * (1.0 + rng.normal(0.0, 5e-5)),
            "distortion": (first + rng.normal(0.0, 2e-5), *others),
        }
    )
    pointing = (*sphere.tan_deproject(*rng.normal(0.0, 0.03, 2), *CENTRE), rng.normal(0.0, 0.5))
    error = rng.normal(0.0, 10.0 / 3600.0, 2)
    header = (*sphere.tan_deproject(*error, *pointing[:2]), pointing[2] + rng.normal(0.0, 0.1))
    return taken, tuple(map(float, pointing)), tuple(map(float, header))


def turbulence(rng: np.random.Generator, rms: float) -> Callable[[Table], Table]:
    """Return a function that moves stars as the atmosphere of one exposure does.

    The gradient of a random potential with wavelengths of 8 to 60 arcmin, in which long ones are
    the stronger; ``rms`` in mas.
    """
    if rms == 0.0:
        return lambda stars: stars
    n = 100
    wavelength = np.exp(rng.uniform(*np.log([8.0, 60.0]), n)) / 60.0
    angle, phase = rng.uniform(0.0, 2.0 * np.pi, (2, n))
    direction = np.stack([np.cos(angle), np.sin(angle)])
    strength = rng.normal(size=n) * wavelength ** (5.0 / 6.0)
    strength *= rms / 3.6e6 / np.sqrt(np.sum(strength**2) / 4.0)

    def move(stars: Table) -> Table:
        plane = np.stack(sphere.tan_project(stars["ra"], stars["dec"], *CENTRE))
        wave = np.sin(2.0 * np.pi * (plane.T @ direction) / wavelength + phase)
        moved = Table(stars, copy=True)
        sky = sphere.tan_deproject(*(plane + direction @ (wave * strength).T), *CENTRE)
        moved["ra"], moved["dec"] = sky
        return moved

    return move


def on_ccds(taken: Camera, pointing: tuple, stars: Table):
    """Yield each CCD with the rows of its stars and their pixels."""
    for detector in taken.detectors:
        nx, ny = detector.size
        x, y = taken.sky_to_pixel(detector, stars["ra"], stars["dec"], *pointing)
        here = np.flatnonzero((x > 0) & (x < nx - 1) & (y > 0) & (y < ny - 1))
        yield detector, here, x[here], y[here]


def measure(
    taken: Camera, pointing: tuple, catalogue: Table, noise: float, rng: np.random.Generator
) -> dict[int, CcdStars]:
    """Return the measured stars of each CCD."""
    stars = {}
    for detector, rows, x, y in on_ccds(taken, pointing, catalogue):
        measured = np.stack([x, y]) + rng.normal(0.0, noise, (2, x.size))
        flux = 10.0 ** (-0.4 * np.asarray(catalogue["mag"][rows]))
        stars[detector.id] = CcdStars(*measured, flux, np.full(x.size, noise), detector.shape)
    return stars


def solve_alone(
    stars: dict[int, CcdStars], camera: Camera, header: tuple, catalogue: Table
) -> dict[int, AstrometrySolution]:
    """Solve each CCD by itself."""
    solutions = {}
    for ccd, measured in stars.items():
        detector = camera.detector(ccd)
        cone = ccd_cone(camera, detector, *header, SETTINGS.max_pointing_error / 60.0)
        try:
            solutions[ccd] = solve_ccd(
                measured,
                catalogue[stars_in_cone(catalogue, *cone)],
                predicted_wcs(camera, detector, *header),
                SETTINGS,
            )
        except CcdFailure:
            continue
    return solutions


def solve_together(
    stars: dict[int, CcdStars], camera: Camera, header: tuple, catalogue: Table
) -> dict[int, AstrometrySolution]:
    """Solve the exposure as a whole."""
    return solve_exposure(stars, camera, *header, catalogue, SETTINGS, FIELD).solutions


def positions(
    solutions: dict[int, AstrometrySolution], taken: Camera, pointing: tuple, test: Table
) -> np.ndarray:
    """Return the plane coordinates in degrees of the test stars, (2, n), NaN where none are."""
    places = np.full((2, len(test)), np.nan)
    for detector, rows, x, y in on_ccds(taken, pointing, test):
        if detector.id in solutions:
            sky = pixel_to_sky(solutions[detector.id].wcs, x, y)
            places[:, rows] = sphere.tan_project(*sky, *CENTRE)
    return places


def repeatability(places: np.ndarray, test: Table) -> list[tuple[float, float]]:
    """Return the scatter of positions and of distances in mas, of places (2, exposures, 2, n).

    Both kinds of solution are compared on the same stars and pairs: those that all exposures have.
    """
    whole = np.isfinite(places).all(axis=(0, 1, 2))
    places = places[..., whole]
    plane = np.stack(sphere.tan_project(test["ra"], test["dec"], *CENTRE))[:, whole]
    pairs = cKDTree(plane.T).query_pairs(AM1_DISTANCE + AM1_WIDTH, output_type="ndarray").T
    far = np.hypot(*(plane[:, pairs[0]] - plane[:, pairs[1]])) > AM1_DISTANCE - AM1_WIDTH
    i, j = pairs[:, far]
    result = []
    for kind in places:
        scatter = np.median(np.std(kind, axis=0, ddof=1))
        distance = np.hypot(*np.moveaxis(kind[..., i] - kind[..., j], 1, 0))
        result.append(tuple(s * 3.6e6 for s in (scatter, np.median(distance.std(axis=0, ddof=1)))))
    return result


if __name__ == "__main__":
    main()
