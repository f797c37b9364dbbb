"""Which CCDs are good enough for a coadd, and why the others are not.

The cuts are settings (`SelectionSettings`) on values of the manifest (`CcdRow`), in units that do
not depend on exposure time and pixel scale.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from coaddflow.errors import OF_EXPOSURE
from coaddflow.settings.selection import SelectionSettings
from coaddflow.tables.manifest import CcdRow


@dataclass(frozen=True)
class _Cut:
    """One limit: the setting, the value it limits, and its name and unit in messages."""

    setting: str
    figure: Callable[[CcdRow], float | None]
    words: str
    unit: str

    def reason(self, row: CcdRow, settings: SelectionSettings) -> str | None:
        """Return why the CCD fails this cut, or None."""
        limit = getattr(settings, self.setting)
        if limit is None:
            return None
        value = self.figure(row)
        if value is None:
            return f"{self.words} is not known"
        below = self.setting.startswith("min_")
        if (value >= limit) if below else (value <= limit):
            return None
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.words} {value:.4g} {'<' if below else '>'} {limit:.4g}{unit}"


def zero_point_per_second(row: CcdRow) -> float | None:
    """Return the magnitude of one electron per second, or None where it is not known."""
    if row.zero_point is None or row.exposure_time <= 0:
        return None
    return row.zero_point - 2.5 * math.log10(row.exposure_time)


def sky_brightness(row: CcdRow) -> float | None:
    """Return the sky in electrons per second and square arcsecond, or None if not known."""
    if row.sky_level is None or row.pixel_scale is None or row.exposure_time <= 0:
        return None
    return row.sky_level / row.exposure_time / row.pixel_scale**2


def median_zero_point(rows: Iterable[CcdRow]) -> float | None:
    """Return the median magnitude of one electron per second; None if it is known of no CCD."""
    values = [value for row in rows if (value := zero_point_per_second(row)) is not None]
    return float(np.median(values)) if values else None


_CUTS = (
    _Cut("max_seeing", lambda row: row.seeing, "seeing", "arcsec"),
    _Cut("max_ellipticity", lambda row: row.ellipticity, "PSF ellipticity", ""),
    _Cut("min_zero_point", zero_point_per_second, "zero-point of 1 electron/s", "mag"),
    _Cut("max_zero_point_scatter", lambda row: row.zero_point_scatter, "zero-point scatter", "mag"),
    _Cut("max_sky", sky_brightness, "sky", "electron/s/arcsec^2"),
    _Cut("max_astrometry_rms", lambda row: row.astrometry_rms, "astrometry rms", "arcsec"),
    _Cut("min_matched", lambda row: row.n_matched, "stars of the astrometric fit", ""),
    _Cut("min_zero_point_stars", lambda row: row.n_zero_point, "stars of the zero-point", ""),
    _Cut("min_psf_stars", lambda row: row.n_psf_stars, "stars of the PSF model", ""),
    _Cut("min_depth", lambda row: row.depth, "depth", "mag"),
)


def _of_exposure(row: CcdRow) -> str:
    """Return why the exposure of a CCD is left out, for one that did not fail by itself."""
    return f" ({row.message})" if row.reason in OF_EXPOSURE else ""


def reasons_against(
    row: CcdRow, settings: SelectionSettings, reference_zero_point: float | None = None
) -> tuple[str, ...]:
    """Return every reason for which a CCD is left out of the coadds; empty if it goes in.

    Parameters
    ----------
    row : CcdRow
        The CCD's row of the manifest.
    settings : SelectionSettings
        The cuts.
    reference_zero_point : float, optional
        Median magnitude of one electron per second (`median_zero_point`) of the CCD's band.

    Returns
    -------
    tuple of str
        Such as ``"seeing 1.93 > 1.8 arcsec"``.
    """
    if row.state == "failed":
        return (f"failed: {row.reason}{_of_exposure(row)}",)
    reasons = []
    if row.exposure in settings.exclude_exposures:
        reasons.append("exposure is excluded by the settings")
    if row.ccd in settings.exclude_ccds:
        reasons.append("CCD is excluded by the settings")
    for flag in filter(None, row.flags.split(",")):
        if flag in settings.exclude_flags:
            reasons.append(f"flag {flag}")
    reasons += [reason for cut in _CUTS if (reason := cut.reason(row, settings)) is not None]
    if settings.max_zero_point_loss is not None:
        value = zero_point_per_second(row)
        if value is None or reference_zero_point is None:
            reasons.append("zero-point is not known")
        elif reference_zero_point - value > settings.max_zero_point_loss:
            reasons.append(
                f"zero-point {reference_zero_point - value:.4g} below the median "
                f"> {settings.max_zero_point_loss:.4g} mag"
            )
    return tuple(reasons)
