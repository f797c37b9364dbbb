"""World coordinates in FITS headers, read and written.

Inside coaddflow a fitted WCS is TAN-SIP. Files carry TPV [1]_, because SWarp and source-extractor
read TPV and not SIP. Both are a polynomial from pixels to the tangent plane, so that each can be
written as the other by algebra, without a fit.

References
----------
.. [1] Calabretta et al. 2004, draft of "Representations of distortions in FITS world coordinate
   systems"; and the registered convention TPV, https://fits.gsfc.nasa.gov/registry/tpvwcs.html.
.. [2] Calabretta & Greisen 2002, A&A 395, 1077.
"""

import logging
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import PRJ_CODES, WCS, FITSFixedWarning
from numpy.typing import NDArray

from coaddflow.errors import InputError
from coaddflow.geometry.polynomial import substitute, term_powers, trim
from coaddflow.geometry.sphere import tan_project
from coaddflow.geometry.wcs import (
    MAX_NEWTON_STEPS,
    WcsCards,
    build_wcs,
    centre_pixel,
    fit_tan_sip,
    pixel_to_sky,
)

log = logging.getLogger(__name__)

_MAX_TPV_ORDER = 7
_RADIAL_TERMS = (3, 11, 23, 39)
_SIP_CARD = re.compile(r"([AB])_(\d)_(\d)")
_PV_CARD = re.compile(r"PV([12])_(\d{1,2})")


def wcs_to_header(wcs: WCS) -> fits.Header:
    """Return the cards of a WCS in a form that SWarp, source-extractor and ds9 read.

    TAN-SIP becomes TPV [1]_, exactly; all other projections are written as they are. The numbers
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
    if _distance(wcs, build_wcs(_read_cards(header))) > 1e-6:
        raise ValueError("the distortion of this WCS does not survive in a header")
    return header


def _cards_of(wcs: WCS) -> WcsCards:
    """Return the numbers of an astropy WCS."""
    if wcs.naxis != 2 or not wcs.has_celestial or wcs.wcs.lng != 0:
        raise ValueError("not a WCS of right ascension and declination, in this order")
    projection = wcs.wcs.ctype[0][5:8]
    # the default of LONPOLE changes at the pole [2]_, so that it is always given
    pole = (float(wcs.wcs.lonpole), None if wcs.wcs.theta0 == 90.0 else float(wcs.wcs.latpole))
    return WcsCards(
        projection=projection,
        crval=np.array(wcs.wcs.crval),
        crpix=np.array(wcs.wcs.crpix),
        cd=np.array(wcs.pixel_scale_matrix),
        pv={(i, m): value for i, m, value in wcs.wcs.get_pv()},
        sip=None if wcs.sip is None else (np.array(wcs.sip.a), np.array(wcs.sip.b)),
        pole=pole,
        shape=wcs.array_shape,
    )


def _sip_to_tpv(cards: WcsCards) -> WcsCards:
    """Write (1 + SIP in pixels, then CD) as (CD, then a polynomial in degrees): exact."""
    a, b = (np.array(c) for c in cards.sip)
    order = max(a.shape[0], b.shape[0]) - 1
    if order > _MAX_TPV_ORDER or cards.projection != "TAN":
        raise ValueError(f"{cards.projection}-SIP of order {order} has no TPV form")
    plane_to_pixel = np.linalg.inv(cards.cd)
    shifts = [substitute(c, plane_to_pixel) for c in (a, b)]
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


def _tpv_terms(axis: int) -> dict[int, tuple[int, int]]:
    """Return the powers (of xi, of eta) of each PV index that is not a radial term [1]_."""
    powers = term_powers(_MAX_TPV_ORDER)
    indices = [m for m in range(_RADIAL_TERMS[-1]) if m not in _RADIAL_TERMS]
    return {m: (p, q) if axis == 1 else (q, p) for m, (p, q) in zip(indices, powers, strict=True)}


def _distance(wcs: WCS, other: WCS) -> float:
    """Return the largest distance in pixels of two WCS at the corners and centre of the image."""
    x, y = centre_pixel(wcs)
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
            # units and defaults are settled above: what astropy still fixes does not matter
            warnings.simplefilter("ignore", FITSFixedWarning)
            wcs = build_wcs(cards) if cards.projection != "TPV" else _build_tpv(cards)
            if not np.isfinite(pixel_to_sky(wcs, *centre_pixel(wcs))).all():
                raise ValueError("it does not reach the sky at the image's centre")
    except (ValueError, KeyError, TypeError, np.linalg.LinAlgError) as error:
        cause = error.args[0] if error.args else error
        raise InputError(
            f"has no usable WCS: {cause}", path=path, remedy="solve the image's astrometry first"
        ) from error
    return wcs


def _read_cards(header: fits.Header) -> WcsCards:
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
    return WcsCards(
        projection=projection,
        crval=np.array([value for value, _ in world]),
        crpix=np.array([_number(header, f"CRPIX{axis}") for axis in (1, 2)]),
        cd=_read_cd(header)[order],
        pv=pv,
        sip=sip,
        pole=tuple(_number(header, key, None) for key in ("LONPOLE", "LATPOLE")),
        shape=_read_shape(header),
    )


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
    """Return degrees per pixel from CDi_j, or PCi_j and CDELTi, or CDELTi and CROTA2 [2]_."""
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


def _read_pv(header: fits.Header, order: list[int]) -> dict[tuple[int, int], float]:
    """Return the PV values by (axis, index), axis 1 being right ascension."""
    found = filter(None, map(_PV_CARD.fullmatch, header))
    pv = {(order.index(int(m[1]) - 1) + 1, int(m[2])): _number(header, m[0]) for m in found}
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
    for match in filter(None, map(_SIP_CARD.fullmatch, header)):
        if int(match[2]) + int(match[3]) < size:
            polynomials[match[1]][int(match[2]), int(match[3])] = _number(header, match[0])
    return polynomials["A"], polynomials["B"]


def _read_shape(header: fits.Header) -> tuple[int, int] | None:
    """Return (ny, nx) from NAXIS2, NAXIS1 (or ZNAXIS of a compressed image)."""
    for prefix in ("ZNAXIS", "NAXIS"):
        size = [header.get(f"{prefix}{axis}") for axis in (2, 1)]
        if all(isinstance(n, int) and n > 0 for n in size):
            return (size[0], size[1])
    return None


def _build_tpv(cards: WcsCards) -> WCS:
    """Return a TPV WCS as TAN-SIP; ValueError if that cannot be done to 1e-3 pixel."""
    if not any(m in _RADIAL_TERMS and value != 0.0 for (_, m), value in cards.pv.items()):
        return build_wcs(_tpv_to_sip(cards))
    if cards.shape is None:
        raise ValueError("TPV with radial terms is only read from the header of an image")
    tpv = build_wcs(cards)
    wcs = fit_tan_sip(lambda x, y: pixel_to_sky(tpv, x, y), cards.shape, max_order=_MAX_TPV_ORDER)
    if _distance(wcs, tpv) > 1e-3:
        raise ValueError("its radial TPV terms are too strong to be written as SIP")
    return wcs


def _tpv_to_sip(cards: WcsCards) -> WcsCards:
    """Write (CD, then a polynomial) as (1 + SIP, then CD): exact.

    SIP has no constant and no linear terms. Those of TPV go into CRPIX, which moves to the pixel
    that falls on the tangent point, and into CD, which becomes the derivative there.
    """
    polynomials = _tpv_polynomials(cards.pv)
    root = np.zeros(2)
    for _ in range(MAX_NEWTON_STEPS):
        local = [substitute(c, np.eye(2), root) for c in polynomials]
        jacobian = np.array([[c[1, 0], c[0, 1]] for c in local])
        step = np.linalg.solve(jacobian, [c[0, 0] for c in local])
        root -= step
        if np.all(np.abs(step) < 1e-15):
            break
    local = [substitute(c, np.eye(2), root) for c in polynomials]
    jacobian = np.array([[c[1, 0], c[0, 1]] for c in local])
    cd = jacobian @ cards.cd
    in_pixels = [substitute(c, cards.cd) for c in local]
    inverse = np.linalg.inv(cd)
    distortion = [row[0] * in_pixels[0] + row[1] * in_pixels[1] for row in inverse]
    for c in distortion:
        c[0, 0] = c[1, 0] = c[0, 1] = 0.0
    a, b = trim(*distortion)
    crpix = cards.crpix + np.linalg.solve(cards.cd, root)
    sip = (a, b) if a.shape[0] >= 3 else None
    return replace(cards, projection="TAN", crpix=crpix, cd=cd, pv={}, sip=sip)


def _tpv_polynomials(pv: dict[tuple[int, int], float]) -> list[NDArray]:
    """Return the two polynomials of a TPV distortion, without its radial terms."""
    polynomials = np.zeros((2, _MAX_TPV_ORDER + 1, _MAX_TPV_ORDER + 1))
    terms = {axis: _tpv_terms(axis) for axis in (1, 2)}
    for (axis, m), value in ({(1, 1): 1.0, (2, 1): 1.0} | pv).items():
        if m not in _RADIAL_TERMS:
            polynomials[axis - 1][terms[axis][m]] = value
    return trim(*polynomials)
