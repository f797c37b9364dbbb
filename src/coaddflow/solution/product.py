"""The solution of one exposure as a file: what warps and measurements of the exposure need.

Each exposure has a file of its own, so that its warps depend on nothing else. HDUs:

========== ======================================================================================
PRIMARY    provenance; EXPOSURE; SOLRA, SOLDEC: centre of the tract's frame, degrees
DETECTORS  a row for each CCD: ``ccd``, ``nx``, ``ny``, ``field`` (pixels to the field, degrees; 2
           polynomials in u = (x - (nx - 1) / 2) / h and v = (y - (ny - 1) / 2) / h, h half of the
           longer side, terms 1, u, v, u^2, u v, v^2, ...), ``illum`` (mag, the same variables)
MAP        2 polynomials in the field over RADIUS (degrees) to the tangent plane, degrees; PLON,
           PLAT: tangent point in the frame; COLORX, COLORY: displacement by colour, degrees/mag;
           EXCESS: scatter beyond the errors, mas
TURBULENCE optional: displacement on the plane, mas, as waves (`waves.WaveField`)
ZEROPOINT  1 polynomial in the field over RADIUS to the zero-point, mag; EXCESS, mag
CLOUDS     optional: what is added to it, mag, as waves over the field in degrees
========== ======================================================================================
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from coaddflow.errors import InputError
from coaddflow.geometry.wcs import fit_tan_sip
from coaddflow.image.masked_image import opened_fits, write_fits
from coaddflow.solution.detections import TractFrame
from coaddflow.solution.detector_maps import DetectorMaps, order_of
from coaddflow.solution.photometry import ExposureCalibration
from coaddflow.solution.positions import ExposureMap
from coaddflow.solution.waves import WaveField

_SIP_ORDER = 7
"""Highest order of the SIP polynomials: waves of 8 arcmin bend a CCD of 18 arcmin several times."""

_REMEDY = "remove it, and solve the tract again"


class ExposureSolution(NamedTuple):
    """What the solution of a tract says about one exposure."""

    positions: ExposureMap
    calibration: ExposureCalibration | None
    """None if the photometry was not solved."""


def exposure_wcs(positions: ExposureMap, ccd: int, tolerance: float = 1e-3) -> WCS:
    """Return the TAN-SIP WCS of a CCD.

    Parameters
    ----------
    positions : ExposureMap
        The map of the exposure.
    ccd : int
        Number of the CCD in the camera.
    tolerance : float
        Largest error, pixels, at which the order of SIP is not raised further (to 7 at most).
    """
    nx, ny = positions.detectors.size[positions.detectors.index_of(ccd, positions.name)]
    return fit_tan_sip(
        lambda x, y: positions.to_sky(ccd, x, y), (int(ny), int(nx)), tolerance, _SIP_ORDER
    )


def write_exposure_solution(
    path: str | Path, solution: ExposureSolution, provenance: fits.Header | None = None
) -> str:
    """Write the solution of an exposure, whole or not at all; return its SHA-256 checksum.

    Parameters
    ----------
    path : str or Path
        The file.
    solution : ExposureSolution
        Positions and zero-points; both are written with the CCDs of the positions.
    provenance : astropy.io.fits.Header, optional
        Cards for the primary header.
    """
    positions, calibration = solution
    primary = fits.PrimaryHDU(header=provenance)
    primary.header["EXPOSURE"] = (positions.name, "exposure")
    primary.header["SOLRA"] = (positions.frame.ra, "[deg] centre of the frame")
    primary.header["SOLDEC"] = (positions.frame.dec, "[deg] centre of the frame")
    image = fits.ImageHDU(positions.coefficients, name="MAP")
    image.header["RADIUS"] = (positions.radius, "[deg] unit of the field")
    image.header["PLON"], image.header["PLAT"] = map(float, positions.pointing)
    image.header["COLORX"], image.header["COLORY"] = map(float, positions.color_vector)
    image.header["EXCESS"] = (positions.excess, "[mas] scatter beyond errors")
    hdus = [primary, _detectors_hdu(positions.detectors, calibration), image]
    if positions.field is not None:
        hdus.append(_waves_hdu(positions.field, "TURBULENCE"))
    if calibration is not None:
        hdus.append(fits.ImageHDU(calibration.coefficients, name="ZEROPOINT"))
        hdus[-1].header["RADIUS"] = (calibration.radius, "[deg] unit of the field")
        hdus[-1].header["EXCESS"] = (calibration.excess, "[mag] scatter beyond errors")
        if calibration.field is not None:
            hdus.append(_waves_hdu(calibration.field, "CLOUDS"))
    return write_fits(path, hdus)


def read_exposure_solution(path: str | Path) -> ExposureSolution:
    """Read the solution of an exposure.

    Raises
    ------
    InputError
        If the file is missing, damaged, or no solution of an exposure.
    """
    with opened_fits(path, "solution of an exposure", _REMEDY) as (_, hdus):
        try:
            return _from_hdus(hdus)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise InputError(f"is no solution of an exposure ({error})", path, _REMEDY) from error


def _from_hdus(hdus: fits.HDUList) -> ExposureSolution:
    """Return the solution in the HDUs of a file."""
    primary, header = hdus[0].header, hdus["MAP"].header
    maps, illumination = _detectors_of(hdus["DETECTORS"])
    coefficients = _polynomials(hdus["MAP"], 2)
    positions = ExposureMap(
        name=str(primary["EXPOSURE"]),
        frame=TractFrame(float(primary["SOLRA"]), float(primary["SOLDEC"])),
        pointing=np.array([header["PLON"], header["PLAT"]], float),
        detectors=maps,
        radius=float(header["RADIUS"]),
        coefficients=coefficients,
        color_vector=np.array([header["COLORX"], header["COLORY"]], float),
        field=_waves_of(hdus["TURBULENCE"], True) if "TURBULENCE" in hdus else None,
        excess=float(header["EXCESS"]),
    )
    if "ZEROPOINT" not in hdus:
        return ExposureSolution(positions, None)
    header = hdus["ZEROPOINT"].header
    calibration = ExposureCalibration(
        *(positions.name, maps, float(header["RADIUS"])),
        coefficients=_polynomials(hdus["ZEROPOINT"], 1),
        illumination=illumination,
        field=_waves_of(hdus["CLOUDS"], False) if "CLOUDS" in hdus else None,
        excess=float(header["EXCESS"]),
    )
    return ExposureSolution(positions, calibration)


def _polynomials(hdu: fits.ImageHDU, axes: int) -> np.ndarray:
    """Return the coefficients of an image; ValueError if they are none."""
    values = np.asarray(hdu.data, dtype=float)
    if values.shape[:-1] != ((axes,) if axes > 1 else ()) or not np.isfinite(values).all():
        raise ValueError(f"{hdu.name} has the shape {values.shape}, or values that are not finite")
    order_of(values.shape[-1])
    return values


def _detectors_hdu(maps: DetectorMaps, calibration: ExposureCalibration | None) -> fits.BinTableHDU:
    """Return the table of the CCDs."""
    n_terms = maps.coefficients.shape[-1]
    columns = [
        fits.Column("ccd", "K", array=maps.ccd),
        fits.Column("nx", "K", array=maps.size[:, 0]),
        fits.Column("ny", "K", array=maps.size[:, 1]),
        fits.Column(
            "field", f"{2 * n_terms}D", "deg", dim=f"({n_terms},2)", array=maps.coefficients
        ),
    ]
    if calibration is not None:
        own = calibration.illumination
        columns.append(fits.Column("illum", f"{own.shape[1]}D", "mag", array=own))
    return fits.BinTableHDU.from_columns(columns, name="DETECTORS")


def _detectors_of(hdu: fits.BinTableHDU) -> tuple[DetectorMaps, np.ndarray]:
    """Return the CCDs of a table, and their illumination (no columns if there is none)."""
    rows = hdu.data
    coefficients = np.array(rows["field"], dtype=float)
    if coefficients.ndim != 3 or coefficients.shape[1] != 2:
        raise ValueError(f"DETECTORS has polynomials of shape {coefficients.shape}")
    order_of(coefficients.shape[2])
    size = np.stack([rows["nx"], rows["ny"]], axis=1).astype(np.int64)
    maps = DetectorMaps(np.array(rows["ccd"], dtype=np.int64), size, coefficients)
    has_illumination = "illum" in rows.names
    own = np.array(rows["illum"], float) if has_illumination else np.zeros((len(maps), 0))
    return maps, own.reshape(len(maps), -1)


def _waves_hdu(field: WaveField, name: str) -> fits.BinTableHDU:
    """Return the table of a field's waves."""
    columns = [
        fits.Column("kx", "K", array=field.waves[:, 0]),
        fits.Column("ky", "K", array=field.waves[:, 1]),
        fits.Column("cosine", "D", array=field.cosine),
        fits.Column("sine", "D", array=field.sine),
    ]
    hdu = fits.BinTableHDU.from_columns(columns, name=name)
    hdu.header["BOX"] = (field.box, "[deg] period")
    hdu.header["X0"], hdu.header["Y0"] = map(float, field.origin)
    hdu.header["POWER"] = (field.spectrum[0], "variance of the longest waves")
    hdu.header["KOUTER"] = (field.spectrum[1], "outer scale, waves in the box")
    hdu.header["SLOPE"] = (field.spectrum[2], "n of (1 + k^2 / k0^2)^-n")
    hdu.header["ERROR"] = (field.error, "formal error at the stars, one axis")
    return hdu


def _waves_of(hdu: fits.BinTableHDU, is_gradient: bool) -> WaveField:
    """Return the field of a table."""
    header, rows = hdu.header, hdu.data
    return WaveField(
        origin=np.array([header["X0"], header["Y0"]], float),
        box=float(header["BOX"]),
        waves=np.stack([rows["kx"], rows["ky"]], axis=1).astype(np.int64),
        cosine=np.array(rows["cosine"], float),
        sine=np.array(rows["sine"], float),
        is_gradient=is_gradient,
        spectrum=tuple(float(header[key]) for key in ("POWER", "KOUTER", "SLOPE")),
        error=float(header["ERROR"]),
    )
