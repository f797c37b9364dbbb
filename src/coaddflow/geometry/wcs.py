"""World coordinates in FITS headers, and robust mapping between pixels and the sky.

Inside coaddflow a fitted WCS is TAN-SIP. Files carry TPV, because SWarp and source-extractor read
TPV and not SIP. Both are a polynomial from pixels to the tangent plane, so that each can be
written as the other by algebra, without a fit.

References
----------
.. [1] Shupe et al. 2005, ADASS XIV, ASP Conf. 347, 491 (SIP).
.. [2] Calabretta et al. 2004, draft of "Representations of distortions in FITS world coordinate
   systems"; and the registered convention TPV, https://fits.gsfc.nasa.gov/registry/tpvwcs.html.
.. [3] Calabretta & Greisen 2002, A&A 395, 1077.
"""

import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from astropy.io import fits
from astropy.wcs import PRJ_CODES, WCS, FITSFixedWarning, Sip
from numpy.typing import ArrayLike, NDArray

from coaddflow.errors import InputError
from coaddflow.geometry.sphere import tan_deproject, tan_project

if TYPE_CHECKING:
    from coaddflow.instrument.camera import Camera, Detector

log = logging.getLogger(__name__)

MAX_TPV_ORDER = 7
_RADIAL_TERMS = (3, 11, 23, 39)
_CONVERGED_PIXELS = 1e-7
_MAX_NEWTON_STEPS = 25
_SIP_CARD = re.compile(r"([AB])_(\d)_(\d)")
_PV_CARD = re.compile(r"PV([12])_(\d{1,2})")


@dataclass(frozen=True)
class _Cards:
    """The numbers of a celestial WCS, in FITS conventions (CRPIX 1-based), lon before lat."""

    projection: str
    crval: NDArray[np.float64]
    crpix: NDArray[np.float64]
    cd: NDArray[np.float64]
    pv: dict[tuple[int, int], float] = field(default_factory=dict)
    sip: tuple[NDArray, NDArray] | None = None
    pole: tuple[float | None, float | None] = (180.0, None)
    shape: tuple[int, int] | None = None


# Polynomials in two variables are arrays c[p, q], the coefficients of u**p * v**q, as in SIP.


def _multiply(a: NDArray, b: NDArray) -> NDArray:
    """Return the product of two polynomials."""
    product = np.zeros((a.shape[0] + b.shape[0] - 1, a.shape[1] + b.shape[1] - 1))
    for p, q in np.argwhere(a):
        product[p : p + b.shape[0], q : q + b.shape[1]] += a[p, q] * b
    return product


def _substitute(coefficients: NDArray, matrix: NDArray, offset: ArrayLike = (0.0, 0.0)) -> NDArray:
    """Return c(matrix @ (s, t) + offset) as a polynomial of the same order in (s, t)."""
    order = coefficients.shape[0] - 1
    one = np.ones((1, 1))
    powers = []
    for row, constant in zip(matrix, offset, strict=True):
        form = np.array([[constant, row[1]], [row[0], 0.0]])
        series = [one]
        for _ in range(order):
            series.append(_multiply(series[-1], form))
        powers.append(series)
    result = np.zeros((order + 1, order + 1))
    for p, q in np.argwhere(coefficients):
        term = coefficients[p, q] * _multiply(powers[0][p], powers[1][q])
        size = min(order + 1, term.shape[0])
        result[:size, :size] += term[:size, :size]
    return result


def evaluate(coefficients: NDArray, u: ArrayLike, v: ArrayLike) -> NDArray[np.float64]:
    """Evaluate the polynomial sum of c[p, q] * u**p * v**q at points of any shape."""
    u, v = np.asarray(u, float), np.asarray(v, float)
    return np.polynomial.polynomial.polyval2d(u, v, coefficients)


def _tpv_terms(axis: int) -> dict[int, tuple[int, int]]:
    """Return the powers (of xi, of eta) of each PV index that is not a radial term [2]_."""
    powers = [(n - q, q) for n in range(MAX_TPV_ORDER + 1) for q in range(n + 1)]
    indices = [m for m in range(_RADIAL_TERMS[-1]) if m not in _RADIAL_TERMS]
    return {m: (p, q) if axis == 1 else (q, p) for m, (p, q) in zip(indices, powers, strict=True)}


def _tpv_polynomials(pv: dict[tuple[int, int], float]) -> list[NDArray]:
    """Return the two polynomials of a TPV distortion.

    Radial terms, which are not polynomials, are left out.
    """
    size = MAX_TPV_ORDER + 1
    polynomials = []
    for axis in (1, 2):
        terms = _tpv_terms(axis)
        values = {m: value for (i, m), value in pv.items() if i == axis}
        values.setdefault(1, 1.0)
        polynomial = np.zeros((size, size))
        for m, value in values.items():
            if m not in _RADIAL_TERMS:
                polynomial[terms[m]] = value
        polynomials.append(polynomial)
    return _trim(*polynomials)


def _trim(*polynomials: NDArray) -> list[NDArray]:
    """Cut polynomials to their common order, at least 1."""
    order = max(int(np.argwhere(c).sum(axis=1).max(initial=1)) for c in polynomials)
    return [np.ascontiguousarray(c[: order + 1, : order + 1]) for c in polynomials]


def _sip_to_tpv(cards: _Cards) -> _Cards:
    """Write (1 + SIP in pixels, then CD) as (CD, then a polynomial in degrees): exact."""
    a, b = (np.array(c) for c in cards.sip)
    order = max(a.shape[0], b.shape[0]) - 1
    if order > MAX_TPV_ORDER or cards.projection != "TAN":
        raise ValueError(f"{cards.projection}-SIP of order {order} has no TPV form")
    plane_to_pixel = np.linalg.inv(cards.cd)
    shifts = [_substitute(c, plane_to_pixel) for c in (a, b)]
    size = max(order, 1) + 1
    pv = {}
    for axis in (1, 2):
        row = cards.cd[axis - 1]
        total = np.zeros((size, size))
        for weight, shift in zip(row, shifts, strict=True):
            total[: shift.shape[0], : shift.shape[1]] += weight * shift
        total[(1, 0) if axis == 1 else (0, 1)] += 1.0
        for m, powers in _tpv_terms(axis).items():
            if sum(powers) <= order:
                pv[axis, m] = float(total[powers])
    # the three leading terms are always written: readers differ in their defaults
    pv = {key: value for key, value in pv.items() if value != 0.0 or key[1] in (0, 1, 2)}
    return replace(cards, projection="TPV", pv=pv, sip=None)


def _tpv_to_sip(cards: _Cards) -> _Cards:
    """Write (CD, then a polynomial) as (1 + SIP, then CD): exact.

    SIP has no constant and no linear terms. Those of TPV go into CRPIX, which moves to the pixel
    that falls on the tangent point, and into CD, which becomes the derivative there.
    """
    polynomials = _tpv_polynomials(cards.pv)
    root = np.zeros(2)
    for _ in range(_MAX_NEWTON_STEPS):
        local = [_substitute(c, np.eye(2), root) for c in polynomials]
        jacobian = np.array([[c[1, 0], c[0, 1]] for c in local])
        step = np.linalg.solve(jacobian, [c[0, 0] for c in local])
        root -= step
        if np.all(np.abs(step) < 1e-15):
            break
    local = [_substitute(c, np.eye(2), root) for c in polynomials]
    jacobian = np.array([[c[1, 0], c[0, 1]] for c in local])
    cd = jacobian @ cards.cd
    in_pixels = [_substitute(c, cards.cd) for c in local]
    inverse = np.linalg.inv(cd)
    sip = [row[0] * in_pixels[0] + row[1] * in_pixels[1] for row in inverse]
    for c in sip:
        c[0, 0] = c[1, 0] = c[0, 1] = 0.0
    a, b = _trim(*sip)
    crpix = cards.crpix + np.linalg.solve(cards.cd, root)
    if a.shape[0] < 3:
        return replace(cards, projection="TAN", crpix=crpix, cd=cd, pv={}, sip=None)
    return replace(cards, projection="TAN", crpix=crpix, cd=cd, pv={}, sip=(a, b))


def _build(cards: _Cards) -> WCS:
    """Return the astropy WCS of these numbers."""
    wcs = WCS(naxis=2)
    suffix = "-SIP" if cards.sip is not None else ""
    wcs.wcs.ctype = [f"RA---{cards.projection}{suffix}", f"DEC--{cards.projection}{suffix}"]
    wcs.wcs.cunit = ["deg", "deg"]
    wcs.wcs.crval = cards.crval
    wcs.wcs.crpix = cards.crpix
    wcs.wcs.cd = cards.cd
    wcs.wcs.radesys = "ICRS"
    if cards.pv:
        # from here on astropy calls TPV a TAN, and does not give its coefficients back
        wcs.wcs.set_pv([(i, m, value) for (i, m), value in sorted(cards.pv.items())])
    for name, value in zip(("lonpole", "latpole"), cards.pole, strict=True):
        if value is not None:
            setattr(wcs.wcs, name, value)
    if cards.sip is not None:
        wcs.sip = Sip(*cards.sip, None, None, cards.crpix)
    if cards.shape is not None:
        wcs.array_shape = cards.shape
    wcs.wcs.set()
    return wcs


def _build_tpv(cards: _Cards) -> WCS:
    """Return a TPV WCS as TAN-SIP; ValueError if that cannot be done to 1e-3 pixel."""
    if not any(m in _RADIAL_TERMS and value != 0.0 for (_, m), value in cards.pv.items()):
        return _build(_tpv_to_sip(cards))
    if cards.shape is None:
        raise ValueError("TPV with radial terms is only read from the header of an image")
    tpv = _build(cards)
    wcs = fit_tan_sip(lambda x, y: pixel_to_sky(tpv, x, y), cards.shape, max_order=MAX_TPV_ORDER)
    if _distance(wcs, tpv) > 1e-3:
        raise ValueError("its radial TPV terms are too strong to be written as SIP")
    return wcs


def _cards_of(wcs: WCS) -> _Cards:
    """Return the numbers of an astropy WCS."""
    if wcs.naxis != 2 or not wcs.has_celestial or wcs.wcs.lng != 0:
        raise ValueError("not a WCS of right ascension and declination, in this order")
    projection = wcs.wcs.ctype[0][5:8]
    # the default of LONPOLE changes at the pole [3]_, so that it is always given
    pole = (float(wcs.wcs.lonpole), None if wcs.wcs.theta0 == 90.0 else float(wcs.wcs.latpole))
    return _Cards(
        projection=projection,
        crval=np.array(wcs.wcs.crval),
        crpix=np.array(wcs.wcs.crpix),
        cd=np.array(wcs.pixel_scale_matrix),
        pv={(i, m): value for i, m, value in wcs.wcs.get_pv()},
        sip=None if wcs.sip is None else (np.array(wcs.sip.a), np.array(wcs.sip.b)),
        pole=pole,
        shape=wcs.array_shape,
    )


def make_tan_sip(
    crval: ArrayLike,
    crpix: ArrayLike,
    cd: ArrayLike,
    a: NDArray,
    b: NDArray,
    shape: tuple[int, int],
) -> WCS:
    """Return a TAN-SIP WCS [1]_ with inverse polynomials that are good over the whole CCD.

    Parameters
    ----------
    crval : array_like, shape (2,)
        Tangent point: ICRS right ascension and declination in degrees.
    crpix : array_like, shape (2,)
        The pixel (x, y) that falls on it, 0-based.
    cd : array_like, shape (2, 2)
        Degrees per pixel.
    a, b : ndarray, shape (order + 1, order + 1)
        SIP polynomials of x and y; terms of order 0 and 1 must be zero.
    shape : tuple of int
        Shape (ny, nx) of the CCD.
    """
    crpix = np.asarray(crpix, float) + 1.0
    cards = _Cards("TAN", np.asarray(crval, float), crpix, np.asarray(cd, float), shape=shape)
    if not (np.any(a) or np.any(b)):
        return _build(cards)
    wcs = _build(replace(cards, sip=(np.asarray(a, float), np.asarray(b, float))))
    wcs.sip = Sip(a, b, *inverse_sip(a, b, crpix - 1.0, shape), crpix)
    return wcs


def plane_to_tan_sip(
    crval: ArrayLike, crpix: ArrayLike, xi: NDArray, eta: NDArray, shape: tuple[int, int]
) -> WCS:
    """Return the TAN-SIP form of polynomials from pixels to the tangent plane.

    Parameters
    ----------
    crval : array_like, shape (2,)
        Tangent point, degrees.
    crpix : array_like, shape (2,)
        Pixel (x, y), 0-based, from which the polynomials count.
    xi, eta : ndarray, shape (order + 1, order + 1)
        Polynomials c[p, q] in degrees. Their constant terms must be small: they are taken as a
        shift of the tangent point.
    shape : tuple of int
        Shape (ny, nx) of the CCD.
    """
    crval = tan_deproject(xi[0, 0], eta[0, 0], *crval)
    cd = np.array([[c[1, 0], c[0, 1]] for c in (xi, eta)])
    inverse = np.linalg.inv(cd)
    a, b = (row[0] * xi + row[1] * eta for row in inverse)
    for c in (a, b):
        c[0, 0] = c[1, 0] = c[0, 1] = 0.0
    return make_tan_sip(crval, crpix, cd, a, b, shape)


def fit_tan_sip(
    to_sky: Callable[[NDArray, NDArray], tuple[NDArray, NDArray]],
    shape: tuple[int, int],
    tolerance: float = 1e-4,
    max_order: int = 5,
) -> WCS:
    """Return the TAN-SIP WCS of a mapping from pixels to the sky, such as a camera predicts.

    The reference pixel is the centre of the CCD, and the order is the lowest with which the
    error stays below ``tolerance`` pixels on a grid over the CCD.

    Parameters
    ----------
    to_sky : callable
        Takes arrays x, y of 0-based pixels, gives ra, dec in degrees.
    shape : tuple of int
        Shape (ny, nx) of the CCD.
    tolerance : float
        Error at which the order is not raised further, pixels.
    max_order : int
        Highest order.
    """
    ny, nx = shape
    crpix = np.array([(nx - 1) / 2.0, (ny - 1) / 2.0])
    x, y = np.meshgrid(np.linspace(-0.5, nx - 0.5, 21), np.linspace(-0.5, ny - 0.5, 21))
    u, v = (x - crpix[0]).ravel(), (y - crpix[1]).ravel()
    crval = np.ravel(to_sky(crpix[:1], crpix[1:]))
    plane = np.stack(tan_project(*to_sky(x.ravel(), y.ravel()), *crval))
    for order in range(1, max_order + 1):
        xi, eta = (fit_polynomial(u, v, values, order) for values in plane)
        wcs = plane_to_tan_sip(crval, crpix, xi, eta, shape)
        error = np.stack([evaluate(xi, u, v), evaluate(eta, u, v)]) - plane
        if np.abs(np.linalg.solve(wcs.pixel_scale_matrix, error)).max() < tolerance:
            break
    return wcs


def predicted_wcs(
    camera: "Camera", detector: "Detector", ra: float, dec: float, rotation: float
) -> WCS:
    """Return the TAN-SIP WCS of a CCD that the camera's geometry predicts.

    Parameters
    ----------
    camera, detector : Camera, Detector
        The camera and its CCD.
    ra, dec, rotation : float
        Pointing and rotation of the exposure, degrees.
    """
    return fit_tan_sip(
        lambda x, y: camera.pixel_to_sky(detector, x, y, ra, dec, rotation), detector.shape
    )


def fit_polynomial(u: NDArray, v: NDArray, values: NDArray, order: int) -> NDArray[np.float64]:
    """Return the polynomial c[p, q] in u and v that fits values best, shape (order + 1,) * 2."""
    scale = max(np.abs(u).max(), np.abs(v).max(), 1.0)
    powers = [(p, q) for p in range(order + 1) for q in range(order + 1 - p)]
    design = np.stack([(u / scale) ** p * (v / scale) ** q for p, q in powers], axis=1)
    solution, *_ = np.linalg.lstsq(design, values, rcond=None)
    coefficients = np.zeros((order + 1, order + 1))
    for (p, q), value in zip(powers, solution, strict=True):
        coefficients[p, q] = value / scale ** (p + q)
    return coefficients


def inverse_sip(
    a: NDArray, b: NDArray, crpix: ArrayLike, shape: tuple[int, int], tolerance: float = 1e-4
) -> tuple[NDArray, NDArray]:
    """Return the SIP polynomials AP, BP from undistorted to measured pixels.

    The lowest order whose error stays below ``tolerance`` pixels on a grid over the CCD is taken,
    at most two above the order of the forward polynomials (and at most 9).

    Parameters
    ----------
    a, b : ndarray, shape (order + 1, order + 1)
        Forward polynomials.
    crpix : array_like, shape (2,)
        Reference pixel (x, y), 0-based.
    shape : tuple of int
        Shape (ny, nx) of the CCD.
    tolerance : float
        Largest error in pixels at which the order is not raised further.
    """
    ny, nx = shape
    x, y = np.meshgrid(np.linspace(-0.5, nx - 0.5, 31), np.linspace(-0.5, ny - 0.5, 31))
    u, v = x.ravel() - crpix[0], y.ravel() - crpix[1]
    du, dv = evaluate(a, u, v), evaluate(b, u, v)
    order = max(a.shape[0], b.shape[0]) - 1
    for inverse_order in range(order, min(order + 2, 9) + 1):
        ap, bp = (fit_polynomial(u + du, v + dv, -shift, inverse_order) for shift in (du, dv))
        error = np.stack([du + evaluate(ap, u + du, v + dv), dv + evaluate(bp, u + du, v + dv)])
        if np.abs(error).max() < tolerance:
            break
    return ap, bp


def wcs_to_header(wcs: WCS) -> fits.Header:
    """Return the cards of a WCS in a form that SWarp, source-extractor and ds9 read.

    TAN-SIP becomes TPV [2]_, exactly; all other projections are written as they are. The numbers
    are written with all the digits that a card can hold, and it is checked that reading them
    gives the same mapping within 1e-6 pixel.

    Parameters
    ----------
    wcs : astropy.wcs.WCS
        Celestial, two axes, ICRS; as the functions of this module make it.

    Returns
    -------
    astropy.io.fits.Header
        WCSAXES, CTYPE, CUNIT, CRVAL, CRPIX, CD, PV, RADESYS.

    Raises
    ------
    ValueError
        If the WCS has a distortion that cards cannot hold or astropy does not give away (one
        that astropy itself has read from TPV: read such headers with `read_wcs`).
    """
    cards = _cards_of(wcs)
    if cards.sip is not None:
        cards = _sip_to_tpv(cards)
    header = fits.Header()
    header["WCSAXES"] = 2
    for axis, name in ((1, "RA--"), (2, "DEC-")):
        header[f"CTYPE{axis}"] = f"{name}-{cards.projection}"
        header[f"CUNIT{axis}"] = "deg"
        header[f"CRVAL{axis}"] = (float(cards.crval[axis - 1]), "[deg] reference point")
        header[f"CRPIX{axis}"] = (float(cards.crpix[axis - 1]), "reference pixel, first is 1")
    for i in (1, 2):
        for j in (1, 2):
            header[f"CD{i}_{j}"] = (float(cards.cd[i - 1, j - 1]), "[deg/pixel]")
    for (axis, m), value in sorted(cards.pv.items()):
        header[f"PV{axis}_{m}"] = float(value)
    for name, value in zip(("LONPOLE", "LATPOLE"), cards.pole, strict=True):
        if value is not None:
            header[name] = value
    header["RADESYS"] = "ICRS"
    if _distance(wcs, _build(_read_cards(header))) > 1e-6:
        raise ValueError("the distortion of this WCS does not survive in a header")
    return header


def _distance(wcs: WCS, other: WCS) -> float:
    """Return the largest distance in pixels of two WCS at the corners and centre of the image."""
    x, y = _centre(wcs)
    reach_x, reach_y = (x, y) if wcs.array_shape is not None else (100.0, 100.0)
    corners = x + reach_x * np.array([-1, 1, -1, 1, 0]), y + reach_y * np.array([-1, -1, 1, 1, 0])
    sky, other_sky = (np.stack(pixel_to_sky(w, *corners)) for w in (wcs, other))
    plane = np.stack(tan_project(*other_sky, *sky[:, 4])) - tan_project(*sky, *sky[:, 4])
    return float(np.abs(np.linalg.solve(wcs.pixel_scale_matrix, plane)).max())


def read_wcs(header: fits.Header, path: str | Path | None = None) -> WCS:
    """Read the celestial WCS of an image header.

    Read are all projections that astropy knows (TAN, SIN, ...), with SIP; TPV, which becomes
    TAN-SIP (exactly, if it has no radial terms; else by a fit that is good to 1e-3 pixel); PV with
    RA---TAN as SCAMP writes it (taken as TPV); CD, PC with CDELT, or CROTA2; axes in either order.
    FK5 of equinox J2000 is taken as ICRS: they differ by less than 0.03 arcsec, and most headers
    that say FK5 were fitted to catalogues in ICRS.

    Parameters
    ----------
    header : astropy.io.fits.Header
        The header of the image; not changed.
    path : str or Path, optional
        Its file, for messages.

    Returns
    -------
    astropy.wcs.WCS
        Two axes, right ascension first, with ``array_shape`` if the header has NAXIS1, NAXIS2.

    Raises
    ------
    InputError
        If there is no usable celestial WCS; the message says which card is at fault.
    """
    try:
        cards = _read_cards(header)
        with warnings.catch_warnings():
            # units and defaults are settled above; what astropy still mends is of no concern
            warnings.simplefilter("ignore", FITSFixedWarning)
            wcs = _build(cards) if cards.projection != "TPV" else _build_tpv(cards)
            ra, dec = pixel_to_sky(wcs, *_centre(wcs))
    except (ValueError, KeyError, TypeError, np.linalg.LinAlgError) as error:
        cause = error.args[0] if error.args else error
        raise InputError(
            f"has no usable WCS: {cause}", path=path, remedy="solve the image's astrometry first"
        ) from error
    if not np.isfinite([ra, dec]).all():
        raise InputError(
            "has a WCS that does not reach the sky at the image's centre",
            path=path,
            remedy="solve the image's astrometry first",
        )
    return wcs


def _read_cards(header: fits.Header) -> _Cards:
    """Collect and check the numbers of the WCS; ValueError and KeyError name the card."""
    ctypes = [str(header.get(f"CTYPE{axis}", "")).strip().upper() for axis in (1, 2)]
    if not all(ctypes):
        raise ValueError("CTYPE1 and CTYPE2 are missing")
    order = _axis_order(ctypes)
    _check_frame(header)
    for axis in (1, 2):
        unit = str(header.get(f"CUNIT{axis}", "deg")).strip().lower()
        if unit not in ("deg", "degree", "degrees", ""):
            raise ValueError(f"CUNIT{axis} is {unit!r}, not degrees")
    if any(key.startswith(("CPDIS", "CQDIS", "D2IMDIS")) for key in header):
        raise ValueError("its distortion is a look-up table (CPDIS, D2IMDIS), which is not read")
    projection, pv, sip = _read_distortion(header, ctypes[order[0]][5:], order)
    world = [(_number(header, f"CRVAL{i + 1}"), i) for i in order]
    if not -90.0 <= world[1][0] <= 90.0:
        raise ValueError(f"CRVAL of the declination is {world[1][0]}")
    return _Cards(
        projection=projection,
        crval=np.array([value for value, _ in world]),
        crpix=np.array([_number(header, f"CRPIX{axis}") for axis in (1, 2)]),
        cd=_read_cd(header)[order],
        pv=pv,
        sip=sip,
        pole=tuple(_number(header, key, None) for key in ("LONPOLE", "LATPOLE")),
        shape=_read_shape(header),
    )


def _read_distortion(
    header: fits.Header, code: str, order: list[int]
) -> tuple[str, dict[tuple[int, int], float], tuple[NDArray, NDArray] | None]:
    """Return the projection, its PV values, and SIP, where writers of headers disagree."""
    projection, *extension = code.split("-")
    if projection not in {*PRJ_CODES, "TPV"}:
        raise ValueError(f"projection {projection!r} is not known")
    pv, sip = _read_pv(header, order), _read_sip(header)
    if "SIP" in extension and sip is None:
        raise ValueError("CTYPE1 says SIP, but A_ORDER or B_ORDER is missing")
    is_scamp = projection == "TAN" and any(axis == 2 or m > 4 for axis, m in pv)
    if projection == "TPV" or (is_scamp and sip is None):
        return "TPV", pv, None
    return projection, {} if projection == "TAN" else pv, sip


def _axis_order(ctypes: list[str]) -> list[int]:
    """Return the indices of the axes of right ascension and of declination."""
    names = [ctype[:5].rstrip("-") for ctype in ctypes]
    if sorted(names) != ["DEC", "RA"]:
        raise ValueError(f"the axes are {ctypes[0]!r} and {ctypes[1]!r}, not RA and DEC")
    return [names.index("RA"), names.index("DEC")]


def _check_frame(header: fits.Header) -> None:
    """Accept ICRS and FK5 J2000, and nothing else."""
    frame = str(header.get("RADESYS", header.get("RADECSYS", ""))).strip().upper()
    equinox = _number(header, "EQUINOX", 2000.0)
    if frame not in ("", "ICRS", "FK5") or (frame != "ICRS" and abs(equinox - 2000.0) > 0.1):
        raise ValueError(f"its frame is {frame or 'not named'}, equinox {equinox:g}, not ICRS")
    if frame == "FK5":
        log.debug("FK5 J2000 taken as ICRS")


def _number(header: fits.Header, key: str, default: float | None = np.nan) -> float | None:
    """Return a finite number; without a default the card must be there."""
    if key not in header and (default is None or np.isfinite(default)):
        return default
    if key not in header:
        raise ValueError(f"{key} is missing")
    value = header[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise ValueError(f"{key} is {value!r}, not a number")
    return float(value)


def _read_cd(header: fits.Header) -> NDArray[np.float64]:
    """Return degrees per pixel from CDi_j, or PCi_j and CDELTi, or CDELTi and CROTA2 [3]_."""
    names = [[f"{i}_{j}" for j in (1, 2)] for i in (1, 2)]
    if any(f"CD{name}" in header for row in names for name in row):
        cd = np.array([[_number(header, f"CD{name}", 0.0) for name in row] for row in names])
    else:
        cdelt = np.array([_number(header, f"CDELT{axis}") for axis in (1, 2)])
        if any(f"PC{name}" in header for row in names for name in row):
            pc = [[_number(header, f"PC{n}", float(n in ("1_1", "2_2"))) for n in r] for r in names]
            cd = cdelt[:, None] * np.array(pc)
        else:
            angle = np.radians(_number(header, "CROTA2", _number(header, "CROTA1", 0.0)))
            sin, cos = np.sin(angle), np.cos(angle)
            cd = np.array([[cdelt[0] * cos, -cdelt[1] * sin], [cdelt[0] * sin, cdelt[1] * cos]])
    if abs(np.linalg.det(cd)) < 1e-20:
        raise ValueError("its CD (or CDELT) matrix is singular")
    return cd


def _read_pv(header: fits.Header, order: list[int]) -> dict[tuple[int, int], float]:
    """Return the PV values by (axis, index), axis 1 being right ascension."""
    pv = {}
    for key in header:
        match = _PV_CARD.fullmatch(key)
        if match:
            axis, index = int(match[1]), int(match[2])
            pv[order.index(axis - 1) + 1, index] = _number(header, key)
    return {key: value for key, value in pv.items() if key[1] <= _RADIAL_TERMS[-1]}


def _read_sip(header: fits.Header) -> tuple[NDArray, NDArray] | None:
    """Return the SIP polynomials, of one common order, or None."""
    if "A_ORDER" not in header or "B_ORDER" not in header:
        return None
    orders = [int(_number(header, f"{name}_ORDER")) for name in "AB"]
    if not all(0 <= order <= 9 for order in orders):
        raise ValueError(f"A_ORDER, B_ORDER are {orders}")
    size = max(*orders, 2) + 1
    polynomials = {name: np.zeros((size, size)) for name in "AB"}
    for key in header:
        match = _SIP_CARD.fullmatch(key)
        if match and int(match[2]) + int(match[3]) < size:
            polynomials[match[1]][int(match[2]), int(match[3])] = _number(header, key)
    return polynomials["A"], polynomials["B"]


def _read_shape(header: fits.Header) -> tuple[int, int] | None:
    """Return (ny, nx) from NAXIS2, NAXIS1 (or ZNAXIS of a compressed image)."""
    for prefix in ("ZNAXIS", "NAXIS"):
        size = [header.get(f"{prefix}{axis}") for axis in (2, 1)]
        if all(isinstance(n, int) and n > 0 for n in size):
            return (size[0], size[1])
    return None


def pixel_to_sky(wcs: WCS, x: ArrayLike, y: ArrayLike) -> tuple[NDArray, NDArray]:
    """Return ICRS (ra in [0, 360), dec) in degrees of 0-based pixels of any shape."""
    x, y = np.broadcast_arrays(np.asarray(x, float), np.asarray(y, float))
    ra, dec = wcs.all_pix2world(x.ravel(), y.ravel(), 0)
    return ra.reshape(x.shape) % 360.0, dec.reshape(x.shape)


def _centre(wcs: WCS) -> tuple[float, float]:
    """Return the central pixel (x, y), or the reference pixel if the size is not known."""
    if wcs.array_shape is None:
        return wcs.wcs.crpix[0] - 1.0, wcs.wcs.crpix[1] - 1.0
    ny, nx = wcs.array_shape
    return (nx - 1) / 2.0, (ny - 1) / 2.0


def sky_to_pixel(
    wcs: WCS, ra: ArrayLike, dec: ArrayLike, margin: float = 0.5
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Invert `pixel_to_sky` near the image, for any projection and distortion.

    Newton's method on the plane that touches the sky at the image's centre. Polynomial
    distortions fold back far outside of the image; positions there, and those for which no pixel
    is found, give NaN and no warning.

    Parameters
    ----------
    wcs : astropy.wcs.WCS
        With ``array_shape``, which says what near means; without it there is no limit.
    ra, dec : array_like
        ICRS positions in degrees, any shape.
    margin : float
        How far outside of the image a pixel may be, in units of the image's longer side.

    Returns
    -------
    x, y : ndarray of float64
        0-based pixels, accurate to 1e-6 pixel, or NaN.
    """
    ra, dec = np.broadcast_arrays(np.asarray(ra, float), np.asarray(dec, float))
    pixels = np.full((2, ra.size), np.nan)
    centre = np.array(_centre(wcs))[:, None]
    ra0, dec0 = (float(value[0]) for value in pixel_to_sky(wcs, *centre))

    def to_plane(xy: NDArray) -> NDArray:
        return np.stack(tan_project(*pixel_to_sky(wcs, *xy), ra0, dec0))

    target = np.stack(tan_project(ra.ravel(), dec.ravel(), ra0, dec0))
    central = _jacobian(to_plane, centre)[..., 0]
    start = centre + np.linalg.solve(central, target)
    limits = _limits(wcs, margin)
    # the linear start of a good pixel may be off by the distortion: twice the margin
    near = np.flatnonzero(_inside(start, _limits(wcs, 2.0 * margin + 0.5)))
    found, good = _newton(to_plane, start[:, near], target[:, near])
    near, found = near[good], found[:, good]
    upright = np.linalg.det(central) * _determinant(_jacobian(to_plane, found)) > 0
    good = upright & _inside(found, limits)
    pixels[:, near[good]] = found[:, good]
    return pixels[0].reshape(ra.shape), pixels[1].reshape(ra.shape)


def _newton(to_plane: Callable, xy: NDArray, target: NDArray) -> tuple[NDArray, NDArray]:
    """Solve to_plane(xy) = target for points (2, n); return the pixels and which are solved."""
    xy = xy.copy()
    solved = np.zeros(xy.shape[1], bool)
    active = np.arange(xy.shape[1])
    for iteration in range(_MAX_NEWTON_STEPS):
        if active.size == 0:
            break
        if iteration < 2 or iteration % 5 == 0:
            # later steps go along the derivative of an earlier one, which is as good near the root
            inverse = _inverse(_jacobian(to_plane, xy[:, active]))
        step = np.einsum("ijn,jn->in", inverse, target[:, active] - to_plane(xy[:, active]))
        xy[:, active] += step
        size = np.abs(step).max(axis=0)
        solved[active[size < _CONVERGED_PIXELS]] = True
        # a point that leaves the plane (NaN) or goes far away is given up
        going_on = (size >= _CONVERGED_PIXELS) & (size < 1e5)
        active, inverse = active[going_on], inverse[..., going_on]
    return xy, solved


def _jacobian(to_plane: Callable, xy: NDArray) -> NDArray[np.float64]:
    """Return the derivative of a mapping at points (2, n), shape (2, 2, n), by differences."""
    steps = [np.array([[0.5], [0.0]]), np.array([[0.0], [0.5]])]
    return np.stack([to_plane(xy + step) - to_plane(xy - step) for step in steps], axis=1)


def _determinant(matrices: NDArray) -> NDArray[np.float64]:
    """Return the determinants of matrices (2, 2, n)."""
    return matrices[0, 0] * matrices[1, 1] - matrices[0, 1] * matrices[1, 0]


def _inverse(matrices: NDArray) -> NDArray[np.float64]:
    """Return the inverses of matrices (2, 2, n); NaN for singular ones."""
    determinant = _determinant(matrices)
    determinant = np.where(determinant == 0.0, np.nan, determinant)
    (a, b), (c, d) = matrices
    return np.array([[d, -b], [-c, a]]) / determinant


def _limits(wcs: WCS, margin: float) -> tuple[NDArray, NDArray]:
    """Return the lowest and highest pixel (x, y) that count as near, shapes (2, 1)."""
    if wcs.array_shape is None:
        return np.full((2, 1), -np.inf), np.full((2, 1), np.inf)
    size = np.array(wcs.array_shape[::-1], float)[:, None]
    reach = margin * size.max()
    return -0.5 - reach, size - 0.5 + reach


def _inside(xy: NDArray, limits: tuple[NDArray, NDArray]) -> NDArray[np.bool_]:
    return np.all((xy >= limits[0]) & (xy <= limits[1]), axis=0)
