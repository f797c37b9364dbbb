"""Simulated tracts, linked and solved."""

from typing import NamedTuple

import numpy as np

from coaddflow.settings.solution import SolutionSettings
from coaddflow.simulate.tract_stars import SimulatedTract
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
