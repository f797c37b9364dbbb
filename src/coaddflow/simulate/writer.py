"""Raw files in the form that the camera file describes, headers included."""

import gzip
import io
import re
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.time import Time
from numpy.typing import NDArray

from coaddflow.files import atomic_path
from coaddflow.instrument.camera import Camera, Detector
from coaddflow.instrument.file_layout import HeaderKey
from coaddflow.simulate.observations import Observation
from coaddflow.tables.exposures import ccd_file

Arrays = dict[str | int | None, NDArray[np.uint16]]
"""Raw arrays of a CCD, by the extension of the amplifiers that they hold (None: the CCD's own)."""

_ENDINGS = {"none": "", "gzip": ".gz", "fpack": ".fz"}
# FITS checksums carry the time at which they were made, which would make files differ
_WHEN = "simulated"


def raw_name(camera: Camera, observation: Observation, compression: str | None) -> str:
    """Return the name of an exposure's file, with ``{ccd}`` in it where each CCD has one.

    Without a compression its ending is that of the camera's ``layout.name_form``.
    """
    name = camera.layout.name_form.replace("{exposure}", observation.exposure)
    if compression is None:
        return name
    return re.sub(r"\.(gz|fz)$", "", name) + _ENDINGS[compression]


def write_exposure(
    folder: Path, name: str, camera: Camera, observation: Observation, ccds: dict[int, Arrays]
) -> Path:
    """Write the file of all CCDs of an exposure; the ending of its name tells the compression."""
    header = exposure_header(camera, observation)
    hdus = []
    for ccd, arrays in ccds.items():
        hdus += _ccd_hdus(camera, camera.detector(ccd), arrays)
    alone = len(hdus) == 1 and hdus[0].name == ""
    return _write(folder / name, header, hdus, primary_image=alone)


def write_ccd(
    folder: Path,
    name: str,
    camera: Camera,
    observation: Observation,
    detector: Detector,
    arrays: Arrays,
) -> Path:
    """Write the file of one CCD; see `write_exposure`. Its image is the primary HDU."""
    header = exposure_header(camera, observation)
    hdus = _ccd_hdus(camera, detector, arrays)
    path = folder / ccd_file(name, detector.extension)
    return _write(path, header, hdus, primary_image=len(hdus) == 1)


def exposure_header(camera: Camera, observation: Observation) -> fits.Header:
    """Return the header that says of an exposure what the camera file's map looks for."""
    keys, seen = camera.header, observation
    header = fits.Header()
    values: list[tuple[HeaderKey, object]] = [
        (keys.exposure, seen.exposure),
        (keys.kind, seen.kind),
        (keys.band, seen.band or None),
        (keys.ra, _angle(keys.ra, seen.header_ra, 3 if keys.ra.unit == "hourangle" else None)),
        (keys.dec, _angle(keys.dec, seen.header_dec, 2 if keys.ra.unit == "hourangle" else None)),
        (keys.rotation, _angle(keys.rotation, seen.header_rotation, None)),
        (keys.mjd, _time(keys.mjd, seen.mjd)),
        (keys.exposure_time, seen.exposure_time),
    ]
    for key, value in values:
        if key.keyword is not None and value is not None:
            header[key.keyword] = _header_value(key, value)
    header["OBJECT"] = "simulated"
    return header


def _header_value(key: HeaderKey, value: object) -> object:
    """Return a value as the observatory writes it."""
    if isinstance(value, str):
        names = {ours: theirs for theirs, ours in reversed(key.values.items())}
        value = names.get(value, value)
    return value if key.form == "{}" else key.form.format(value)


def _angle(key: HeaderKey, degrees: float, decimals: int | None) -> float | str:
    """Return an angle in the unit of the header; sexagesimal if it has decimals of seconds."""
    value = (degrees - key.offset) / key.factor
    if key.unit == "radian":
        return float(np.radians(value))
    if decimals is None:
        return round(value / 15.0 if key.unit == "hourangle" else value, 7)
    return _sexagesimal(value / 15.0 if key.unit == "hourangle" else value, decimals)


def _sexagesimal(value: float, decimals: int) -> str:
    ticks = round(abs(value) * 3600 * 10**decimals)
    seconds, fraction = divmod(ticks, 10**decimals)
    minutes, seconds = divmod(seconds, 60)
    whole, minutes = divmod(minutes, 60)
    sign = "-" if value < 0 else ""
    return f"{sign}{whole:02d}:{minutes:02d}:{seconds:02d}.{fraction:0{decimals}d}"


def _time(key: HeaderKey, mjd: float) -> float | str:
    """Return a time (MJD TAI) in form and scale of the header."""
    time = getattr(Time(mjd, format="mjd", scale="tai", precision=3), key.scale)
    if key.unit == "iso":
        return str(time.isot)
    value = time.jd if key.unit == "jd" else time.mjd
    return round((float(value) - key.offset) / key.factor, 9)


def _ccd_hdus(camera: Camera, detector: Detector, arrays: Arrays) -> list[fits.ImageHDU]:
    hdus = []
    for extension, pixels in arrays.items():
        hdu = fits.ImageHDU(pixels)
        name = detector.extension if extension is None else extension
        if camera.layout.files == "exposure" and isinstance(name, str):
            hdu.name = name
        elif extension is not None:
            hdu.name = str(extension)
        hdu.header["CCDID"] = (detector.id, "number in the camera file")
        hdu.header["CCDNAME"] = detector.name
        for amplifier in detector.amplifiers:
            if amplifier.extension == extension:
                for name in ("gain", "read_noise", "saturation"):
                    keyword = getattr(amplifier, f"{name}_keyword")
                    if keyword is not None:
                        hdu.header[keyword] = getattr(amplifier, name)
        hdus.append(hdu)
    return hdus


def _write(path: Path, header: fits.Header, hdus: list[fits.ImageHDU], primary_image: bool) -> Path:
    """Write a file whose ending tells the compression; the same content gives the same bytes."""
    packed = path.name.endswith(".fz")
    if primary_image and not packed:
        primary = fits.PrimaryHDU(hdus[0].data, header=header)
        primary.header.update(_own_cards(hdus[0].header))
        content = [primary]
    elif primary_image:
        hdus[0].header.update(header)
        content = [fits.PrimaryHDU(), *hdus]
    else:
        content = [fits.PrimaryHDU(header=header), *hdus]
    if packed:
        content[1:] = [_packed(hdu) for hdu in content[1:]]
    file = fits.HDUList(content)
    file.update_extend()
    for hdu in file:
        hdu.add_checksum(when=_WHEN)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        if path.name.endswith(".gz"):
            buffer = io.BytesIO()
            file.writeto(buffer)
            stream.write(gzip.compress(buffer.getvalue(), compresslevel=1, mtime=0))
        else:
            file.writeto(stream)
    return path


def _own_cards(header: fits.Header) -> fits.Header:
    """Return the cards that do not describe the form of the HDU."""
    own = header.copy()
    own.strip()
    for keyword in ("BZERO", "BSCALE", "XTENSION", "EXTNAME", "PCOUNT", "GCOUNT"):
        own.remove(keyword, ignore_missing=True)
    return own


def _packed(hdu: fits.ImageHDU) -> fits.CompImageHDU:
    """Return the HDU compressed as fpack does it, without loss."""
    return fits.CompImageHDU(
        hdu.data, header=hdu.header, name=hdu.name or None, compression_type="RICE_1"
    )
