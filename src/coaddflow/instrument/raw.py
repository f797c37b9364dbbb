"""Raw pixels of one CCD, read once and checked.

Only the extensions of one CCD are read, whatever else the file holds.

References
----------
.. [1] Pence et al. 2010, A&A 524, A42 (FITS 3.0: BZERO, DATASUM).
.. [2] White et al. 2012, "Tiled Image Convention for Storing Compressed Images in FITS".
"""

import logging
import math
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from numpy.typing import NDArray

from coaddflow.errors import CcdFailure, Reason
from coaddflow.instrument.camera import Amplifier, Camera, Detector
from coaddflow.instrument.fits_hdus import (
    BLOCK,
    HduHeader,
    NotFitsError,
    open_fits,
    read_data,
    walk_hdus,
)
from coaddflow.instrument.undefined import filled_areas, with_nan, without_undefined
from coaddflow.tables.exposures import ccd_file

_LOG = logging.getLogger(__name__)

_COPY_AGAIN = "Copy it again from the archive"

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
    path: str | Path, camera: Camera, detector: Detector, check: bool = True
) -> RawCcd:
    """Read one CCD of a raw exposure.

    Parameters
    ----------
    path : str or Path
        The exposure's file; with one file per CCD, ``{ccd}`` or ``{ccd+00123400}`` in it stands
        for the CCD (`tables.exposures.ccd_file`). Gzip, bzip2 and fpack files are read as they are.
    check : bool
        Verify DATASUM where it stands in the header, and refuse data that end in zero bytes.

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
    wanted = [_extension(camera, detector, amplifier) for amplifier in detector.amplifiers]
    hdus = _read_hdus(path, set(wanted), camera.layout.header_hdu, check)
    header = hdus[wanted[0]].header
    exposure_header = hdus[_HEADER].header
    amplifiers = []
    for amplifier, extension in zip(detector.amplifiers, wanted, strict=True):
        own = hdus[extension]
        _check_shape(path, detector, amplifier, own.data)
        amplifiers.append(_with_header_values(path, amplifier, [own.header, exposure_header]))
    detector = detector.model_copy(update={"amplifiers": tuple(amplifiers)})
    data = {extension: hdus[extension].data for extension in wanted}
    measured = _without_what_was_not_read(path, detector, wanted, data)
    return RawCcd(
        detector,
        tuple(measured[extension] for extension in wanted),
        header,
        exposure_header,
        path,
    )


@dataclass(frozen=True)
class _Hdu:
    header: fits.Header
    data: NDArray | None


def _extension(camera: Camera, detector: Detector, amplifier: Amplifier) -> str | int:
    """Return the HDU in which an amplifier stands."""
    if amplifier.extension is not None:
        return amplifier.extension
    return _FIRST_IMAGE if camera.layout.files == "ccd" else detector.extension


def _read_hdus(
    path: Path, wanted: set[str | int], header_hdu: int, check: bool
) -> dict[str | int, _Hdu]:
    """Return the wanted HDUs, and under `_HEADER` the header of the exposure."""
    try:
        found, n_hdus = _find_hdus(path, wanted, header_hdu, check)
    except NotFitsError as error:
        raise CcdFailure(
            Reason.NOT_FITS, f"{path} is not FITS: {error}. Replace it or drop the exposure"
        ) from error
    except EOFError as error:
        raise CcdFailure(Reason.TRUNCATED_FILE, f"{path} ends too early. {_COPY_AGAIN}") from error
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise CcdFailure(
            Reason.MISSING_FILE,
            f"{path} cannot be read ({error.strerror}). "
            "Put it back or drop the exposure from the table",
        ) from error
    except (zlib.error, OSError, fits.VerifyError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # trouble of the machine, not of the file
        raise CcdFailure(
            Reason.DAMAGED_FILE, f"{path} is damaged ({error}). {_COPY_AGAIN}"
        ) from error
    missing = [repr(name) for name in sorted(map(str, (wanted | {_HEADER}) - found.keys()))]
    if missing:
        raise CcdFailure(
            Reason.MISSING_EXTENSION,
            f"{path} has {n_hdus} HDUs, none of them is {' or '.join(missing)}. "
            "Compare the camera file with the file's extensions",
        )
    return found


def _find_hdus(
    path: Path, wanted: set[str | int], header_hdu: int, check: bool
) -> tuple[dict[str | int, _Hdu], int]:
    """Return what of the wanted HDUs there is, and the number of HDUs up to the last of them."""
    found: dict[str | int, _Hdu] = {}
    n_hdus = 0
    with open_fits(path) as stream:
        for hdu in walk_hdus(stream):
            n_hdus += 1
            if hdu.index == header_hdu:
                found[_HEADER] = _Hdu(hdu.header, None)
            names = [name for name in wanted - found.keys() if _matches(name, hdu)]
            if names:
                body = read_data(stream, hdu)
                if check:
                    _check_bytes(path, hdu, body)
                read = _Hdu(hdu.header, _decode(path, hdu, body))
                found.update(dict.fromkeys(names, read))
            if len(found) == len(wanted) + 1:
                break
    return found, n_hdus


def _matches(name: str | int, hdu: HduHeader) -> bool:
    """Tell whether an HDU is the one that the camera file asks for."""
    header = hdu.header
    compressed = bool(header.get("ZIMAGE", False))
    if name == _FIRST_IMAGE:
        is_image = header.get("XTENSION", "IMAGE").strip() == "IMAGE"
        return compressed or (is_image and hdu.data_size > 0)
    if isinstance(name, int):
        # fpack moves an image from the primary HDU to the first extension
        moved = name == 0 and hdu.index == 1 and compressed
        return moved or (hdu.index == name and (name > 0 or hdu.data_size > 0))
    return str(header.get("EXTNAME", "")).strip().upper() == name.upper()


def _decode(path: Path, hdu: HduHeader, body: bytes) -> NDArray:
    """Turn the bytes of an HDU into pixels."""
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
    if data is None or data.ndim != 2 or data.dtype.fields:
        raise CcdFailure(
            Reason.WRONG_SHAPE,
            f"{path}: HDU {hdu.index} is not an image of two dimensions. "
            "Compare the camera file with the file's extensions",
        )
    return without_undefined(data.astype(data.dtype.newbyteorder("="), copy=False), hdu.header)


def _check_bytes(path: Path, hdu: HduHeader, body: bytes) -> None:
    """Refuse data with a wrong DATASUM, or with zeros where a copy broke off."""
    header = hdu.header
    words = np.frombuffer(body + b"\0" * (-len(body) % 4), dtype=">u4")
    stated = str(header.get("DATASUM", "")).strip()
    if stated.isdigit() and int(stated) > 0:
        total = int(words.sum(dtype=np.uint64))
        while total >> 32:
            total = (total & 0xFFFFFFFF) + (total >> 32)
        if total != int(stated):
            raise CcdFailure(
                Reason.DAMAGED_FILE,
                f"{path}: the data of HDU {hdu.index} differ from their DATASUM. {_COPY_AGAIN}, "
                "or set detrend.check_raw to false if the archive's sums are known to be wrong",
            )
    n_zeros = 4 * int(np.argmax(words[::-1] != 0)) if words.any() else 0
    row = abs(header["BITPIX"]) // 8 * header["NAXIS1"]
    if not header.get("ZIMAGE", False) and n_zeros >= row + 4:
        raise CcdFailure(
            Reason.TRUNCATED_FILE,
            f"{path}: the data of HDU {hdu.index} end in {n_zeros} zero bytes, as a broken copy "
            f"leaves them. {_COPY_AGAIN}, or set detrend.check_raw to false if the camera writes "
            "them",
        )


def _check_shape(path: Path, detector: Detector, amplifier: Amplifier, data: NDArray) -> None:
    """Check that all sections of the amplifier lie within the array."""
    ny, nx = data.shape
    for section in (amplifier.data, amplifier.overscan, amplifier.prescan):
        if section is not None and not (
            0 <= section[0] < section[2] <= nx and 0 <= section[1] < section[3] <= ny
        ):
            raise CcdFailure(
                Reason.WRONG_SHAPE,
                f"{path}: CCD {detector.id} has {nx} x {ny} raw pixels, and section {section} "
                f"of amplifier {amplifier.name} is not among them. "
                "Correct the camera file, or drop the exposure if it was read out otherwise",
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
    update = {}
    for name in ("gain", "read_noise", "saturation"):
        keyword = getattr(amplifier, f"{name}_keyword")
        if keyword is None:
            continue
        try:
            value = next((header[keyword] for header in headers if keyword in header), None)
        except fits.VerifyError as error:
            value = error
        valid = isinstance(value, (int, float)) and math.isfinite(value)
        if not valid or value < 0 or (value == 0 and name != "read_noise"):
            raise CcdFailure(
                Reason.MISSING_KEYWORD,
                f"{path}: keyword {keyword} ({name} of amplifier {amplifier.name}) is "
                f"{'missing' if value is None else f'not a valid number: {value!r}'}. "
                "Correct the header or the camera file",
            )
        update[name] = float(value)
    return amplifier.model_copy(update=update)
