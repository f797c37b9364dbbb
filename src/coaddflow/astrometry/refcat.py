"""The reference catalogue: stars of known position and magnitude around a field.

References
----------
.. [1] ESA 1997, The Hipparcos and Tycho Catalogues, SP-1200, vol. 1, section 1.5.5
   (propagation of positions; parallax and perspective are left out).
"""

import functools
import gzip
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from astropy.io import ascii as text_tables
from astropy.io import fits
from astropy.table import Table
from astropy.units import UnitsWarning
from numpy.typing import ArrayLike, NDArray

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
        known), brightest first. Rows that occur in more than one file are there once.

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
    return Table(stars[order], names=("ra", "dec", "mag", "mag_err"))


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
    """Return rows of ra, dec, mag, mag_err at the epoch, shape (n, 4), also a bit outside."""
    columns, vectors = _read_catalogue(path, settings, column)
    near = _within(vectors, centre, radius + _MOTION_MARGIN)
    columns = {name: values[near] for name, values in columns.items()}
    ra, dec = columns[settings.ra], columns[settings.dec]
    if settings.pm_ra is None:
        ra = ra % 360.0
    else:
        epoch = columns[settings.epoch_column] if settings.epoch_column else settings.epoch
        years = 2000.0 + (mjd - _MJD_J2000) / _DAYS_PER_YEAR - epoch
        motion = columns[settings.pm_ra], columns[settings.pm_dec]
        ra, dec = from_vector(_apply_proper_motion(vectors[near], ra, dec, *motion, years))
    return np.stack([ra, dec, *_magnitudes(columns, column)], axis=1)


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
    angle = [np.nan_to_num(pm * np.asarray(years) * _RADIANS_PER_MAS) for pm in (pm_ra, pm_dec)]
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


def _read_catalogue(
    path: Path, settings: RefcatSettings, column: MagnitudeColumn
) -> tuple[dict[str, FloatArray], FloatArray]:
    """Read what is needed of one file, or take it from memory if it has just been read."""
    optional = (settings.pm_ra, settings.pm_dec, settings.epoch_column)
    names = {name for name in optional if name is not None} | set(column.columns)
    file_format = _format_of(path) if settings.format == "auto" else settings.format
    changed = path.stat().st_mtime_ns
    return _read_file(path, changed, file_format, settings.ra, settings.dec, tuple(sorted(names)))


def _format_of(path: Path) -> str:
    """Return fits, csv or ecsv, from the file's name."""
    for ending in (".fits", ".fit", ".csv", ".ecsv"):
        if path.name.lower().removesuffix(".gz").endswith(ending):
            return "fits" if ending == ".fit" else ending[1:]
    raise InputError(
        "the format of the reference catalogue does not show in its name",
        path=path,
        remedy="set refcat.format to fits, csv or ecsv",
    )


@functools.lru_cache(maxsize=64)
def _read_file(
    path: Path, changed: int, file_format: str, ra: str, dec: str, others: tuple[str, ...]
) -> tuple[dict[str, FloatArray], FloatArray]:
    """Read columns (float64) of one file by name, and unit vectors at the catalogue's epoch.

    It is read again if it was ``changed`` (its time) since.
    """
    try:
        with warnings.catch_warnings():
            # astropy only warns of a file that ends too early, and then gives what there is
            warnings.filterwarnings("error", message=".*truncated.*")
            # unknown units, of columns that are not used
            warnings.simplefilter("ignore", UnitsWarning)
            names = {ra, dec, *others}
            if file_format == "fits":
                columns = _read_fits(path, names)
            else:
                columns = _read_text(path, names, file_format)
    except (OSError, ValueError, KeyError, TypeError, IndexError, UserWarning) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"is not a readable {file_format} catalogue ({cause})",
            path=path,
            remedy="check the file, refcat.path and refcat.format",
        ) from error
    for name, low, high in ((ra, -180.0, 360.0), (dec, -90.0, 90.0)):
        values = columns[name][np.isfinite(columns[name])]
        if np.any((values < low) | (values > high)):
            raise InputError(
                f"column {name!r} has values outside of {low:g} to {high:g}",
                path=path,
                remedy=f"set refcat.{'ra' if name == ra else 'dec'} to the column in degrees",
            )
    known = np.isfinite(columns[ra]) & np.isfinite(columns[dec])
    columns = {name: values[known] for name, values in columns.items()}
    return columns, to_vector(columns[ra], columns[dec])


def _read_fits(path: Path, names: set[str]) -> dict[str, FloatArray]:
    """Return columns of the first table of a FITS file."""
    # opened here, since astropy leaves a broken file open
    with path.open("rb") as stream, fits.open(stream, memmap=False) as hdus:
        tables = [hdu for hdu in hdus if isinstance(hdu, (fits.BinTableHDU, fits.TableHDU))]
        if not tables:
            raise ValueError("it has no table")
        found = {column.name: column.unit for column in tables[0].columns}
        _check_names(path, names, list(found))
        data = tables[0].data
        return {name: _numbers(path, name, data[name], found[name]) for name in names}


def _read_text(path: Path, names: set[str], file_format: str) -> dict[str, FloatArray]:
    """Return columns of a CSV or ECSV file; empty fields become NaN."""
    comment = {"comment": "#"} if file_format == "csv" else {}
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as stream:
        lines = stream.read().splitlines()
    table = text_tables.read(lines, format=file_format, guess=False, **comment)
    _check_names(path, names, table.colnames)
    columns = {}
    for name in names:
        values, unit = table[name], table[name].unit
        if values.dtype.kind in "iuf" and np.ma.isMaskedArray(values):
            values = values.astype(float).filled(np.nan)
        columns[name] = _numbers(path, name, np.asarray(values), unit and str(unit))
    return columns


def _check_names(path: Path, names: set[str], found: list[str]) -> None:
    missing = sorted(names - set(found))
    if missing:
        listed = ", ".join(found[:40]) + (", ..." if len(found) > 40 else "")
        raise InputError(
            f"the reference catalogue has no column {missing[0]!r}; it has {listed}",
            path=path,
            remedy="say in the settings, section refcat, which column means what",
        )


def _numbers(path: Path, name: str, values: NDArray, unit: str | None) -> FloatArray:
    """Return a column as float64; positions in radians or hours are refused."""
    if values.dtype.kind not in "fiu" or values.ndim != 1:
        raise InputError(
            f"column {name!r} of the reference catalogue is not a column of numbers",
            path=path,
            remedy="angles must be in decimal degrees and empty magnitudes NaN or left empty",
        )
    if (unit or "").strip().lower() in ("rad", "radian", "h", "hour", "hourangle"):
        raise InputError(
            f"column {name!r} of the reference catalogue is in {unit}",
            path=path,
            remedy="convert it to degrees",
        )
    return values.astype(np.float64)


def _names(files: Sequence[Path]) -> str:
    """Return the file's name, or the folder of many and their number."""
    return str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
