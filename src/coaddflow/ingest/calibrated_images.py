"""Ingest of images calibrated elsewhere: any FITS image with a WCS and a zero-point.

Values come from headers, file names, a table or the settings `calibrated`. They are converted here,
once, so that the table of images is complete: electrons per unit, the magnitude of one electron,
the corners on the sky. Pixels are not read; the length of a file is compared with its headers.
"""

import fnmatch
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from pydantic import ValidationError

from coaddflow.errors import InputError
from coaddflow.geometry import sphere
from coaddflow.geometry.wcs import pixel_to_sky
from coaddflow.geometry.wcs_header import read_wcs
from coaddflow.image.fits_hdus import HduHeader, NotFitsError
from coaddflow.ingest.raw_exposures import (
    IngestReport,
    Skip,
    check_name,
    files_in,
    merge_rows,
    printable,
    with_progress,
)
from coaddflow.instrument.camera import outline
from coaddflow.instrument.header_values import (
    FileHeaders,
    HeaderValueError,
    Problems,
    header_id,
    header_mjd,
    header_number,
    header_text,
    read_hdus,
)
from coaddflow.settings.calibrated import (
    FLUX_ZERO_POINTS,
    CalibratedSettings,
    CompanionSettings,
    Fact,
    FactsTableSettings,
    PixelUnit,
)
from coaddflow.tables.exposures import ImageRow, explain, path_in_table, read_images, write_images

_SETTING = "setting calibrated."

_FLUX_UNITS = {
    "njy": "nanojansky",
    "nanojansky": "nanojansky",
    "ujy": "microjansky",
    "mujy": "microjansky",
    "microjansky": "microjansky",
    "jy": "jansky",
    "jansky": "jansky",
    "nmgy": "nanomaggy",
    "nanomaggy": "nanomaggy",
    "nanomaggies": "nanomaggy",
}
_COUNT_UNITS = dict.fromkeys(("e", "e-", "el", "elec", "electron", "electrons"), "electron")
_COUNT_UNITS |= dict.fromkeys(("adu", "adus", "dn", "count", "counts", "ct", "cts"), "adu")
_PER_SECOND = re.compile(
    r"\s*(/\s*|per\s+|\.\s*)(s|sec|secs|second|seconds)$|[\s.*]*s(\^|\*\*)?-1$"
)


def ingest_calibrated(
    sources: Sequence[str | Path],
    settings: CalibratedSettings,
    table: str | Path,
    replace_rows: bool = False,
) -> IngestReport:
    """Add images that were calibrated elsewhere to a table.

    Parameters and errors are those of `ingest`; what stands where is said by the settings.
    """
    facts = FactsTable.read(settings.facts)
    report = IngestReport()
    files = _image_files(sources, settings, report)
    rows: list[ImageRow] = []
    for file in with_progress(files, "reading headers"):
        try:
            for row in _rows_of(file, settings, facts, table, report):
                if isinstance(row, Skip):
                    report.skipped.append(row)
                else:
                    rows.append(row)
        except HeaderValueError as error:
            report.skipped.append(Skip(printable(file), error.reason, error.message))
    old = read_images(table) if Path(table).is_file() else []
    merged = merge_rows(old, rows, table, replace_rows, report)
    report.written = write_images(table, merged)
    return report


@dataclass(frozen=True)
class FactsTable:
    """A table with a row for each image, which is found by the values of its key columns."""

    path: str
    """The file, for messages."""
    keys: Mapping[str, Fact]
    """Key columns, and where an image has the values that they must equal."""
    rows: Mapping[tuple[str, ...], list[dict[str, object]]]
    """The rows, by the values of the key columns."""

    @classmethod
    def read(cls, settings: FactsTableSettings) -> "FactsTable | None":
        """Read the table; None if the settings name none, InputError if it cannot be used."""
        if settings.path is None:
            return None
        table = _read_table(Path(settings.path), settings.hdu)
        missing = [name for name in settings.match if name not in table.colnames]
        if missing or not settings.match:
            cause = f"has no column {missing[0]!r}" if missing else "no key columns are given"
            raise InputError(
                cause, path=settings.path, remedy="correct the setting calibrated.facts.match"
            )
        rows: dict[tuple[str, ...], list[dict[str, object]]] = {}
        columns = {name: table[name].tolist() for name in table.colnames if table[name].ndim == 1}
        for number in range(len(table)):
            row = {name: values[number] for name, values in columns.items()}
            key = tuple(_key_text(row[name]) for name in settings.match)
            rows.setdefault(key, []).append(row)
        return cls(settings.path, settings.match, rows)

    def row_of(self, image: FileHeaders) -> dict[str, object]:
        """Return the row of an image, or raise HeaderValueError."""
        key = tuple(_key_text(header_text(fact, name, image)) for name, fact in self.keys.items())
        found = self.rows.get(key, [])
        if len(found) == 1:
            return found[0]
        said = ", ".join(f"{name} = {value}" for name, value in zip(self.keys, key, strict=True))
        if found:
            raise HeaderValueError(
                "ambiguous_in_table",
                f"{self.path} has {len(found)} rows with {said}: add a key column to "
                "calibrated.facts.match",
            )
        raise HeaderValueError("not_in_table", f"{self.path} has no row with {said}")


def electrons_per(unit: PixelUnit, gain: float, exposure_time: float) -> float:
    """Return how many electrons one unit is; the gain is electrons per count or unit of flux."""
    counts = 1.0 if unit.startswith("electron") else gain
    return counts * exposure_time if unit.endswith("_per_second") else counts


def pixel_scale_of(wcs: WCS, size: tuple[int, int]) -> float:
    """Return arcsec per pixel (root of the area) at the centre of an image of (nx, ny) pixels."""
    x, y = (size[0] - 1) / 2.0, (size[1] - 1) / 2.0
    ra, dec = pixel_to_sky(wcs, [x - 0.5, x + 0.5, x, x], [y, y, y - 0.5, y + 0.5])
    xi, eta = sphere.tan_project(ra, dec, *(value[0] for value in pixel_to_sky(wcs, [x], [y])))
    area = (xi[1] - xi[0]) * (eta[3] - eta[2]) - (xi[3] - xi[2]) * (eta[1] - eta[0])
    return float(np.sqrt(abs(area))) * 3600.0


def _image_files(
    sources: Sequence[str | Path], settings: CalibratedSettings, report: IngestReport
) -> list[Path]:
    """Return the image files; files with other names are noted, but for weights and masks."""
    names = [name.lower() for name in settings.names]
    files = []
    parts = [c.replace[1].lower() for c in (settings.weight, settings.mask) if c.replace]
    for path in files_in(sources):
        name = path.name.lower()
        try:
            check_name(path)
        except HeaderValueError as error:
            report.skipped.append(Skip(printable(path), error.reason, error.message))
            continue
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in names):
            files.append(path)
        elif not any(part in name for part in parts):
            message = f"images are named {' or '.join(settings.names)}"
            report.skipped.append(Skip(printable(path), "other_name", message))
    if not files and not any(skip.reason == "bad_name" for skip in report.skipped):
        raise InputError(
            "no images in it",
            path=", ".join(str(source) for source in sources),
            remedy=f"the setting calibrated.names is {' or '.join(settings.names)}",
        )
    return files


def _rows_of(
    file: Path,
    settings: CalibratedSettings,
    facts: FactsTable | None,
    table: str | Path,
    report: IngestReport,
) -> Iterator[ImageRow | Skip]:
    """Yield the rows of all images in a file, or why an image has none.

    Raises HeaderValueError if the file as a whole is not usable.
    """
    hdus = _hdus_of(file)
    numbers = _image_hdus(hdus, settings)
    if not numbers:
        raise HeaderValueError("no_image", "has no 2-d image: set calibrated.hdu")
    for number in numbers:
        notes: list[str] = []
        name = f"{printable(file)}[{number}]"
        try:
            yield _row_of(file, hdus, number, settings, facts, table, notes)
        except HeaderValueError as error:
            yield Skip(name, error.reason, error.message)
        else:
            report.doubtful += [Skip(name, "doubtful", note) for note in notes]


def _hdus_of(file: Path) -> list[HduHeader]:
    """Return the headers of all HDUs of a file, with whose sizes its length agrees."""
    try:
        return read_hdus(file)
    except HeaderValueError as error:
        cause = f"is not a readable FITS file: it {error.message}"
        raise HeaderValueError("not_readable", cause) from error


def _image_hdus(hdus: Sequence[HduHeader], settings: CalibratedSettings) -> list[int]:
    """Return the numbers of the HDUs with images that are neither weights nor masks."""
    if settings.hdu is not None:
        return [_find_hdu(hdus, settings.hdu)]
    companions: set[int] = set()
    numbers = []
    for number, hdu in enumerate(hdus):
        if len(hdu.shape) != 2 or number in companions:
            continue
        for companion in (settings.weight, settings.mask):
            if companion.kind != "none" and companion.replace is None:
                companions.add(_companion_hdu(hdus, companion, number))
        if number not in companions:
            numbers.append(number)
    return numbers


def _find_hdu(hdus: Sequence[HduHeader], which: int | str) -> int:
    for number, hdu in enumerate(hdus):
        if which == number or (isinstance(which, str) and hdu.name.upper() == which.upper()):
            return number
    raise HeaderValueError("missing_hdu", f"has no HDU {which}")


def _companion_hdu(hdus: Sequence[HduHeader], companion: CompanionSettings, number: int) -> int:
    """Return the HDU of the weight or mask of image ``number`` among the HDUs of its file."""
    which = companion.hdu if companion.hdu is not None else number + companion.hdu_offset
    return _find_hdu(hdus, which)


def _companion(
    file: Path, hdus: Sequence[HduHeader], number: int, companion: CompanionSettings, what: str
) -> tuple[Path, int] | None:
    """Return file and HDU of the weight or mask of an image; None if the settings say none."""
    if companion.kind == "none":
        return None
    path = file
    if companion.replace is not None:
        old, new = companion.replace
        if old not in file.name:
            raise HeaderValueError(
                f"missing_{what}",
                f"its name has no {old!r} to be replaced for the {what}: correct "
                f"calibrated.{what}.replace",
            )
        path = file.with_name(file.name.replace(old, new))
        if not path.is_file():
            raise HeaderValueError(f"missing_{what}", f"its {what} file {path} is not there")
        hdus_there = _hdus_of(path)
    else:
        hdus_there = list(hdus)
    found = _companion_hdu(hdus_there, companion, number)
    if (path, found) == (file, number):
        raise HeaderValueError(
            f"missing_{what}",
            f"its {what} would be the image itself: set calibrated.{what}.replace, hdu or "
            "hdu_offset",
        )
    if hdus_there[found].shape != hdus[number].shape:
        raise HeaderValueError(
            "other_shape",
            f"its {what} {path}[{found}] has shape {hdus_there[found].shape}, "
            f"not {hdus[number].shape}",
        )
    return path, found


def _row_of(
    file: Path,
    hdus: Sequence[HduHeader],
    number: int,
    settings: CalibratedSettings,
    facts: FactsTable | None,
    table: str | Path,
    notes: list[str],
) -> ImageRow:
    """Make the row of one image; HeaderValueError, with all that is wrong, if that is impossible.

    What is doubtful is added to ``notes``.
    """
    header = _header_of(hdus[number])
    image = FileHeaders(file, (header, _header_of(hdus[0])), notes=notes)
    if facts is not None:
        image = FileHeaders(file, image.headers, facts.row_of(image), notes)
    problems = Problems()
    exposure_time = problems.read(header_number, settings.exposure_time, "exposure_time", image)
    ny, nx = hdus[number].shape
    values = {
        "exposure": problems.read(header_id, settings.exposure, "exposure", image, _SETTING),
        "ccd": problems.read(_ccd_of, settings, image),
        "band": problems.read(header_id, settings.band, "band", image, _SETTING),
        "mjd": problems.read(header_mjd, settings.mjd, "mjd", image),
        "exposure_time": exposure_time,
        "path": path_in_table(file, table),
        "hdu": number,
        "nx": nx,
        "ny": ny,
    }
    for what, companion in (("weight", settings.weight), ("mask", settings.mask)):
        found = problems.read(_companion, file, hdus, number, companion, what)
        if found is not None:
            values[f"{what}_path"] = path_in_table(found[0], table)
            values[f"{what}_hdu"] = found[1]
    problems.read(_check_unit, settings, image)
    place = problems.read(_corners, header, (nx, ny), notes)
    if place is not None and exposure_time is not None:
        figures = problems.read(_photometry, settings, image, exposure_time, place[1])
        values |= place[0] | (figures or {})
    problems.raise_all()
    try:
        return ImageRow.model_validate(values)
    except ValidationError as error:
        raise HeaderValueError("bad_value", explain(error.errors()[0])) from error


def _header_of(hdu: HduHeader) -> fits.Header:
    try:
        return hdu.header
    except NotFitsError as error:
        raise HeaderValueError("not_fits", f"is not a FITS file ({error})") from error


def _ccd_of(settings: CalibratedSettings, image: FileHeaders) -> int:
    return _whole_number(header_text(settings.ccd, "ccd", image))


def _check_unit(settings: CalibratedSettings, image: FileHeaders) -> None:
    """Compare BUNIT with the setting; HeaderValueError if the pixels would be wrong."""
    said = header_text(Fact(keyword="BUNIT", default=""), "unit", image)
    unit = _unit_of(said)
    if not settings.check_unit or unit in (None, settings.unit):
        return
    count_units = _COUNT_UNITS.values()
    plain, own = (name.removesuffix("_per_second") for name in (unit, settings.unit))
    same_rate = unit.endswith("_per_second") == settings.unit.endswith("_per_second")
    text = f"BUNIT is {said!r}, and calibrated.unit is {settings.unit}"
    if same_rate and plain in count_units and own in count_units:
        # headers often keep the unit of the raw frame
        image.notes.append(f"{text}, which counts: set it to {unit} if the header is right")
        return
    raise HeaderValueError(
        "other_unit",
        f"{text}: set it to {unit}, or calibrated.check_unit to false if BUNIT is wrong",
    )


def _unit_of(text: str) -> PixelUnit | None:
    """Return the unit that a BUNIT names; None for those that are not known here."""
    plain = text.strip().lower()
    if plain in _FLUX_UNITS:
        return _FLUX_UNITS[plain]
    counts = _PER_SECOND.sub("", plain).strip()
    if counts not in _COUNT_UNITS:
        return None
    return _COUNT_UNITS[counts] + ("" if counts == plain else "_per_second")


def _corners(
    header: fits.Header, size: tuple[int, int], notes: list[str]
) -> tuple[dict[str, tuple], float]:
    """Return the corners on the sky, and the arcseconds per pixel at the image's centre."""
    try:
        wcs = read_wcs(header, say=notes.append)
    except InputError as error:
        raise HeaderValueError("no_wcs", f"{error.cause}: {error.remedy}") from error
    ra, dec = pixel_to_sky(wcs, *outline(size, 1))
    if not np.isfinite([ra, dec]).all():
        raise HeaderValueError("no_wcs", "has a WCS that does not reach the sky at its corners")
    corners = {
        "footprint_ra": tuple(round(float(value), 9) for value in ra),
        "footprint_dec": tuple(round(float(value), 9) for value in dec),
    }
    return corners, pixel_scale_of(wcs, size)


def _photometry(
    settings: CalibratedSettings, image: FileHeaders, exposure_time: float, pixel_scale: float
) -> dict[str, float | None]:
    """Return scale, zero-point, seeing and sky in the units of the table."""
    gain = header_number(settings.gain, "gain", image)

    def electrons(unit: PixelUnit | None) -> float:
        return electrons_per(unit or settings.unit, gain, exposure_time)

    scale = electrons(settings.unit)
    if not 0.0 < scale < 1e30:
        raise HeaderValueError(
            "bad_value", f"gain {gain:g} and exposure time {exposure_time:g} s give no electrons"
        )
    if settings.zero_point is not None:
        zero_point = header_number(settings.zero_point, "zero_point", image)
        zero_point += 2.5 * math.log10(electrons(settings.zero_point_unit))
    elif settings.unit in FLUX_ZERO_POINTS:
        zero_point = FLUX_ZERO_POINTS[settings.unit] + 2.5 * math.log10(scale)
    else:
        raise HeaderValueError("no_zero_point", "has no zero-point: set calibrated.zero_point")
    seeing = _optional(settings.seeing, "seeing", image)
    sky = _optional(settings.sky, "sky", image)
    if sky is None and settings.subtract_sky == "given":
        raise HeaderValueError("no_sky", "its sky is to be subtracted: set calibrated.sky")
    return {
        "electrons_per_unit": _rounded(scale),
        "zero_point": round(zero_point, 6),
        "zero_point_error": _rounded(
            _optional(settings.zero_point_error, "zero_point_error", image)
        ),
        "seeing": _rounded(
            seeing and seeing * (pixel_scale if settings.seeing_unit == "pixel" else 1.0)
        ),
        "sky_level": _rounded(sky and sky * electrons(settings.sky_unit)),
    }


def _optional(fact: Fact | None, what: str, image: FileHeaders) -> float | None:
    return None if fact is None else header_number(fact, what, image)


def _rounded(value: float | None) -> float | None:
    """Return seven significant digits: single-precision columns have no more."""
    return None if value is None else float(f"{value:.7g}")


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise HeaderValueError(
            "bad_value", f"its CCD {text!r} is no number: give numbers in calibrated.ccd.values"
        ) from None


def _key_text(value: object) -> str:
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _read_table(path: Path, hdu: int) -> Table:
    try:
        name = path.name.lower().removesuffix(".gz")
        if name.endswith((".fits", ".fit", ".fz")):
            return Table.read(path, format="fits", hdu=hdu)
        return Table.read(path, format="ascii.ecsv" if name.endswith(".ecsv") else "ascii.csv")
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise InputError(
            f"the table of facts cannot be read ({error})",
            path=path,
            remedy="correct the setting calibrated.facts.path",
        ) from error
