"""What the columns of a reference catalogue mean: degrees, AB magnitudes, mas/year, Julian years.

Units come from the settings, from the file, or from the conventions of LSST's catalogues. Values
that catalogues write for "not known" (-999, 0, 99, ...) become NaN here.

References
----------
.. [1] Oke & Gunn 1983, ApJ 266, 713 (AB magnitudes; 3631 Jy).
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from astropy import units as u
from numpy.typing import NDArray

from coaddflow.astrometry.catalogue import Column, read_columns
from coaddflow.errors import InputError
from coaddflow.geometry.sphere import to_vector
from coaddflow.settings.refcat import MagnitudeColumn, RefcatSettings

FloatArray = NDArray[np.float64]

RA, DEC = "position:ra", "position:dec"
"""Keys of the positions among the columns of `read_stars`; no settings can call a column so."""

_SENTINELS = (99.0, 999.0, 9999.0, 99999.0, -9.0, -99.0, -999.0, -9999.0, -99999.0)
"""What catalogues write for an angle that is not known."""

_MOTION_SENTINELS = (999.0, 9999.0, 99999.0, -999.0, -9999.0, -99999.0)

_FASTEST = 20_000.0
"""Proper motion beyond which it cannot be real, mas/year: twice that of Barnard's star."""

_LARGEST_ERROR = 9.0
"""Magnitude error from which on it means "not known": 9, 9.99, 99 and 999 are in use."""

_ANGLES = {
    "deg": u.deg,
    "degree": u.deg,
    "degrees": u.deg,
    "decimal degrees": u.deg,
    "rad": u.rad,
    "radian": u.rad,
    "radians": u.rad,
    "h": u.hourangle,
    "hr": u.hourangle,
    "hour": u.hourangle,
    "hours": u.hourangle,
    "hourangle": u.hourangle,
    "arcsec": u.arcsec,
    "mas": u.mas,
}
"""Units of positions as files spell them."""

_LSST_FLUX = "nJy"
"""Unit of the fluxes in LSST's catalogues, where they do not say."""

_JD_MJD = 2400000.5


class _Limits(NamedTuple):
    key: str
    low: float
    high: float


_LIMITS = (_Limits(RA, -180.0, 360.0), _Limits(DEC, -90.0, 90.0))


def read_stars(
    path: Path, settings: RefcatSettings, column: MagnitudeColumn
) -> tuple[dict[str, FloatArray], FloatArray]:
    """Read the columns of one file that a band needs, or take them from memory if just read.

    Parameters
    ----------
    path : Path
        The file.
    settings : RefcatSettings
        Names and units of the columns.
    column : MagnitudeColumn
        Columns of the band.

    Returns
    -------
    columns : dict of str to numpy.ndarray
        By the names in the settings: magnitudes (AB for fluxes), their errors, proper motions
        (mas/year) and epochs (Julian years), NaN where not known; positions (degrees) under `RA`
        and `DEC`. Stars without a position are left out.
    vectors : numpy.ndarray
        Unit vectors of the positions, shape (n, 3).

    Raises
    ------
    InputError
        If the file is not readable, or a column is missing, not numeric, or in a unit that cannot
        be converted; names the file.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", path=path, remedy="check refcat.path"
        ) from error
    columns = settings.model_copy(update={"bands": {}, "fallback": column, "path": ()})
    return _read_stars(path, (state.st_mtime_ns, state.st_size), columns.model_dump_json())


@functools.lru_cache(maxsize=64)
def _read_stars(
    path: Path, changed: tuple[int, int], settings_json: str
) -> tuple[dict[str, FloatArray], FloatArray]:
    """Return the same; it is read again if it was ``changed`` (its time and size) since."""
    settings = RefcatSettings.model_validate_json(settings_json)
    optional = (settings.pm_ra, settings.pm_dec, settings.epoch_column)
    names = {settings.ra, settings.dec, *settings.fallback.columns}
    names |= {name for name in optional if name is not None}
    file_format = None if settings.format == "auto" else settings.format
    found = read_columns(path, names, file_format)
    columns = _positions(path, found, settings)
    from_lsst = _is_of_lsst(found[settings.ra])
    for name in settings.fallback.magnitudes:
        columns[name] = _magnitude(path, found[name], settings, from_lsst)
    if settings.fallback.error is not None:
        columns[settings.fallback.error] = _error(found, settings.fallback)
    for name in (settings.pm_ra, settings.pm_dec):
        if name is not None:
            columns[name] = _motion(path, found[name], settings, found[settings.ra])
    if settings.epoch_column is not None:
        columns[settings.epoch_column] = _julian_year(found[settings.epoch_column].values)
    known = np.isfinite(columns[RA]) & np.isfinite(columns[DEC])
    columns = {name: values[known] for name, values in columns.items()}
    return columns, to_vector(columns[RA], columns[DEC])


def _is_of_lsst(position: Column) -> bool:
    """Return whether a column of positions has the name that LSST's catalogues give it."""
    return position.name.lower() in ("coord_ra", "coord_dec")


def _positions(
    path: Path, found: Mapping[str, Column], settings: RefcatSettings
) -> dict[str, FloatArray]:
    """Return right ascension and declination in degrees; what cannot be one is NaN."""
    names = {RA: settings.ra, DEC: settings.dec}
    given = {key: found[name] for key, name in names.items()}
    units = {key: _angle_unit(path, column, settings) for key, column in given.items()}
    if all(unit is None for unit in units.values()):
        units = dict.fromkeys(units, u.rad if _look_like_radians(given) else u.deg)
    columns = {}
    for key, low, high in _LIMITS:
        column, unit = given[key], units[key] or u.deg
        values = column.values * unit.to(u.deg)
        out = ~((values >= low) & (values <= high)) & np.isfinite(column.values)
        if np.any(out & ~np.isin(column.values, _SENTINELS)):
            raise InputError(
                f"column {column.name!r} has values outside of {low:g} to {high:g} degrees",
                path=path,
                remedy=f"set refcat.{key.partition(':')[2]} to the column of this angle, and "
                "refcat.position_unit to its unit",
            )
        columns[key] = np.where(out, np.nan, values)
    return columns


def _look_like_radians(given: Mapping[str, Column]) -> bool:
    """Return whether positions without a unit are those of LSST's catalogues, in radians."""
    if not all(map(_is_of_lsst, given.values())):
        return False
    ra, dec = given[RA].values, given[DEC].values
    return bool(np.nanmax(np.abs(ra), initial=0) <= 2 * np.pi) and bool(
        np.nanmax(np.abs(dec), initial=0) <= np.pi / 2
    )


def _angle_unit(path: Path, column: Column, settings: RefcatSettings) -> u.UnitBase | None:
    """Return the unit of a column of positions; None: neither file nor settings say."""
    if settings.position_unit != "auto":
        return _ANGLES[settings.position_unit]
    if not column.unit:
        return None
    found = _ANGLES.get(column.unit.lower().strip("[]\"' ")) or _parsed(column.unit)
    if found is None or not found.is_equivalent(u.deg):
        raise InputError(
            f"column {column.name!r} of the reference catalogue is in {column.unit!r}, which is no "
            "angle in decimal numbers",
            path=path,
            remedy="set refcat.position_unit (deg, rad or hourangle) if the file is wrong about "
            "it, or name other columns",
        )
    return found


def _parsed(unit: str) -> u.UnitBase | None:
    """Return what a unit in a file means; None if it means nothing."""
    try:
        return u.Unit(unit.replace("'", "").strip("[]"))
    except (ValueError, TypeError):
        return None


def _magnitude(path: Path, column: Column, settings: RefcatSettings, from_lsst: bool) -> FloatArray:
    """Return magnitudes; fluxes become AB magnitudes [1]_, implausible ones NaN."""
    text = _flux_unit(path, column, settings.fallback, from_lsst)
    low, high = settings.plausible_magnitudes
    with np.errstate(divide="ignore", invalid="ignore"):
        if text is None:
            magnitude = column.values * (1e-3 if column.unit == "mmag" else 1.0)
        else:
            jansky = column.values * _parsed(text).to(u.Jy)
            magnitude = np.where(jansky > 0.0, -2.5 * np.log10(jansky / 3631.0), np.nan)
        return np.where((magnitude > low) & (magnitude < high), magnitude, np.nan)


def _flux_unit(path: Path, column: Column, meaning: MagnitudeColumn, from_lsst: bool) -> str | None:
    """Return the unit of a column of fluxes; None: it has magnitudes."""
    if meaning.unit != "auto":
        return None if meaning.unit == "mag" else meaning.unit
    unit = _parsed(column.unit) if column.unit else None
    if unit is not None and unit.is_equivalent(u.Jy):
        return column.unit
    if "flux" not in column.name.lower():
        return None
    if from_lsst and not column.unit:
        return _LSST_FLUX
    raise InputError(
        f"column {column.name!r} of the reference catalogue is a flux"
        + (f" in {column.unit!r}" if column.unit else " without a unit"),
        path=path,
        remedy="name a column of magnitudes in refcat, or say with `unit` beside `magnitude` what "
        "it is (mag, nJy, uJy, mJy or Jy)",
    )


def _error(found: Mapping[str, Column], meaning: MagnitudeColumn) -> FloatArray:
    """Return magnitude errors; NaN where they cannot be one."""
    error, value = found[meaning.error], found[meaning.magnitude]
    unit = _parsed(error.unit) if error.unit else None
    flux = _parsed(value.unit) if value.unit else None
    is_flux = unit is not None and unit.is_equivalent(u.Jy)
    if is_flux or "flux" in error.name.lower():
        scale = unit.to(flux) if is_flux and flux is not None else 1.0
        with np.errstate(divide="ignore", invalid="ignore"):
            values = 2.5 / np.log(10.0) * error.values * scale / value.values
    else:
        values = error.values * (1e-3 if error.unit == "mmag" else 1.0)
    return np.where((values > 0.0) & (values < _LARGEST_ERROR), values, np.nan)


def _motion(path: Path, column: Column, settings: RefcatSettings, position: Column) -> FloatArray:
    """Return proper motions in mas/year; NaN where they cannot be one."""
    unit = None
    if settings.motion_unit != "auto":
        unit = _parsed(settings.motion_unit)
    elif column.unit:
        unit = _parsed(column.unit)
        if unit is not None and unit.is_equivalent(u.rad):
            # LSST leaves the year out
            unit = unit / u.yr
        if unit is None or not unit.is_equivalent(u.mas / u.yr):
            raise InputError(
                f"column {column.name!r} of the reference catalogue is in {column.unit!r}, which "
                "is no proper motion",
                path=path,
                remedy="set refcat.motion_unit (mas/yr, arcsec/yr, deg/yr or rad/yr), or name "
                "another column",
            )
    elif _is_of_lsst(position) and _angle_unit(path, position, settings) in (None, u.rad):
        largest = np.nanmax(np.abs(column.values), initial=0)
        unit = u.rad / u.yr if largest < (_FASTEST * u.mas).to_value(u.rad) else None
    values = column.values * (unit.to(u.mas / u.yr) if unit is not None else 1.0)
    missing = np.isin(column.values, _MOTION_SENTINELS) | ~(np.abs(values) <= _FASTEST)
    return np.where(missing, np.nan, values)


def _julian_year(values: FloatArray) -> FloatArray:
    """Return epochs as Julian years, given as such, as MJD or as JD; NaN where they are neither."""
    mjd = np.where(values > _JD_MJD - 1.0, values - _JD_MJD, values)
    year = np.where(mjd > 10_000.0, 2000.0 + (mjd - 51544.5) / 365.25, mjd)
    return np.where((year > 1800.0) & (year < 2200.0), year, np.nan)
