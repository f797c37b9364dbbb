"""Raw pixels of one CCD, read once and checked.

Only the extensions of one CCD are read, whatever else the file holds.

References
----------
.. [1] Pence et al. 2010, A&A 524, A42 (FITS 3.0: BZERO, DATASUM).
.. [2] White et al. 2012, "Tiled Image Convention for Storing Compressed Images in FITS".
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from numpy.typing import NDArray

from coaddflow.errors import CcdFailure, Reason
from coaddflow.image.checksum import wrong_sum
from coaddflow.image.fits_hdus import (
    BLOCK,
    HduHeader,
    NotFitsError,
    as_plane,
    data_sum,
    is_plain,
    open_fits,
    problem_of,
    read_data,
    walk_hdus,
)
from coaddflow.instrument.camera import Amplifier, Camera, Detector
from coaddflow.instrument.header_values import FileHeaders, HeaderValueError, header_number
from coaddflow.instrument.undefined import filled_areas, with_nan, without_undefined
from coaddflow.settings.value_key import ValueKey
from coaddflow.tables.exposures import ccd_file

_LOG = logging.getLogger(__name__)

_COPY_AGAIN = "Copy it again from the archive"
_OTHER_READOUT = "Correct the camera file, or drop the exposure if it was read out otherwise"

_SAYS = {
    Reason.NOT_FITS: "is not FITS: {}. Replace it or drop the exposure",
    Reason.TRUNCATED_FILE: "ends too early ({}). " + _COPY_AGAIN,
    Reason.MISSING_FILE: "cannot be read ({}). Put it back or drop the exposure from the table",
    Reason.DAMAGED_FILE: "is damaged ({}). " + _COPY_AGAIN,
}

_BINNING = (("CCDSUM",), ("XBINNING", "YBINNING"), ("CCDXBIN", "CCDYBIN"), ("BIN-FCT1", "BIN-FCT2"))

_LEAST_LIMIT = 1 << 26
"""Bytes that an HDU of a compressed file may have, whatever the CCDs need (tables, guiders)."""

OpenFile = Callable[[Path], AbstractContextManager[BinaryIO]]
"""Opens a file for `walk_hdus`."""

# what is looked for in a file, beside names and numbers of HDUs
_HEADER = "header of the exposure"
_FIRST_IMAGE = "first image"


@dataclass(frozen=True)
class RawCcd:
    """One CCD as it was read out."""

    detector: Detector
    """The CCD; gain, read noise and saturation of its amplifiers are those of the header where the
    camera file names keywords for them."""
    arrays: tuple[NDArray, ...]
    """For every amplifier the array of the file, shape (ny, nx), in which its data, prescan and
    overscan sections stand. In a file with one HDU per CCD all entries are the same array. Pixels
    without a measurement are NaN: undefined ones, and what was filled with a constant."""
    header: fits.Header
    """Header of the CCD's (first) HDU."""
    exposure_header: fits.Header
    """Header that describes the exposure (``layout.header_hdu`` of the camera file)."""
    path: Path
    """The file."""


def read_raw_ccd(
    path: str | Path,
    camera: Camera,
    detector: Detector,
    check: bool = True,
    open_file: OpenFile = open_fits,
    full_at_maximum: bool = False,
) -> RawCcd:
    """Read one CCD of a raw exposure.

    Parameters
    ----------
    path : str or Path
        The exposure's file; with one file per CCD, ``{ccd}`` or ``{ccd+00123400}`` in it stands
        for the CCD (`tables.exposures.ccd_file`). Gzip, bzip2 and fpack files are read as they are.
    check : bool
        Verify DATASUM and CHECKSUM where they stand in the header, and refuse data that end in
        zero bytes.
    open_file : callable
        `open_fits`, or a `KeptOpen` for CCDs that stand in the same file.
    full_at_maximum : bool
        Take the largest value of each amplifier for its saturation, whatever camera and header
        say: where saturation is to be measured.

    Returns
    -------
    RawCcd
        Pixels in the type of the file; integers with BZERO as unsigned integers. Where there are
        pixels without a measurement they are floating-point numbers, with NaN.

    Raises
    ------
    CcdFailure
        With the reason ``missing_file``, ``not_fits``, ``truncated_file``, ``damaged_file``,
        ``missing_extension``, ``wrong_shape``, ``missing_keyword``, or, if no amplifier has a
        measured pixel, ``all_nan``, ``all_zero`` or ``constant_image``; the message names the
        file and the remedy.
    """
    path = Path(ccd_file(str(path), detector.extension))
    try:
        return _read(path, camera, detector, check, open_file, full_at_maximum)
    except CcdFailure:
        raise
    except Exception as error:
        found = problem_of(error)
        if found is None:
            raise
        reason, cause = found
        raise CcdFailure(reason, f"{path} {_SAYS[reason].format(cause)}") from error


def _read(
    path: Path,
    camera: Camera,
    detector: Detector,
    check: bool,
    open_file: OpenFile,
    full_at_maximum: bool,
) -> RawCcd:
    """Read one CCD from its file."""
    wanted: dict[str | int, list[Amplifier]] = {}
    for amplifier in detector.amplifiers:
        wanted.setdefault(amplifier_hdu(camera, detector, amplifier), []).append(amplifier)
    with open_file(path) as stream:
        hdus = _read_hdus(path, stream, wanted, camera.layout.header_hdu, detector, check)
    exposure_header = hdus[_HEADER].header
    amplifiers = []
    extensions = [amplifier_hdu(camera, detector, one) for one in detector.amplifiers]
    for amplifier, extension in zip(detector.amplifiers, extensions, strict=True):
        own = hdus[extension]
        found = _with_header_values(path, amplifier, [own.header, exposure_header])
        amplifiers.append(_with_own_maximum(found, own.data) if full_at_maximum else found)
    detector = detector.model_copy(update={"amplifiers": tuple(amplifiers)})
    data = {extension: hdus[extension].data for extension in wanted}
    measured = _without_what_was_not_read(path, detector, extensions, data)
    return RawCcd(
        detector,
        tuple(measured[extension] for extension in extensions),
        hdus[next(iter(wanted))].header,
        exposure_header,
        path,
    )


def byte_ranges(
    stream: BinaryIO, camera: Camera, detectors: Iterable[Detector]
) -> dict[int, list[tuple[int, int]]]:
    """Return where in a file the pixels of CCDs stand: first byte and end of each part, by CCD.

    Empty for a compressed file, whose bytes have other places. What stands behind damage in the
    file is missing.
    """
    if not is_plain(stream):
        return {}
    names = {
        detector.id: {amplifier_hdu(camera, detector, one) for one in detector.amplifiers}
        for detector in detectors
    }
    parts: dict[int, list[tuple[int, int]]] = {ccd: [] for ccd in names}
    missing = sum(map(len, names.values()))
    with contextlib.suppress(NotFitsError, EOFError):
        for hdu in walk_hdus(stream):
            start = stream.tell()
            for ccd, wanted in names.items():
                if any(is_hdu(name, hdu) for name in wanted):
                    parts[ccd].append((start, start + hdu.data_size))
                    missing -= 1
            if missing == 0:
                break
    return parts


@dataclass(frozen=True)
class _Hdu:
    header: fits.Header
    data: NDArray | None


def amplifier_hdu(camera: Camera, detector: Detector, amplifier: Amplifier) -> str | int:
    """Return the HDU in which an amplifier stands, for `is_hdu`."""
    if amplifier.extension is not None:
        return amplifier.extension
    return _FIRST_IMAGE if camera.layout.files == "ccd" else detector.extension


def _read_hdus(
    path: Path,
    stream: BinaryIO,
    wanted: dict[str | int, list[Amplifier]],
    header_hdu: int,
    detector: Detector,
    check: bool,
) -> dict[str | int, _Hdu]:
    """Return the wanted HDUs, and under `_HEADER` the header of the exposure."""
    found: dict[str | int, _Hdu] = {}
    n_hdus = 0
    for hdu in walk_hdus(stream, largest_hdu([detector])):
        n_hdus += 1
        if hdu.index == header_hdu:
            found[_HEADER] = _Hdu(hdu.header, None)
        names = [name for name in wanted if name not in found and is_hdu(name, hdu)]
        if names:
            amplifiers = [amplifier for name in names for amplifier in wanted[name]]
            problem = shape_problem(hdu, detector, amplifiers)
            if problem:
                raise CcdFailure(Reason.WRONG_SHAPE, f"{path}: {problem}. {_OTHER_READOUT}")
            body = read_data(stream, hdu)
            if check:
                _check_bytes(path, hdu, body)
            pixels = without_undefined(decode_image(path, hdu, body), hdu.header)
            read = _Hdu(hdu.header, pixels)
            found.update(dict.fromkeys(names, read))
        if len(found) == len(wanted) + 1:
            return found
    missing = [repr(name) for name in sorted(map(str, {*wanted, _HEADER} - found.keys()))]
    raise CcdFailure(
        Reason.MISSING_EXTENSION,
        f"{path} has {n_hdus} HDUs, none of them is {' or '.join(missing)}. "
        "Compare the camera file with the file's extensions",
    )


def is_hdu(name: str | int, hdu: HduHeader) -> bool:
    """Tell whether an HDU is the one that the camera file asks for."""
    if name == _FIRST_IMAGE:
        return hdu.is_image
    if isinstance(name, int):
        # fpack moves an image from the primary HDU to the first extension
        moved = name == 0 and hdu.index == 1 and hdu.is_compressed
        return moved or (hdu.index == name and (name > 0 or hdu.data_size > 0))
    return hdu.name == name.upper()


def largest_hdu(detectors: Sequence[Detector]) -> int:
    """Return the bytes that data in raw files of these CCDs can have: far more than they need."""
    pixels = max(nx * ny for one in detectors for nx, ny in [_extent(one, one.amplifiers)])
    return max(_LEAST_LIMIT, 32 * pixels)


def shape_problem(hdu: HduHeader, detector: Detector, amplifiers: Sequence[Amplifier]) -> str:
    """Compare the size of an array in a file with the sections of its amplifiers.

    Returns
    -------
    str
        What is wrong, in one sentence; empty if the amplifiers can be read.
    """
    shape = hdu.shape
    if len(shape) != 2:
        return f"HDU {hdu.index} is not an image of two dimensions"
    ny, nx = shape
    what = f"CCD {detector.id} has {nx} x {ny} raw pixels"
    for amplifier in amplifiers:
        for section in (amplifier.data, amplifier.overscan, amplifier.prescan):
            if section is not None and not (
                0 <= section[0] < section[2] <= nx and 0 <= section[1] < section[3] <= ny
            ):
                lies = f"section {section} of amplifier {amplifier.name} is not there"
                return f"{what}{_binning_text(hdu)}, and {lies}"
    extent = _extent(detector, amplifiers)
    if detector.raw_size is not None and len(amplifiers) == len(detector.amplifiers):
        if (nx, ny) != detector.raw_size:
            size = f"{detector.raw_size[0]} x {detector.raw_size[1]}"
            return f"{what}{_binning_text(hdu)}, and the camera file says raw_size {size}"
    elif nx >= 2 * extent[0] or ny >= 2 * extent[1]:
        return f"{what}, and the sections of its amplifiers end at {extent[0]} x {extent[1]}"
    return ""


def _extent(detector: Detector, amplifiers: Sequence[Amplifier]) -> tuple[int, int]:
    """Return the columns and rows up to which the sections of amplifiers reach."""
    if detector.raw_size is not None:
        return detector.raw_size
    boxes = [box for one in amplifiers for box in (one.data, one.overscan, one.prescan) if box]
    return max(box[2] for box in boxes), max(box[3] for box in boxes)


def _binning_text(hdu: HduHeader) -> str:
    """Return what the header says of binning, if it is more than 1 x 1."""
    for names in _BINNING:
        said = ""
        with contextlib.suppress(fits.VerifyError, NotFitsError):  # nobody needs the card
            said = " ".join(str(hdu.header.get(name, "")) for name in names).strip()
        if re.search(r"[2-9]", said):
            return f" ({' '.join(names)} says {said!r}: it is binned)"
    return ""


def decode_image(path: Path, hdu: HduHeader, body: bytes) -> NDArray:
    """Turn the bytes of an HDU into pixels, shape `HduHeader.shape`; CcdFailure if that fails."""
    is_scaled = any(keyword in hdu.header for keyword in ("BSCALE", "BZERO"))
    if not hdu.is_compressed and hdu.keywords["BITPIX"] < 0 and not is_scaled:
        kind = f"f{hdu.pixel_bytes}"
        return np.frombuffer(body, f">{kind}").reshape(hdu.shape).astype(kind)
    is_primary = hdu.index == 0
    primary = b"" if is_primary else fits.PrimaryHDU().header.tostring().encode("ascii")
    try:
        with warnings.catch_warnings():
            # What astropy has to say about the style of a header does not matter here: the data
            # are complete, and the keywords that tell their format have been read.
            warnings.simplefilter("ignore", AstropyWarning)
            whole = b"".join([primary, hdu.text, body, b"\0" * (-len(body) % BLOCK)])
            with fits.HDUList.fromstring(whole) as hdus:
                data = hdus[0 if is_primary else 1].data
    except MemoryError:
        raise
    except Exception as error:  # astropy raises anything, AttributeError too, on damaged cards
        raise CcdFailure(
            Reason.DAMAGED_FILE,
            f"{path}: HDU {hdu.index} cannot be decoded ({error}). {_COPY_AGAIN}",
        ) from error
    data = as_plane(np.asarray(data))
    if data.shape != hdu.shape or data.dtype.kind not in "iuf":
        cause = f"it has {data.shape} pixels of {data.dtype}, its header says {hdu.shape}"
        raise CcdFailure(Reason.DAMAGED_FILE, f"{path}: HDU {hdu.index}: {cause}. {_COPY_AGAIN}")
    return data.astype(data.dtype.newbyteorder("="), copy=False)


def _check_bytes(path: Path, hdu: HduHeader, body: bytes) -> None:
    """Refuse an HDU with a wrong DATASUM or CHECKSUM, or with zeros where a copy broke off."""
    problem = wrong_sum(hdu, data_sum(body))
    if problem:
        raise CcdFailure(
            Reason.DAMAGED_FILE,
            f"{path}: HDU {hdu.index} {problem}. {_COPY_AGAIN}, "
            "or set detrend.check_raw to false if the header was edited or the archive's sums are "
            "known to be wrong",
        )
    if str(hdu.keywords.get("DATASUM", "0")).strip(" '") not in ("", "0"):
        return  # the file is whole: where it ends in zeros, they were read
    words = np.frombuffer(body, dtype=">u4", count=len(body) // 4)
    n_zeros = 4 * int(np.argmax(words[::-1] != 0)) if words.any() else 0
    row = hdu.pixel_bytes * hdu.shape[-1]
    if not hdu.is_compressed and n_zeros >= row + 4:
        raise CcdFailure(
            Reason.TRUNCATED_FILE,
            f"{path}: the data of HDU {hdu.index} end in {n_zeros} zero bytes, as a broken copy "
            f"leaves them. {_COPY_AGAIN}, or set detrend.check_raw to false if the camera writes "
            "them",
        )


def _without_what_was_not_read(
    path: Path, detector: Detector, extensions: list[str | int], data: dict[str | int, NDArray]
) -> dict[str | int, NDArray]:
    """Return arrays with NaN where nothing was read; refuse a CCD of which nothing was.

    One dead amplifier does not take the others with it.
    """
    nothing = _dead_amplifiers(path, detector, extensions, data)
    measured = {}
    for extension, array in data.items():
        pairs = zip(detector.amplifiers, extensions, strict=True)
        own = [amplifier for amplifier, of in pairs if of == extension]
        alive = [amplifier for amplifier in own if amplifier.name not in nothing]
        unread = filled_areas(array, alive)
        if unread is not None:
            _LOG.warning(
                "%s: %d pixels of CCD %d hold one and the same value along rows or columns, as in "
                "a readout that stopped: NO_DATA",
                path,
                np.count_nonzero(unread),
                detector.id,
            )
        for amplifier in own:
            if amplifier.name in nothing:
                unread = np.zeros(array.shape, bool) if unread is None else unread
                for x0, y0, x1, y1 in filter(None, (amplifier.data, amplifier.overscan)):
                    unread[y0:y1, x0:x1] = True
        measured[extension] = array if unread is None else with_nan(array, unread)
    return measured


def _dead_amplifiers(
    path: Path, detector: Detector, extensions: list[str | int], data: dict[str | int, NDArray]
) -> dict[str, str]:
    """Return the amplifiers without a measured value, and why; refuse a CCD that has no other."""
    nothing: dict[str, tuple[Reason | None, str]] = {}
    full: dict[str, tuple[None, str]] = {}
    for amplifier, extension in zip(detector.amplifiers, extensions, strict=True):
        why = _why_dead(amplifier, data[extension])
        if why is not None:
            nothing[amplifier.name] = why
        elif _pixels(amplifier, data[extension]).min() >= amplifier.saturation:
            full[amplifier.name] = None, "is saturated everywhere"
    if len(nothing | full) < len(detector.amplifiers):
        nothing |= full  # the light that fills all of them does not come from a fault
    if len(nothing) == len(detector.amplifiers):
        name, (reason, what) = next(iter(nothing.items()))
        raise CcdFailure(
            reason,
            f"{path}: amplifier {name} of CCD {detector.id} {what}. Drop the exposure or the CCD",
        )
    for name, (_, what) in nothing.items():
        _LOG.warning("%s: amplifier %s of CCD %d %s: BAD", path, name, detector.id, what)
    return {name: what for name, (_, what) in nothing.items()}


def _pixels(amplifier: Amplifier, data: NDArray) -> NDArray:
    x0, y0, x1, y1 = amplifier.data
    return data[y0:y1, x0:x1]


def _with_own_maximum(amplifier: Amplifier, data: NDArray) -> Amplifier:
    """Return an amplifier whose saturation is its largest value."""
    pixels = _pixels(amplifier, data)
    largest = np.max(pixels, initial=0, where=np.isfinite(pixels))
    return amplifier.model_copy(update={"saturation": float(largest)})


def _why_dead(amplifier: Amplifier, data: NDArray) -> tuple[Reason, str] | None:
    """Return why an amplifier has not a single measured value, None if it has."""
    pixels = _pixels(amplifier, data)
    first = pixels[0, 0]
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).any():
        return Reason.ALL_NAN, "has no finite pixel"
    if (pixels == first).all():
        reason = Reason.CONSTANT_IMAGE if first else Reason.ALL_ZERO
        return reason, f"has the value {first} everywhere: it was not read out"
    return None


def _with_header_values(path: Path, amplifier: Amplifier, headers: list) -> Amplifier:
    """Replace gain, read noise and saturation by what the headers say."""
    values, problem = amplifier_values(amplifier, headers)
    if problem:
        raise CcdFailure(
            Reason.MISSING_KEYWORD, f"{path}: {problem}. Correct the header or the camera file"
        )
    return amplifier.model_copy(update=values)


def amplifier_values(
    amplifier: Amplifier, headers: Sequence[fits.Header]
) -> tuple[dict[str, float], str]:
    """Return gain, read noise and saturation of those that headers give, and what is wrong."""
    values: dict[str, float] = {}
    for name, limit in (("gain", 1e4), ("read_noise", 1e5), ("saturation", 1e10)):
        keyword = getattr(amplifier, f"{name}_keyword")
        if keyword is None:
            continue
        key = ValueKey(keyword=keyword)
        image = FileHeaders(Path(), tuple(headers))
        try:
            values[name] = header_number(key, "gain" if name == "gain" else "value", image)
        except HeaderValueError as error:
            absent = "missing" if error.missing else f"not a valid number ({error})"
            return values, f"keyword {keyword} ({name} of amplifier {amplifier.name}) is {absent}"
        if not 0.0 <= values[name] <= limit or (values[name] == 0.0 and name != "read_noise"):
            number = f"not a valid number: {values[name]:g}"
            return values, f"keyword {keyword} ({name} of amplifier {amplifier.name}) is {number}"
    return values, ""
