"""A small tract with everything that the solution models, and its solution."""

from typing import NamedTuple

import numpy as np
import pytest

from coaddflow.settings.solution import SolutionSettings
from coaddflow.simulate.tract_stars import SimulatedTract, TractSimulation, simulate_tract
from coaddflow.solution.astrometry import solve_astrometry
from coaddflow.solution.detections import Detections
from coaddflow.solution.linking import Links, link_detections
from coaddflow.solution.positions import TractAstrometry

SETTINGS = SolutionSettings()


class Solved(NamedTuple):
    """A simulated tract and its astrometric solution."""

    simulated: SimulatedTract
    links: Links
    detections: Detections
    color: np.ndarray
    """Of the linked stars."""
    true: np.ndarray
    """True star of each linked star."""
    solution: TractAstrometry | None


def link(simulated):
    """Return the simulated tract with its links; its stars get their true colours."""
    links = link_detections(
        *(simulated.detections, simulated.exposures, simulated.references, simulated.frame),
        SETTINGS.linking,
    )
    true = np.zeros(len(links), int)
    true[links.star] = simulated.star[links.rows]
    detections = simulated.detections.take(links.rows)
    return Solved(simulated, links, detections, simulated.color[true], true, None)


def solve(linked, turbulence=False, withheld=None, **changes):
    """Return the tract with its astrometric solution."""
    simulated = linked.simulated
    solution = solve_astrometry(
        *(linked.detections, linked.links, simulated.exposures, simulated.references),
        *(linked.color, simulated.maps, simulated.frame),
        SETTINGS.astrometry.model_copy(update=changes),
        SETTINGS.turbulence.model_copy(update={"enabled": turbulence}),
        withheld,
    )
    return linked._replace(solution=solution)


@pytest.fixture(scope="session")
def tract():
    """12 exposures of a mosaic of 12 CCDs near RA 0, in two epochs and two bands; no turbulence."""
    simulation = TractSimulation(n_exposures=12, dispersion_mas=20.0, outliers=0.01)
    return solve(link(simulate_tract(simulation)))


@pytest.fixture(scope="session")
def turbulent_tract():
    """The same under 7 mas of turbulence, linked but not solved."""
    return link(simulate_tract(TractSimulation(n_exposures=12, turbulence_mas=7.0)))


@pytest.fixture(scope="session")
def cloudy_tract():
    """The same under clouds and with an illumination error, linked but not solved."""
    simulation = TractSimulation(
        *(1, 16), cloud_mag=0.3, structure_mag=0.004, illumination_mag=0.02, outliers=0.005
    )
    return link(simulate_tract(simulation))
