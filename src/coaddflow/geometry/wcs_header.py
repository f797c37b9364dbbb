"""World coordinates in FITS headers, read and written.

Inside coaddflow a fitted WCS is TAN-SIP. Files carry TPV [1]_, because SWarp and source-extractor
read TPV and not SIP. Both are a polynomial from pixels to the tangent plane, so that each can be
written as the other by algebra, without a fit.

References
----------
.. [1] Calabretta et al. 2004, draft of "Representations of distortions in FITS world coordinate
   systems"; and the registered convention TPV, https://fits.gsfc.nasa.gov/registry/tpvwcs.html.
.. [2] Calabretta & Greisen 2002, A&A 395, 1077.
.. [3] FITS Standard 4.0 (2018), section 8 (RADESYS, EQUINOX, EPOCH; CD, PC, CDELT and CROTA).
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import PRJ_CODES, WCS, FITSFixedWarning
from numpy.typing import NDArray

from coaddflow.errors import InputError
from coaddflow.geometry.angles import parse_number
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

_UNITS = {"": 1.0, "deg": 1.0, "degree": 1.0, "degrees": 1.0}
_UNITS |= {"arcmin": 1 / 60.0, "arcsec": 1 / 3600.0, "mas": 1 / 3600e3}
_UNITS |= {"rad": float(np.degrees(1.0)), "radian": float(np.degrees(1.0))}

_PIXEL_SCALES = (1e-9, 10.0)
"""Smallest and largest size of a pixel that is believed, degrees."""

_FIT_TOLERANCE = 1e-3
"""Largest error of a distortion that is fitted, pixels."""

_SOLVE = "solve the image's astrometry first, or correct the card"

Say = Callable[[str], None]


class _NotUnderstoodError(ValueError):
    """A card is not understood; its second argument is the remedy."""


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
    if _distance(wcs, build_wcs(_read_cards(header, log.warning))) > 1e-6:
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


def read_wcs(header: fits.Header, path: str | Path | None = None, say: Say | None = None) -> WCS:
    """Read the celestial WCS of an image header.

    Read are all projections that astropy knows (TAN, SIN, ...), with SIP; TPV, which becomes
    TAN-SIP (exactly, if it has no radial terms); PV with RA---TAN as SCAMP writes it (taken as
    TPV); CD, PC with CDELT, or CROTA2; axes in either order; units other than degrees. What SIP of
    up to order 7 on TAN cannot say exactly (SIP of order 8 and 9, SIP on other projections, radial
    terms of TPV, frames other than ICRS) becomes TAN-SIP by a fit that is good to 1e-3 pixel.
    FK5 of equinox J2000 is taken as ICRS: they differ by less than 0.03 arcsec, and most headers
    that say FK5 were fitted to catalogues in ICRS. FK4 and other equinoxes are converted.

    Where cards contradict each other, CTYPE and the newer convention count [3]_, and it is said.

    Parameters
    ----------
    header : astropy.io.fits.Header
        The header of the image; not changed.
    path : str or Path, optional
        Its file, for messages.
    say : callable, optional
        Takes each contradiction, as a sentence; default: a warning in the log.

    Returns
    -------
    astropy.wcs.WCS
        Two axes, right ascension first, with ``array_shape`` if the header has NAXIS1, NAXIS2.

    Raises
    ------
    InputError
        If there is no usable celestial WCS; the message says which cards are at fault.
    """
    where = f"{path}: " if path is not None else ""
    say = say or (lambda text: log.warning("%s%s", where, text))
    try:
        cards, frame = _read_cards(header, say), _read_frame(header, say)
        with warnings.catch_warnings():
            # units and defaults are settled above: what astropy still fixes does not matter
            warnings.simplefilter("ignore", FITSFixedWarning)
            wcs = _build(cards)
            if frame is not None:
                wcs = _to_icrs(wcs, *frame)
            if not np.isfinite(pixel_to_sky(wcs, *centre_pixel(wcs))).all():
                raise ValueError("it does not reach the sky at the image's centre")
    except (
        ValueError,
        KeyError,
        TypeError,
        ArithmeticError,
        np.linalg.LinAlgError,
        fits.VerifyError,
    ) as error:
        cause = error.args[0] if error.args else error
        remedy = error.args[1] if isinstance(error, _NotUnderstoodError) else _SOLVE
        raise InputError(f"has no usable WCS: {cause}", path=path, remedy=remedy) from error
    return wcs


def _build(cards: WcsCards) -> WCS:
    """Return the WCS of cards, in a form that `wcs_to_header` can write."""
    if cards.projection == "TPV":
        return _build_tpv(cards)
    if cards.sip is None:
        return build_wcs(cards)
    cards = replace(cards, sip=tuple(trim(*cards.sip)))
    order = cards.sip[0].shape[0] - 1
    if cards.projection == "TAN" and order <= _MAX_TPV_ORDER:
        return build_wcs(cards)
    native = build_wcs(cards)
    what = f"its {cards.projection}-SIP of order {order}"
    return _fitted(lambda x, y: pixel_to_sky(native, x, y), cards.shape, what)


def _fitted(to_sky: Callable, shape: tuple[int, int] | None, what: str) -> WCS:
    """Return a mapping as TAN-SIP; ValueError if that cannot be done to 1e-3 pixel."""
    if shape is None:
        raise ValueError(f"{what} is only read from the header of an image (NAXIS1, NAXIS2)")
    wcs = fit_tan_sip(to_sky, shape, max_order=_MAX_TPV_ORDER)
    ny, nx = shape
    # between the points of the fit, and up to the edges
    x, y = (p.ravel() for p in np.meshgrid(np.linspace(0, nx - 1, 29), np.linspace(0, ny - 1, 29)))
    centre = [float(value[0]) for value in to_sky(*(np.array([(n - 1) / 2.0]) for n in (nx, ny)))]
    truth, found = (np.stack(tan_project(*f(x, y), *centre)) for f in (to_sky, _mapping(wcs)))
    error = np.abs(np.linalg.solve(wcs.pixel_scale_matrix, found - truth)).max()
    if not error < _FIT_TOLERANCE:
        raise _NotUnderstoodError(
            f"{what} cannot be written as TAN-SIP of order {_MAX_TPV_ORDER} or lower: a fit is off "
            f"by {error:.2g} pixels",
            "solve the image's astrometry again with TPV, or SIP on TAN of a lower order",
        )
    return wcs


def _mapping(wcs: WCS) -> Callable:
    return lambda x, y: pixel_to_sky(wcs, x, y)


def _to_icrs(wcs: WCS, frame: str, equinox: float) -> WCS:
    """Return a WCS of another equatorial frame as one of ICRS.

    Coordinates of FK4 have the small terms of aberration (E-terms), so that this is no rotation.
    """
    from astropy.coordinates import FK4, FK5, FK4NoETerms, SkyCoord

    kind = {"FK4": FK4, "FK4-NO-E": FK4NoETerms, "FK5": FK5}[frame]
    system = kind(equinox=f"{'J' if frame == 'FK5' else 'B'}{equinox:.6f}")

    def to_sky(x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
        place = SkyCoord(*pixel_to_sky(wcs, x, y), unit="deg", frame=system).icrs
        return place.ra.deg, place.dec.deg

    return _fitted(to_sky, wcs.array_shape, f"its frame ({frame}, equinox {equinox:g})")


def _read_cards(header: fits.Header, say: Say) -> WcsCards:
    """Collect and check the numbers of the WCS; ValueError and KeyError name the card."""
    ctypes = [str(_card(header, f"CTYPE{axis}") or "").strip().upper() for axis in (1, 2)]
    if not all(ctypes):
        raise ValueError("CTYPE1 and CTYPE2 are missing")
    order = _axis_order(ctypes)
    if any(key.startswith(("CPDIS", "CQDIS", "D2IMDIS")) for key in header):
        raise ValueError("its distortion is a look-up table (CPDIS, D2IMDIS), which is not read")
    needed = [f"{name}{axis}" for name in ("CRVAL", "CRPIX") for axis in (1, 2)]
    missing = [key for key in needed if _card(header, key) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    projection, pv, sip = _read_distortion(header, [ctypes[i] for i in order], order, say)
    units = np.array([_read_unit(header, axis) for axis in (1, 2)])
    crval = (np.array([_number(header, f"CRVAL{axis}") for axis in (1, 2)]) * units)[order]
    crpix = np.array([_number(header, f"CRPIX{axis}") for axis in (1, 2)])
    for name, value, limit in (("right ascension", crval[0], 720), ("declination", crval[1], 90)):
        if abs(value) > limit:
            of_unit = ", with CUNIT1 and CUNIT2" if (units != 1.0).any() else ""
            raise ValueError(f"CRVAL of the {name} is {value:g} degrees{of_unit}")
    if np.abs(crpix).max() > 1e8:
        raise ValueError(f"CRPIX is {crpix[0]:g}, {crpix[1]:g}")
    cd = (units[:, None] * _read_cd(header, say))[order]
    scale = np.sqrt(abs(np.linalg.det(cd)))
    if not _PIXEL_SCALES[0] < scale < _PIXEL_SCALES[1]:
        raise ValueError(f"its pixels have a size of {3600.0 * scale:.3g} arcsec (CD, CDELT)")
    return WcsCards(
        projection=projection,
        crval=crval,
        crpix=crpix,
        cd=cd,
        pv=pv,
        sip=sip,
        pole=tuple(_number(header, key, None) for key in ("LONPOLE", "LATPOLE")),
        shape=_read_shape(header),
    )


def _card(header: fits.Header, key: str) -> object | None:
    """Return the value of a card, None if there is none or it is empty.

    A value that FITS does not know, such as NaN without quotes, comes as its text.
    """
    if key not in header:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fits.verify.VerifyWarning)
        try:
            value = header[key]
        except Exception:  # astropy raises VerifyError, ValueError and others on odd cards
            image = str(header.cards[key].image)
            value = image[10:].partition("/")[0].strip() if image[8:9] == "=" else image[8:].strip()
    absent = isinstance(value, fits.card.Undefined) or value is None
    return None if absent or (isinstance(value, str) and not value.strip()) else value


def _read_unit(header: fits.Header, axis: int) -> float:
    """Return the degrees of one CUNIT."""
    unit = str(_card(header, f"CUNIT{axis}") or "").strip().lower()
    if unit not in _UNITS:
        raise _NotUnderstoodError(
            f"CUNIT{axis} is {unit!r}", f"write one of {', '.join(filter(None, _UNITS))}"
        )
    return _UNITS[unit]


def _axis_order(ctypes: list[str]) -> list[int]:
    """Return the indices of the axes of right ascension and of declination."""
    names = [ctype[:5].rstrip("-") for ctype in ctypes]
    if sorted(names) != ["DEC", "RA"]:
        raise ValueError(f"the axes are {ctypes[0]!r} and {ctypes[1]!r}, not RA and DEC")
    return [names.index("RA"), names.index("DEC")]


def _read_frame(header: fits.Header, say: Say) -> tuple[str, float] | None:
    """Return the frame and equinox of FK4 or FK5; None for ICRS, and FK5 of J2000 taken as it."""
    named = _card(header, "RADESYS") or _card(header, "RADECSYS") or ""
    named = str(named).strip().upper()
    if named == "ICRS":
        return None  # whatever the equinox says
    # such as FK5/J2000, or J2000 alone
    frame = re.sub(r"[\s/,()]*(J2000|B1950)[\s.0)]*$", "", named)
    if frame not in ("", "FK4", "FK4-NO-E", "FK5"):
        remedy = "convert the WCS to ICRS, or correct RADESYS"
        raise _NotUnderstoodError(f"its frame is {named!r}", remedy)
    year = _read_equinox(header)
    if year is None and frame != named:
        year = 2000.0 if "2000" in named else 1950.0
    if year is None:
        year = 1950.0 if frame.startswith("FK4") else 2000.0
    if not frame:
        frame = "FK4" if year < 1984.0 else "FK5"  # as the standard has it [3]_
    if frame == "FK5" and abs(year - 2000.0) <= 0.1:
        log.debug("FK5 J2000 taken as ICRS")
        return None
    say(f"its frame is {frame}, equinox {year:g}: converted to ICRS")
    return frame, year


def _read_equinox(header: fits.Header) -> float | None:
    """Return the year of EQUINOX or EPOCH, such as 2000.0, J2000, 'B1950.0'; None if not given."""
    key = "EQUINOX" if _card(header, "EQUINOX") is not None else "EPOCH"
    text = str(_card(header, key) or "").strip("'\" ").upper()
    if text in ("", "NAN", "ICRS"):
        return None
    match = re.fullmatch(r"[JB]?\s*(\d{4}(?:\.\d*)?)(?:[ED]\+?0+)?", text)
    year = float(match[1]) if match else 0.0
    if not 1800.0 <= year <= 2200.0:
        remedy = f"write the year, such as 2000.0, or RADESYS = 'ICRS' if {key} does not matter"
        raise _NotUnderstoodError(f"{key} is {text!r}, and its frame is not ICRS", remedy)
    if key == "EPOCH" and min(abs(year - 1950.0), abs(year - 2000.0)) > 0.1:
        raise _NotUnderstoodError(
            f"EPOCH is {year:g}, which may be the equinox or the time of the exposure",
            "add EQUINOX, or RADESYS = 'ICRS'",
        )
    return year


def _number(header: fits.Header, key: str, default: float | None = np.nan) -> float | None:
    """Return a finite number; without a default the card must be there."""
    value = _card(header, key)
    if value is None:
        if default is None or np.isfinite(default):
            return default
        raise ValueError(f"{key} is missing")
    try:
        number, unit = parse_number(value)
    except ValueError:
        number, unit = np.nan, ""
    if not np.isfinite(number) or unit.lower() not in _UNITS or _UNITS[unit.lower()] != 1.0:
        raise ValueError(f"{key} is {value!r}, not a number")
    return number


def _read_cd(header: fits.Header, say: Say) -> NDArray[np.float64]:
    """Return degrees per pixel from CDi_j, or PCi_j and CDELTi, or CDELTi and CROTA2 [2]_."""
    has_cd = _has(header, _matrix_names("CD{}_{}"))
    # the second way is that of an old draft
    pc_forms = [form for form in ("PC{}_{}", "PC{:03d}{:03d}") if _has(header, _matrix_names(form))]
    has_pc = bool(pc_forms)
    has_cdelt = all(_has(header, [f"CDELT{axis}"]) for axis in (1, 2))
    if has_cd:
        cd = _read_matrix(header, "CD{}_{}", np.zeros((2, 2)))
    else:
        missing = [f"CDELT{axis}" for axis in (1, 2) if not _has(header, [f"CDELT{axis}"])]
        if missing:
            raise ValueError(f"{' and '.join(missing)} (or CD1_1, CD1_2, CD2_1, CD2_2) missing")
        cdelt = np.array([_number(header, f"CDELT{axis}") for axis in (1, 2)])
        if has_pc:
            cd = cdelt[:, None] * _read_matrix(header, pc_forms[0], np.eye(2))
        else:
            angle = np.radians(_number(header, "CROTA2", _number(header, "CROTA1", 0.0)))
            sin, cos = np.sin(angle), np.cos(angle)
            cd = np.array([[cdelt[0] * cos, -cdelt[1] * sin], [cdelt[0] * sin, cdelt[1] * cos]])
    _say_contradictions(header, cd, has_cd, has_pc, has_cdelt, say)
    scale = np.sqrt(abs(np.linalg.det(cd)))
    if scale < 1e-6 * np.abs(cd).max() or scale == 0.0:
        raise ValueError("its CD (or CDELT) matrix is singular")
    return cd


def _matrix_names(form: str) -> list[str]:
    return [form.format(i, j) for i in (1, 2) for j in (1, 2)]


def _read_matrix(header: fits.Header, form: str, default: NDArray) -> NDArray[np.float64]:
    """Return a matrix from its four cards; elements without a card are those of the default."""
    pairs = zip(_matrix_names(form), default.ravel(), strict=True)
    return np.array([_number(header, key, value) for key, value in pairs]).reshape(2, 2)


def _has(header: fits.Header, keys: Iterable[str]) -> bool:
    return any(_card(header, key) is not None for key in keys)


def _say_contradictions(
    header: fits.Header, cd: NDArray, has_cd: bool, has_pc: bool, has_cdelt: bool, say: Say
) -> None:
    """Say which ways to write the pixel matrix disagree, and which counts."""
    if has_cd and has_cdelt:
        cdelt = [abs(_number(header, f"CDELT{axis}", 1.0)) for axis in (1, 2)]
        scale = np.sqrt(abs(np.linalg.det(cd)))
        if cdelt != [1.0, 1.0] and abs(np.sqrt(cdelt[0] * cdelt[1]) / (scale or 1.0) - 1.0) > 0.01:
            say("CD and CDELT give different pixel scales: CD counts")
    if has_cd and has_pc:
        say("it has CD and PC cards: CD counts")
    if not has_cd and has_pc and _number(header, "CROTA2", 0.0) != 0.0:
        say("it has PC cards and CROTA2: PC counts")


def _read_distortion(
    header: fits.Header, ctypes: list[str], order: list[int], say: Say
) -> tuple[str, dict[tuple[int, int], float], tuple[NDArray, NDArray] | None]:
    """Return the projection, its PV values, and SIP; CTYPE says which of them count.

    ``ctypes`` are those of right ascension and declination.
    """
    codes = [ctype[5:].strip("-").split("-") for ctype in ctypes]
    projection = codes[0][0]
    if codes[1][0] != projection:
        raise ValueError(f"CTYPE says {projection} for one axis and {codes[1][0]} for the other")
    if projection not in {*PRJ_CODES, "TPV"}:
        raise ValueError(f"projection {projection!r} is not known")
    says_sip = ["SIP" in code[1:] for code in codes]
    pv = _read_pv(header, order)
    is_scamp = projection == "TAN" and any(axis == 2 or m > 4 for axis, m in pv)
    if not any(says_sip):
        if "A_ORDER" in header or "B_ORDER" in header:
            say(f"CTYPE is {projection} without -SIP: its SIP cards (A_ORDER, ...) are not used")
        if projection == "TPV" or is_scamp:
            return "TPV", pv, None
        return projection, {} if projection == "TAN" else pv, None
    if not all(says_sip):
        say("CTYPE says SIP for one axis only: it is used for both")
    sip = _read_sip(header)
    if sip is None:
        raise ValueError("CTYPE says SIP, but A_ORDER or B_ORDER is missing")
    if projection in ("TAN", "TPV") and _is_distorted(pv):
        say("CTYPE says SIP: its PV cards are not used")
    return ("TAN", {}, sip) if projection in ("TAN", "TPV") else (projection, pv, sip)


def _is_distorted(pv: dict[tuple[int, int], float]) -> bool:
    """Return whether PV values, taken as TPV, are more than the identity."""
    return any(value != (1.0 if m == 1 else 0.0) for (_, m), value in pv.items() if m != 3)


def _read_pv(header: fits.Header, order: list[int]) -> dict[tuple[int, int], float]:
    """Return the PV values by (axis, index), axis 1 being right ascension."""
    found = filter(None, map(_PV_CARD.fullmatch, header))
    pv = {(order.index(int(m[1]) - 1) + 1, int(m[2])): _number(header, m[0]) for m in found}
    return {key: value for key, value in pv.items() if key[1] <= _RADIAL_TERMS[-1]}


def _read_sip(header: fits.Header) -> tuple[NDArray, NDArray] | None:
    """Return the SIP polynomials, of one common order, or None."""
    if "A_ORDER" not in header or "B_ORDER" not in header:
        return None
    orders = [_number(header, f"{name}_ORDER") for name in "AB"]
    if not all(0 <= order <= 9 and order.is_integer() for order in orders):
        raise ValueError(f"A_ORDER, B_ORDER are {orders}")
    size = max(*map(int, orders), 2) + 1
    polynomials = {name: np.zeros((size, size)) for name in "AB"}
    for match in filter(None, map(_SIP_CARD.fullmatch, header)):
        if int(match[2]) + int(match[3]) < size:
            polynomials[match[1]][int(match[2]), int(match[3])] = _number(header, match[0])
    return polynomials["A"], polynomials["B"]


def _read_shape(header: fits.Header) -> tuple[int, int] | None:
    """Return (ny, nx) from NAXIS2, NAXIS1 (or ZNAXIS of a compressed image)."""
    for prefix in ("ZNAXIS", "NAXIS"):
        size = [_card(header, f"{prefix}{axis}") for axis in (2, 1)]
        if all(isinstance(n, int) and n > 0 for n in size):
            return (size[0], size[1])
    return None


def _build_tpv(cards: WcsCards) -> WCS:
    """Return a TPV WCS as TAN-SIP; ValueError if that cannot be done to 1e-3 pixel."""
    if not any(m in _RADIAL_TERMS and value != 0.0 for (_, m), value in cards.pv.items()):
        return build_wcs(_tpv_to_sip(cards))
    return _fitted(_mapping(build_wcs(cards)), cards.shape, "TPV with radial terms")


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
