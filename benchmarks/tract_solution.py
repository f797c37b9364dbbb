"""The solution of a tract on simulated catalogues: time, memory, and how well it repeats.

    python benchmarks/tract_solution.py --exposures 500 --grid 13 8 --turbulence 7
    python benchmarks/tract_solution.py --exposures 30 --grid 5 4 --clouds 0.3 --structure 0.005

Simulates the stars of all exposures (`simulate.tract_stars`), links them, and solves astrometry and
photometry with default settings; a tenth of the stars is withheld. It prints CPU time and peak
memory of each step; AM1 (LPM-17: median over pairs 5 arcmin apart of the rms of their distance
between exposures) of stars with a signal-to-noise ratio above 200, used and withheld, beside what
it would be with perfect maps and without atmosphere; and the scatter of magnitudes of withheld
stars beyond their photon noise.
"""

import argparse
import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from coaddflow.qa.repeatability import distance_repeatability
from coaddflow.settings.solution import SolutionSettings
from coaddflow.simulate.tract_stars import SimulatedTract, TractSimulation, simulate_tract
from coaddflow.solution.astrometry import solve_astrometry
from coaddflow.solution.detections import MAS, Detections
from coaddflow.solution.linking import Links, link_detections
from coaddflow.solution.photometry import solve_photometry
from coaddflow.solution.positions import TractAstrometry

AM1_DISTANCE, AM1_WIDTH = 5.0 / 60.0, 1.0 / 60.0
BRIGHT = 1.0857 / 200.0
SETTINGS = SolutionSettings()


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.ERROR)
    with measured("simulated"):
        simulated = simulate_tract(simulation_of(arguments))
    with measured("linked"):
        links = link_detections(
            *(simulated.detections, simulated.exposures, simulated.references, simulated.frame),
            SETTINGS.linking,
        )
        detections = simulated.detections.take(links.rows)
    print(f"{len(detections)} detections of {len(links)} stars", flush=True)
    true = np.zeros(len(links), int)
    true[links.star] = simulated.star[links.rows]
    withheld = np.random.default_rng(0).random(len(links)) < 0.1
    if "astrometry" in arguments.solve:
        turbulence = SETTINGS.turbulence.model_copy(update={"enabled": arguments.turbulence > 0})
        with measured("astrometry"):
            solution = solve_astrometry(
                *(detections, links, simulated.exposures, simulated.references),
                *(simulated.color[true], simulated.maps, simulated.frame),
                *(SETTINGS.astrometry, turbulence, withheld),
            )
        for name, chosen in (("used", ~withheld), ("withheld", withheld)):
            print_am1(name, simulated, links, detections, solution, true, chosen)
    if "photometry" in arguments.solve:
        clouds = SETTINGS.clouds.model_copy(update={"enabled": arguments.structure > 0})
        with measured("photometry"):
            photometry = solve_photometry(
                *(detections, links, simulated.exposures, simulated.references),
                *(simulated.color[true], simulated.maps, SETTINGS.photometry, clouds),
            )
        excess = " ".join(f"{1000.0 * value:.2f}" for value in photometry.withheld_excess)
        print(f"withheld stars, scatter beyond photons: {excess} mmag", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exposures", type=int, default=30)
    parser.add_argument("--grid", type=int, nargs=2, default=[5, 4], help="CCDs in x and y")
    parser.add_argument("--stars", type=float, default=100.0, help="stars on a CCD")
    parser.add_argument("--bands", nargs="+", default=["g", "r"])
    parser.add_argument("--epochs", type=int, default=2, help="epochs of the instrument")
    parser.add_argument("--dither", type=float, default=0.25, help="rms of pointings, degrees")
    parser.add_argument("--turbulence", type=float, default=0.0, help="rms of one axis, mas")
    parser.add_argument("--clouds", type=float, default=0.0, help="largest extinction, mag")
    parser.add_argument("--structure", type=float, default=0.0, help="rms of the clouds, mag")
    parser.add_argument("--illumination", type=float, default=0.02, help="error of the flat, mag")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--am1-exposures", type=int, default=100, help="exposures for AM1")
    parser.add_argument("--solve", nargs="+", default=["astrometry", "photometry"], metavar="PART")
    parser.add_argument("--verbose", action="store_true", help="print every iteration")
    return parser.parse_args()


def simulation_of(arguments: argparse.Namespace) -> TractSimulation:
    """Return what is simulated."""
    return TractSimulation(
        seed=arguments.seed,
        n_exposures=arguments.exposures,
        grid=tuple(arguments.grid),
        stars_per_ccd=arguments.stars,
        bands=tuple(arguments.bands),
        n_epochs=arguments.epochs,
        dither_deg=arguments.dither,
        turbulence_mas=arguments.turbulence,
        dispersion_mas=5.0,
        cloud_mag=arguments.clouds,
        structure_mag=arguments.structure,
        illumination_mag=arguments.illumination,
        outliers=0.005,
    )


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Print CPU time of the block, and the peak memory so far."""
    start = time.process_time()
    yield
    used = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0
    print(f"{what}: {used:.1f} CPU s, peak {peak:.0f} MB", flush=True)


def print_am1(
    name: str,
    simulated: SimulatedTract,
    links: Links,
    detections: Detections,
    solution: TractAstrometry,
    true: NDArray,
    chosen: NDArray[np.bool_],
) -> None:
    """Print AM1 of some of the stars, and what it would be with perfect maps."""
    found, photons = [], []
    rng = np.random.default_rng(1)
    bright = (detections.magnitude_error < BRIGHT) & chosen[links.star]
    bright &= ~simulated.is_outlier[links.rows]
    n = min(len(simulated.exposures), _arguments().am1_exposures)
    stars = np.unique(links.star[bright & (detections.exposure < n)])
    column = np.zeros(len(links), int)
    column[stars] = np.arange(len(stars))
    for number in range(n):
        rows = np.flatnonzero((detections.exposure == number) & bright)
        star = links.star[rows]
        errors = position_errors(number, rows, simulated, links, detections, solution, true)
        noise = detections.error[rows] * simulated.maps.pixel_scale.mean()
        there = np.stack([simulated.longitude, simulated.latitude], axis=1)[true[star]]
        for places, moved in (
            (found, errors),
            (photons, rng.normal(size=errors.shape) * noise[:, None]),
        ):
            place = np.full((2, len(stars)), np.nan)
            place[:, column[star]] = (there + moved).T
            places.append(place)
    am1 = [
        distance_repeatability(*np.moveaxis(np.array(places), 1, 0), AM1_DISTANCE, AM1_WIDTH)
        for places in (found, photons)
    ]
    print(
        f"AM1 of stars {name}: {am1[0].value:.2f} mas ({am1[0].n} pairs), photons alone "
        f"{am1[1].value:.2f} mas",
        flush=True,
    )


def position_errors(
    number: int,
    rows: NDArray,
    simulated: SimulatedTract,
    links: Links,
    detections: Detections,
    solution: TractAstrometry,
    true: NDArray,
) -> NDArray[np.float64]:
    """Return solved minus true positions of detections of an exposure, degrees, (n, 2)."""
    of_exposure, star = solution.of_exposure(number), true[links.star[rows]]
    place = np.zeros((len(rows), 2))
    for ccd in np.unique(detections.ccd[rows]):
        one = detections.ccd[rows] == ccd
        sky = of_exposure.to_sky(
            *(int(simulated.maps.ccd[ccd]), detections.x[rows[one]], detections.y[rows[one]]),
            simulated.color[star[one]] - solution.median_color,
        )
        place[one] = np.stack(simulated.frame.of_sky(*sky), axis=1)
    years, factors = (values[number] for values in solution.times)
    moved = simulated.motion[star] * years + simulated.parallax[star][:, None] * factors
    moved[:, 0] /= np.cos(np.radians(simulated.latitude[star]))
    there = np.stack([simulated.longitude, simulated.latitude], axis=1)[star]
    return place - there - moved / MAS


if __name__ == "__main__":
    main()
