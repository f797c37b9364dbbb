"""The reference catalogue: stars of known position and magnitude around a field.

References
----------
.. [1] ESA 1997, The Hipparcos and Tycho Catalogues, SP-1200, vol. 1, section 1.5.5
   (propagation of positions; parallax and perspective are left out).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from astropy.table import Table
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from coaddflow.astrometry.refcat_columns import DEC, RA, read_stars
from coaddflow.errors import CcdFailure, InputError, Reason
from coaddflow.geometry.sphere import from_vector, separation, to_vector
from coaddflow.instrument.camera import Camera, Detector
from coaddflow.settings.refcat import MagnitudeColumn, RefcatSettings

FloatArray = NDArray[np.float64]

_MJD_J2000 = 51544.5
_DAYS_PER_YEAR = 365.25
_RADIANS_PER_MAS = np.pi / 180.0 / 3.6e6
_MOTION_MARGIN = 0.1
"""Degrees around the cone from which proper motion can bring stars into it: Barnard's star moves
0.03 degrees in 10 years."""


def load_refcat(
    settings: RefcatSettings, ra: float, dec: float, radius: float, band: str, mjd: float
) -> Table:
    """Read the reference stars of a field.

    Parameters
    ----------
    settings : RefcatSettings
        Files, columns, bands, proper motions.
    ra, dec : float
        Centre of the field, ICRS degrees.
    radius : float
        Radius of the cone, degrees.
    band : str
        Band of the exposure, which chooses the magnitudes.
    mjd : float
        Time of the exposure, to which proper motions are applied.

    Returns
    -------
    astropy.table.Table
        Columns ra, dec (ICRS degrees at ``mjd``), mag, mag_err (in ``band``; NaN where not
        known), motion_known (whether the position is that at ``mjd``; a star whose proper motion
        the catalogue lacks stays at its catalogue position), brightest first. Rows that occur in
        more than one file are there once.

    Raises
    ------
    InputError
        If a file is not there or not readable, or a column is missing or not numeric.
    CcdFailure
        With the reason refcat_misses_field, if no star falls into the cone.
    """
    column = settings.magnitude_column(band)
    files = settings.files()
    centre = to_vector(ra, dec)
    stars = np.concatenate(
        [_stars_near(path, settings, centre, radius, column, mjd) for path in files]
    )
    stars = stars[_within(to_vector(stars[:, 0], stars[:, 1]), centre, radius)]
    stars = stars[np.unique(stars[:, :2], axis=0, return_index=True)[1]]
    if settings.faintest is not None:
        stars = stars[~(stars[:, 2] > settings.faintest)]
    if len(stars) == 0:
        raise CcdFailure(
            Reason.REFCAT_MISSES_FIELD,
            f"{_names(files)}: no star of the reference catalogue lies within {radius:.3f} degrees "
            f"of RA {ra:.4f} Dec {dec:.4f}; add the files of this area to refcat.path, or check "
            "the exposure's pointing",
        )
    # NaN goes last
    order = np.lexsort((stars[:, 0], stars[:, 2]))
    table = Table(stars[order, :4], names=("ra", "dec", "mag", "mag_err"))
    table["motion_known"] = stars[order, 4].astype(bool)
    return table


class FieldStars(NamedTuple):
    """How many stars a catalogue has in a field."""

    stars: int
    """Stars with a position."""
    with_magnitude: int
    """Those with a magnitude in the band of the exposure."""
    without_motion: int
    """Those whose proper motion the catalogue lacks."""


def count_stars(
    settings: RefcatSettings, fields: Sequence[tuple[float, float, float, str]]
) -> list[FieldStars]:
    """Count the stars of the catalogue in many fields, each file being read once.

    Parameters
    ----------
    settings : RefcatSettings
        Files, columns, bands.
    fields : sequence of (ra, dec, radius, band)
        Cones, degrees, and the band whose magnitudes are asked for.

    Raises
    ------
    InputError
        As `load_refcat`; in every file every column that the bands need is read.
    """
    counts = np.zeros((len(fields), 3), dtype=int)
    by_band: dict[str, list[int]] = defaultdict(list)
    for index, (*_, band) in enumerate(fields):
        by_band[band].append(index)
    for path in settings.files():
        for band, indices in by_band.items():
            column = settings.magnitude_column(band)
            columns, vectors = read_stars(path, settings, column)
            if len(vectors) == 0:
                continue
            tree, magnitude = cKDTree(vectors), _magnitudes(columns, column)[0]
            motion = np.zeros(len(vectors))
            if settings.pm_ra is not None:
                motion = columns[settings.pm_ra] * columns[settings.pm_dec]
            for index in indices:
                ra, dec, radius, _ = fields[index]
                chord = 2.0 * np.sin(np.radians(min(radius, 180.0)) / 2.0)
                near = tree.query_ball_point(to_vector(ra, dec), chord)
                known = np.isfinite(magnitude[near]).sum(), np.isnan(motion[near]).sum()
                counts[index] += (len(near), *known)
    return [FieldStars(*map(int, row)) for row in counts]


def check_catalogue(settings: RefcatSettings, bands: Iterable[str]) -> None:
    """Read every file of the catalogue, with the columns that some bands need.

    Raises
    ------
    InputError
        If a file is not there, damaged or truncated, or has no star, or a column is missing or not
        numeric; names the file.
    """
    files, n_stars = settings.files(), 0
    for path in files:
        for column in dict.fromkeys(settings.magnitude_column(band) for band in bands):
            n_stars += len(read_stars(path, settings, column)[1])
    if n_stars == 0:
        raise InputError(
            "the reference catalogue has no star with a position",
            path=_names(files),
            remedy="get the file again, or check refcat.path",
        )


def stars_in_cone(refcat: Table, ra: float, dec: float, radius: float) -> NDArray[np.intp]:
    """Return the rows of a larger field that `load_refcat` gives for this cone, in its order.

    ``refcat`` is from `load_refcat`, for a cone that holds this one; all angles are in degrees.
    """
    position = (np.asarray(refcat[name], float) for name in ("ra", "dec"))
    return np.flatnonzero(_within(to_vector(*position), to_vector(ra, dec), radius))


def ccd_cone(
    camera: Camera, detector: Detector, ra: float, dec: float, rotation: float, margin: float
) -> tuple[float, float, float]:
    """Return (ra, dec, radius) in degrees of the sky where the stars of a CCD may be.

    ``ra``, ``dec`` and ``rotation`` are the pointing and rotation of the exposure, ``margin`` is
    the largest error of the pointing, all in degrees.
    """
    nx, ny = detector.size
    centre = camera.pixel_to_sky(detector, (nx - 1) / 2, (ny - 1) / 2, ra, dec, rotation)
    radius = np.hypot(nx, ny) / 2 * camera.pixel_scale / 3600.0 + margin
    return float(centre[0]), float(centre[1]), float(radius)


def exposure_cone(
    camera: Camera,
    detectors: Sequence[Detector],
    ra: float,
    dec: float,
    rotation: float,
    margin: float,
) -> tuple[float, float, float]:
    """Return the cone around the pointing that holds the cones of these CCDs (see `ccd_cone`)."""
    cones = [ccd_cone(camera, detector, ra, dec, rotation, margin) for detector in detectors]
    radius = max(float(separation(ra, dec, *cone[:2])) + cone[2] for cone in cones)
    return ra, dec, radius * (1.0 + 1e-9)


def _stars_near(
    path: Path,
    settings: RefcatSettings,
    centre: FloatArray,
    radius: float,
    column: MagnitudeColumn,
    mjd: float,
) -> FloatArray:
    """Return rows of ra, dec, mag, mag_err, motion_known at the epoch, also a bit outside."""
    columns, vectors = read_stars(path, settings, column)
    near = _within(vectors, centre, radius + _MOTION_MARGIN)
    columns = {name: values[near] for name, values in columns.items()}
    ra, dec = columns[RA], columns[DEC]
    known = np.ones(len(ra))
    if settings.pm_ra is None:
        ra = ra % 360.0
    else:
        epoch = columns[settings.epoch_column] if settings.epoch_column else settings.epoch
        years = 2000.0 + (mjd - _MJD_J2000) / _DAYS_PER_YEAR - epoch
        motion = columns[settings.pm_ra], columns[settings.pm_dec]
        known = np.isfinite(motion[0] * motion[1] * years).astype(float)
        ra, dec = from_vector(_apply_proper_motion(vectors[near], ra, dec, *motion, years))
    return np.stack([ra, dec, *_magnitudes(columns, column), known], axis=1)


def _within(vectors: FloatArray, centre: FloatArray, radius: float) -> NDArray[np.bool_]:
    """Return which unit vectors are within ``radius`` degrees; through chords, exact if small."""
    chord = 2.0 * np.sin(np.radians(min(radius, 180.0)) / 2.0)
    return np.linalg.norm(vectors - centre, axis=1) <= chord


def _apply_proper_motion(
    vectors: FloatArray,
    ra: FloatArray,
    dec: FloatArray,
    pm_ra: FloatArray,
    pm_dec: FloatArray,
    years: ArrayLike,
) -> FloatArray:
    """Apply proper motions to unit vectors, shape (n, 3), good at the poles as everywhere [1]_.

    The vectors are those of ``ra`` and ``dec`` (degrees) at the catalogue's epoch, which is
    ``years`` (Julian) ago. Proper motions are in mas/year, that in right ascension times cos(dec);
    NaN counts as none.
    """
    ra, dec = np.radians(ra), np.radians(dec)
    zero = np.zeros_like(ra)
    east = np.stack([-np.sin(ra), np.cos(ra), zero], axis=1)
    north = np.stack([-np.sin(dec) * np.cos(ra), -np.sin(dec) * np.sin(ra), np.cos(dec)], axis=1)
    # a star of which one component is not known stays where it is
    known = np.isfinite(pm_ra * pm_dec * np.asarray(years))
    angle = [
        np.where(known, pm * np.asarray(years) * _RADIANS_PER_MAS, 0.0) for pm in (pm_ra, pm_dec)
    ]
    moved = vectors + angle[0][:, None] * east + angle[1][:, None] * north
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


def _magnitudes(
    columns: dict[str, FloatArray], column: MagnitudeColumn
) -> tuple[FloatArray, FloatArray]:
    """Return magnitudes and errors in the survey's band."""
    magnitude = columns[column.magnitude].copy()
    if column.color_terms:
        # a constant alone needs no colour
        color = np.zeros_like(magnitude)
        if column.color is not None:
            color = columns[column.color[0]] - columns[column.color[1]]
        magnitude += np.polynomial.polynomial.polyval(color, column.color_terms)
    if column.error is None:
        return magnitude, np.full_like(magnitude, np.nan)
    return magnitude, columns[column.error]


def _names(files: Sequence[Path]) -> str:
    """Return the file's name, or the folder of many and their number."""
    return str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
