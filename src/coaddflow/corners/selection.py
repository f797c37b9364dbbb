"""Which CCDs are good enough for a coadd, and why the others are not.

The cuts are settings (`SelectionSettings`) on values of the manifest (`CcdRow`), in units that do
not depend on exposure time and pixel scale. Some are relative to the median of the band in the
tract: an exposure more may move it, and with it what passes; the coadds of a tract depend on all of
its exposures in any case, and no warp depends on the selection.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from coaddflow.errors import OF_EXPOSURE
from coaddflow.image.masked_image import flux_scale
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


def sky_noise_flux(row: CcdRow) -> float | None:
    """Return the sky noise of one square arcsecond in nJy, or None where it is not known."""
    if row.sky_noise is None or row.zero_point is None or not row.pixel_scale:
        return None
    return row.sky_noise * flux_scale(row.zero_point) / row.pixel_scale


@dataclass(frozen=True)
class BandMedians:
    """Medians over the CCDs of a band in a tract; None if the figure is known of no CCD."""

    zero_point: float | None = None
    """Magnitude of one electron per second."""
    seeing: float | None = None
    """FWHM, arcsec."""
    noise: float | None = None
    """Sky noise of one square arcsecond, nJy."""


def band_medians(rows: Iterable[CcdRow]) -> BandMedians:
    """Return the medians that cuts are relative to."""
    rows = list(rows)

    def median(figure: Callable[[CcdRow], float | None]) -> float | None:
        values = [value for row in rows if (value := figure(row)) is not None]
        return float(np.median(values)) if values else None

    return BandMedians(
        median(zero_point_per_second), median(lambda row: row.seeing), median(sky_noise_flux)
    )


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
    row: CcdRow, settings: SelectionSettings, medians: BandMedians | None = None
) -> tuple[str, ...]:
    """Return every reason for which a CCD is left out of the coadds; empty if it goes in.

    Parameters
    ----------
    row : CcdRow
        The CCD's row of the manifest.
    settings : SelectionSettings
        The cuts.
    medians : BandMedians, optional
        Of the CCD's band in the tract.

    Returns
    -------
    tuple of str
        Such as ``"seeing 1.93 > 1.8 arcsec"``.
    """
    if row.state == "failed":
        return (f"failed: {row.reason}{_of_exposure(row)}",)
    return tuple(cuts_against(row, settings, medians or BandMedians()).values())


def cuts_against(row: CcdRow, settings: SelectionSettings, medians: BandMedians) -> dict[str, str]:
    """Return the settings that leave out a CCD with a calexp, and the reason of each."""
    found = {}
    if row.exposure in settings.exclude_exposures:
        found["exclude_exposures"] = "exposure is excluded by the settings"
    if row.ccd in settings.exclude_ccds:
        found["exclude_ccds"] = "CCD is excluded by the settings"
    flags = [flag for flag in row.flags.split(",") if flag in settings.exclude_flags]
    if flags:
        found["exclude_flags"] = f"flag {', '.join(flags)}"
    for cut in _CUTS:
        if (reason := cut.reason(row, settings)) is not None:
            found[cut.setting] = reason
    return found | _relative_cuts(row, settings, medians)


def _relative_cuts(
    row: CcdRow, settings: SelectionSettings, medians: BandMedians
) -> dict[str, str]:
    """Return which cuts relative to the median of the band a CCD fails."""
    found = {}
    if settings.max_zero_point_loss is not None:
        value, limit = zero_point_per_second(row), settings.max_zero_point_loss
        if value is None or medians.zero_point is None:
            found["max_zero_point_loss"] = "zero-point is not known"
        elif medians.zero_point - value > limit:
            found["max_zero_point_loss"] = (
                f"zero-point {medians.zero_point - value:.4g} below the median > {limit:.4g} mag"
            )
    for setting, words, value, median in (
        ("max_seeing_ratio", "seeing", row.seeing, medians.seeing),
        ("max_noise_ratio", "sky noise", sky_noise_flux(row), medians.noise),
    ):
        limit = getattr(settings, setting)
        # what is not known is kept: images calibrated elsewhere have no such figures
        if limit is not None and value is not None and median and value > limit * median:
            found[setting] = f"{words} {value / median:.4g} times the median > {limit:.4g}"
    return found
