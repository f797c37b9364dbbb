"""The sky of a simulated survey: stars, galaxies, and the reference catalogue made of them.

The sky is made in cells of 0.1 degree, each with its own random numbers, so that a part of a
survey can be made without the rest and is the same as in the whole.

References
----------
.. [1] Sersic 1968, Atlas de Galaxias Australes; Graham & Driver 2005, PASA 22, 118.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray

from coaddflow.geometry import sphere
from coaddflow.simulate.settings import GalaxiesSimulation, SimulationSettings, StarsSimulation
from coaddflow.simulate.streams import stream

FloatArray = NDArray[np.float64]

CELL = 0.1
"""Height of a cell, degrees; its width in right ascension is about the same on the sky."""

_SERSIC = np.array([1.0, 1.5, 2.5, 4.0])
_SERSIC_SHARE = np.array([0.5, 0.25, 0.1, 0.15])
_SOURCES_PER_CELL = 1_000_000
_MJD_J2000 = 51544.5


@dataclass(frozen=True)
class SkyCatalogue:
    """Sources on the sky; all arrays have the shape (n,)."""

    id: NDArray[np.int64]
    """Unique in the survey."""
    ra: FloatArray
    dec: FloatArray
    """ICRS positions at `epoch` of the reference catalogue, degrees."""
    magnitude: FloatArray
    color: FloatArray
    """AB magnitude in bands whose colour coefficient is 0, and colour."""
    radius: FloatArray
    """Half-light radius of the major axis, arcsec; 0 for stars."""
    sersic: FloatArray
    axis_ratio: FloatArray
    angle: FloatArray
    """Sersic index, minor over major axis, position angle of the major axis (degrees)."""
    pm_ra: FloatArray
    pm_dec: FloatArray
    """Proper motion, mas per year, in right ascension times cos(dec)."""

    def __len__(self) -> int:
        return len(self.id)

    @property
    def is_star(self) -> NDArray[np.bool_]:
        """Which sources are stars."""
        return self.radius == 0

    def select(self, which: NDArray) -> "SkyCatalogue":
        """Return some of the sources, by index or boolean array."""
        return SkyCatalogue(*(values[which] for values in self._columns()))

    def band_magnitude(self, settings: SimulationSettings, band: str) -> FloatArray:
        """Return AB magnitudes in a band."""
        return self.magnitude + settings.bands[band].color * self.color

    def position_at(self, mjd: float, epoch: float) -> tuple[FloatArray, FloatArray]:
        """Return positions (ra, dec) at a time, from those at an epoch (Julian year)."""
        years = 2000.0 + (mjd - _MJD_J2000) / 365.25 - epoch
        dec = self.dec + self.pm_dec * years / 3.6e6
        return (self.ra + self.pm_ra * years / 3.6e6 / np.cos(np.radians(self.dec))) % 360.0, dec

    def _columns(self) -> list[NDArray]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def join(parts: Sequence[SkyCatalogue]) -> SkyCatalogue:
    """Return several catalogues as one."""
    columns = zip(*(part._columns() for part in parts), strict=True)
    return SkyCatalogue(*(np.concatenate(column) for column in columns))


def sky_around(settings: SimulationSettings, ra: float, dec: float, radius: float) -> SkyCatalogue:
    """Return all sources within a radius, and some beyond, to the ends of their cells; degrees."""
    cells = _cells_around(ra, dec, radius)
    return join([*(_cell(settings, *cell) for cell in cells), _extra_sources(settings)])


def _cells_around(ra: float, dec: float, radius: float) -> list[tuple[int, int]]:
    """Return the cells (band of declination, number in it) that come near a position."""
    cells: list[tuple[int, int]] = []
    # half the diagonal of a cell
    reach = radius + 0.75 * CELL
    low, high = (int((d + 90) // CELL) for d in (dec - reach, dec + reach))
    for i in range(max(low, 0), min(high, round(180 / CELL) - 1) + 1):
        n = _cells_in_band(i)
        ra_cells = (np.arange(n) + 0.5) * 360.0 / n
        near = sphere.separation(ra_cells, (i + 0.5) * CELL - 90, ra, dec) <= reach
        cells += [(i, int(j)) for j in np.flatnonzero(near)]
    return cells


def _cells_in_band(i: int) -> int:
    return max(1, round(360.0 / CELL * np.cos(np.radians((i + 0.5) * CELL - 90.0))))


def _cell(settings: SimulationSettings, i: int, j: int) -> SkyCatalogue:
    stars = _stars(settings.stars, i, j, stream(settings.seed, "stars", i, j))
    galaxies = _galaxies(settings.galaxies, i, j, stream(settings.seed, "galaxies", i, j))
    cell = join([stars, galaxies])
    first = (1 + i * 10_000 + j) * _SOURCES_PER_CELL
    return dataclasses.replace(cell, id=first + np.arange(len(cell)))


def _scatter(
    density: float, i: int, j: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Return positions of as many sources as the density (per square arcminute) gives a cell."""
    low, high = np.sin(np.radians([i * CELL - 90.0, (i + 1) * CELL - 90.0]))
    width = 360.0 / _cells_in_band(i)
    area = np.radians(width) * (high - low) * (180 * 60 / np.pi) ** 2
    n = rng.poisson(density * area)
    dec = np.degrees(np.arcsin(rng.uniform(low, high, n)))
    return (j + rng.uniform(size=n)) * width, dec


def _power_law(
    rng: np.random.Generator, n: int, brightest: float, faintest: float, slope: float
) -> FloatArray:
    """Return magnitudes with N(< m) proportional to 10^(slope m)."""
    low, high = 10.0 ** (slope * (brightest - faintest)), 1.0
    return faintest + np.log10(rng.uniform(low, high, n)) / slope


def _sources(
    settings: StarsSimulation | GalaxiesSimulation, i: int, j: int, rng: np.random.Generator
) -> SkyCatalogue:
    """Return points at rest, with the positions, magnitudes and colours of a kind of source."""
    ra, dec = _scatter(settings.density, i, j, rng)
    n = len(ra)
    magnitude = _power_law(rng, n, settings.brightest, settings.faintest, settings.slope)
    color = rng.normal(settings.color, settings.color_scatter, n)
    zeros, ones = np.zeros(n), np.ones(n)
    no_ids = np.zeros(n, dtype=np.int64)
    return SkyCatalogue(
        no_ids, ra, dec, magnitude, color, zeros, ones, ones, angle=zeros, pm_ra=zeros, pm_dec=zeros
    )


def _stars(settings: StarsSimulation, i: int, j: int, rng: np.random.Generator) -> SkyCatalogue:
    stars = _sources(settings, i, j, rng)
    pm_ra, pm_dec = (settings.proper_motion * rng.normal(size=len(stars)) for _ in range(2))
    return dataclasses.replace(stars, pm_ra=pm_ra, pm_dec=pm_dec)


def _galaxies(
    settings: GalaxiesSimulation, i: int, j: int, rng: np.random.Generator
) -> SkyCatalogue:
    galaxies = _sources(settings, i, j, rng)
    n = len(galaxies)
    size = settings.size * 10.0 ** (settings.size_slope * (galaxies.magnitude - 22.0))
    return dataclasses.replace(
        galaxies,
        radius=np.clip(size * np.exp(settings.size_scatter * rng.normal(size=n)), 0.05, 60.0),
        sersic=rng.choice(_SERSIC, n, p=_SERSIC_SHARE),
        axis_ratio=rng.uniform(settings.axis_ratio, 1.0, n),
        angle=rng.uniform(0.0, 180.0, n),
    )


def _extra_sources(settings: SimulationSettings) -> SkyCatalogue:
    sources = settings.sources
    names = ["ra", "dec", "magnitude", "color"]
    names += ["half_light_radius", "sersic", "axis_ratio", "angle"]
    columns = [np.array([getattr(one, name) for one in sources], dtype=float) for name in names]
    at_rest = np.zeros(len(sources))
    return SkyCatalogue(np.arange(len(sources), dtype=np.int64), *columns, at_rest, at_rest)


def truth_table(settings: SimulationSettings, sky: SkyCatalogue) -> Table:
    """Return the truth about all sources, one row each, with a magnitude for each band."""
    table = Table()
    table["id"] = sky.id
    table["type"] = np.where(sky.is_star, "star", "galaxy")
    table["ra"], table["dec"] = sky.ra, sky.dec
    for band in settings.bands:
        table[f"mag_{band}"] = sky.band_magnitude(settings, band)
    for name in ("color", "radius", "sersic", "axis_ratio", "angle", "pm_ra", "pm_dec"):
        table[name] = getattr(sky, name)
    return _with_units(table, settings)


def reference_catalogue(settings: SimulationSettings, sky: SkyCatalogue) -> Table:
    """Return the stars that a survey would know before, with errors.

    Columns id, ra, dec, pm_ra, pm_dec, and mag_<band> and mag_<band>_err of each band.
    """
    refcat = settings.refcat
    stars = sky.select(sky.is_star)
    # each star draws its own numbers, so that the catalogue does not change when the area grows
    draws = np.array(
        [
            np.concatenate([rng.uniform(size=1), rng.normal(size=2 + len(settings.bands))])
            for rng in (stream(settings.seed, "refcat", int(one)) for one in stars.id)
        ]
    ).reshape(len(stars), 3 + len(settings.bands))
    known = (
        (stars.magnitude >= refcat.brightest)
        & (stars.magnitude <= refcat.faintest)
        & (draws[:, 0] < refcat.completeness)
    )
    stars, draws = stars.select(known), draws[known]
    offset = refcat.position_error / 3.6e6 * draws[:, 1:3]
    table = Table()
    table["id"] = stars.id
    table["ra"] = (stars.ra + offset[:, 0] / np.cos(np.radians(stars.dec))) % 360.0
    table["dec"] = stars.dec + offset[:, 1]
    table["pm_ra"], table["pm_dec"] = stars.pm_ra, stars.pm_dec
    for column, band in enumerate(settings.bands, start=3):
        error = refcat.magnitude_error
        table[f"mag_{band}"] = stars.band_magnitude(settings, band) + error * draws[:, column]
        table[f"mag_{band}_err"] = np.full(len(stars), error)
    return _with_units(table, settings)


def _with_units(table: Table, settings: SimulationSettings) -> Table:
    units = {"ra": "deg", "dec": "deg", "radius": "arcsec", "angle": "deg"}
    for name, unit in {**units, "pm_ra": "mas/yr", "pm_dec": "mas/yr"}.items():
        if name in table.colnames:
            table[name].unit = unit
    table.meta["EPOCH"] = (settings.refcat.epoch, "[yr] Julian epoch of the positions")
    table.meta["RADESYS"] = "ICRS"
    return table
