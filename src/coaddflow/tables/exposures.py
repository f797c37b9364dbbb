"""The tables a survey starts from: raw exposures, and images calibrated elsewhere.

Both are ECSV with commas: `astropy.table.Table.read` reads them with units and descriptions, and
so does any spreadsheet. The Snakefile reads them again in every job of a cluster; hence this
module knows only the `csv` module and pydantic. A plain CSV file made by hand is read as well.

Paths in a table are relative to the table's folder, unless they are absolute.
"""

import contextlib
import json
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from coaddflow.errors import InputError
from coaddflow.files import atomic_path, check_id
from coaddflow.tables import ecsv

Kind = Literal["science", "bias", "dark", "flat"]
KINDS: tuple[str, ...] = typing.get_args(Kind)

WILDCARD = re.compile(r"\{\s*\w+\s*(,[^{}]*)?\}")
"""What Snakemake would replace in the name of a file."""

_CCD_IN_NAME = re.compile(r"\{ccd(?:\+(\d+))?\}")

_ROW_REMEDY = "correct the line, or make the table again with `coaddflow ingest`"


def _id_of(kind: str) -> AfterValidator:
    """Return a check of an id as pydantic wants it, with the remedy in its message."""

    def check(text: str) -> str:
        try:
            return check_id(text, kind)
        except InputError as error:
            raise ValueError(f"{error.cause}: {error.remedy}") from None

    return AfterValidator(check)


def _one_line(text: str) -> str:
    if not text or re.search(r"[\x00-\x1f]", text):
        raise ValueError("a path is one line of text")
    wildcard = WILDCARD.search(_CCD_IN_NAME.sub("", text))
    if wildcard is not None:
        raise ValueError(f"Snakemake takes {wildcard[0]} for a wildcard: rename the file or folder")
    return text


ExposureId = Annotated[str, _id_of("exposure")]
PathText = Annotated[str, AfterValidator(_one_line)]


def _column(description: str, unit: str = "", default: object = ..., **limits: float) -> Any:
    """Return the field of a column, which every row must have unless there is a default."""
    extra = {"unit": unit} if unit else None
    return Field(default, description=description, json_schema_extra=extra, **limits)


_MJD = {"gt": -100_000, "lt": 200_000}
"""An exposure begins in the years 1585 to 2406."""


LEFT_OUT_IF_EMPTY = {"sets"}
"""Columns that a table has only where they say something."""


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ExposureRow(_Row):
    """One raw exposure."""

    exposure: ExposureId = _column("Exposure id")
    kind: Kind = _column("science, bias, dark or flat")
    band: str = _column("Band; empty for bias and dark")
    ra: float | None = _column("Pointing, ICRS", "deg", ge=0, lt=360)
    dec: float | None = _column("Pointing, ICRS", "deg", ge=-90, le=90)
    rotation: float | None = _column(
        "Position angle of the focal plane's +y", "deg", ge=-1080, le=1080
    )
    mjd: float | None = _column(
        "Start of the exposure, MJD in the TAI time scale; may be empty but for science",
        "d",
        **_MJD,
    )
    exposure_time: float = _column("Exposure time", "s", ge=0, le=1e9)
    path: PathText = _column(
        "Raw file, relative to this table; {ccd} stands for the CCD where each has a file of its "
        "own"
    )
    n_files: int = _column("Files of the exposure when it was ingested", default=1, ge=1)
    sets: str = _column(
        "Sets of calibration frames that it takes; written by ingest for people, and not read",
        default="",
    )

    @model_validator(mode="after")
    def _check(self) -> "ExposureRow":
        if self.kind in ("science", "flat"):
            _id_of("band").func(self.band)
        if self.kind == "science" and None in (self.ra, self.dec, self.rotation):
            raise ValueError("a science exposure needs ra, dec and rotation")
        if self.kind == "science" and self.mjd is None:
            raise ValueError("mjd: a science exposure needs it")
        return self

    @property
    def key(self) -> tuple[str]:
        """What is unique to the row."""
        return (self.exposure,)

    @property
    def source(self) -> tuple[str, int]:
        """Where the row's pixels are: file and HDU."""
        return self.path, 0


class ImageRow(_Row):
    """One image that was calibrated elsewhere, with what its calexp needs to know."""

    exposure: ExposureId = _column("Exposure id")
    ccd: int = _column("CCD number", ge=0, lt=1_000_000)
    band: Annotated[str, _id_of("band")] = _column("Band")
    mjd: float = _column("Start of the exposure, MJD in the TAI time scale", "d", **_MJD)
    exposure_time: float = _column("Exposure time", "s", ge=0, le=1e9)
    path: PathText = _column("Image file, relative to this table")
    hdu: int = _column("HDU of the image", ge=0)
    weight_path: str = _column("Weight file; empty: none", default="")
    weight_hdu: int | None = _column("HDU of the weight map", default=None, ge=0)
    mask_path: str = _column("Mask file; empty: none", default="")
    mask_hdu: int | None = _column("HDU of the mask", default=None, ge=0)
    nx: int = _column("Columns", "pix", gt=0)
    ny: int = _column("Rows", "pix", gt=0)
    footprint_ra: tuple[float, float, float, float] = _column(
        "Corners from pixel (-0.5, -0.5) along the first row", "deg"
    )
    footprint_dec: tuple[float, float, float, float] = _column("Likewise", "deg")
    electrons_per_unit: float = _column("Electrons per unit of the image", gt=0)
    zero_point: float = _column("AB magnitude of one electron in total", "mag", ge=-200, le=200)
    zero_point_error: float | None = _column("Error of the zero-point", "mag", None, ge=0)
    seeing: float | None = _column("FWHM of the PSF; empty: to be measured", "arcsec", None, gt=0)
    sky_level: float | None = _column(
        "Sky, electrons per pixel; empty: to be measured", "electron", None
    )

    @property
    def key(self) -> tuple[str, int]:
        """What is unique to the row."""
        return self.exposure, self.ccd

    @property
    def source(self) -> tuple[str, int]:
        """Where the row's pixels are: file and HDU."""
        return self.path, self.hdu


Row = TypeVar("Row", ExposureRow, ImageRow)


def read_exposures(path: str | Path) -> list[ExposureRow]:
    """Read a table of raw exposures.

    Parameters
    ----------
    path : str or Path
        ECSV with commas, or plain CSV with the column names in the first line.

    Returns
    -------
    list of ExposureRow
        In the order of the file.

    Raises
    ------
    InputError
        If the table is missing or empty, a column is missing or unknown, a value is not allowed,
        or an exposure id occurs twice; names file and line.
    """
    return [row for row, _ in _read(path, ExposureRow)[1]]


def content_without_sets(path: str | Path) -> bytes:
    """Return the lines of a table of raw exposures that say something, without its column `sets`.

    They are not parsed, which takes less than a tenth of the time. The column is left in where it
    is not the last one, which it is in tables of `write_exposures`.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    lines = Path(path).read_bytes().split(b"\n")
    lines = [line for line in lines if line.strip() and not line.startswith(b"#")]
    if lines and lines[0].rpartition(b",")[2].strip() == b"sets":
        lines = [line.rpartition(b",")[0] for line in lines]
    return b"\n".join(lines)


def read_images(path: str | Path) -> list[ImageRow]:
    """Read a table of images calibrated elsewhere; errors as `read_exposures`.

    Raises
    ------
    InputError
        Also if images of one exposure are of different bands.
    """
    rows = [row for row, _ in _read(path, ImageRow)[1]]
    _check_bands(rows, path)
    return rows


def write_exposures(path: str | Path, rows: Iterable[ExposureRow]) -> bool:
    """Write a table of raw exposures, ordered by time and id.

    The lines of rows that the file already has stay as they are, byte for byte; a file that
    would not change is not touched, so that its dependents are not redone.

    Returns
    -------
    bool
        Whether the file was written.

    Raises
    ------
    ValueError
        If an exposure occurs twice.
    """
    return _write(path, sorted(rows, key=lambda row: (row.mjd or 0.0, row.key)), ExposureRow)


def write_images(path: str | Path, rows: Iterable[ImageRow]) -> bool:
    """Write a table of images calibrated elsewhere; see `write_exposures` and `read_images`."""
    rows = list(rows)
    _check_bands(rows, path)
    return _write(path, sorted(rows, key=lambda row: (row.mjd, row.key)), ImageRow)


def _check_bands(rows: Iterable[ImageRow], path: str | Path) -> None:
    bands: dict[str, str] = {}
    for row in rows:
        if bands.setdefault(row.exposure, row.band) != row.band:
            raise InputError(
                f"exposure {row.exposure!r} has images in {bands[row.exposure]} and in {row.band}",
                path=path,
                remedy="an exposure has one band: give the exposures other ids",
            )


def path_in_table(file: str | Path, table: str | Path) -> str:
    """Return how a table names a file.

    Relative to the table's folder if the file is inside it or was given relative to the working
    folder (a project that is moved with its data stays whole); absolute if it was given so.
    """
    folder = Path(table).parent.resolve()
    absolute = Path(os.path.abspath(file))  # noqa: PTH100 - symbolic links of raw data stay
    if absolute.is_relative_to(folder) or not Path(file).is_absolute():
        return Path(os.path.relpath(absolute, folder)).as_posix()
    return absolute.as_posix()


def file_of(text: str, table: str | Path, ccd: str = "") -> Path:
    """Return the file that a table names; with one file for each CCD, that of ``ccd``."""
    name = ccd_file(text, ccd) if ccd else text
    return Path(os.path.normpath(Path(table).parent.resolve() / name))


def has_ccd(template: str) -> bool:
    """Return whether each CCD has a file of its own: whether a name has a place for the CCD."""
    return _CCD_IN_NAME.search(template) is not None


def ccd_file(template: str, ccd: str | int) -> str:
    """Return the name of a CCD's file.

    Parameters
    ----------
    template : str
        A name in which ``{ccd}`` stands for the CCD, or ``{ccd+00123400}`` for the sum of this
        number and the CCD's, with as many digits. A name without either is the file of all CCDs.
    ccd : str or int
        `Detector.extension`.
    """

    def name_of_ccd(match: re.Match) -> str:
        first = match.group(1)
        return str(ccd) if first is None else f"{int(first) + int(ccd):0{len(first)}d}"

    return _CCD_IN_NAME.sub(name_of_ccd, template)


def _read(path: str | Path, model: type[Row]) -> tuple[list[str], list[tuple[Row, str]]]:
    """Return the column names, and rows with their lines."""
    remedy = "make it with `coaddflow ingest`"
    try:
        lines = ecsv.numbered_lines(path)
    except UnicodeDecodeError:
        raise InputError("is not a text table", path=path, remedy="give an ECSV table") from None
    except OSError as error:
        cause = f"the table cannot be read: {error.strerror}"
        raise InputError(cause, path=path, remedy=remedy) from error
    if not lines:
        raise InputError("the table is empty", path=path, remedy=remedy)
    (header_number, header), *body = lines
    names = _cells_of(header, f"{path}, line {header_number}")
    _check_columns(names, model, f"{path}, line {header_number}")
    rows: list[tuple[Row, str]] = []
    seen: dict[tuple, int] = {}
    for number, line in body:
        row = _parse(line, names, model, f"{path}, line {number}")
        if row.key in seen:
            what = "exposure " + " CCD ".join(repr(part) for part in row.key)
            raise InputError(
                f"{what} occurs twice, in lines {seen[row.key]} and {number}",
                path=path,
                remedy="remove one of them",
            )
        seen[row.key] = number
        rows.append((row, line))
    return names, rows


def _check_columns(names: Sequence[str], model: type[_Row], where: str) -> None:
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    problems = [f"unknown column {name!r}" for name in names if name not in model.model_fields]
    problems += [f"missing column {name!r}" for name in required if name not in names]
    problems += ["a column occurs twice"] if len(set(names)) != len(names) else []
    if problems:
        raise InputError(
            "; ".join(problems),
            path=where,
            remedy=f"the columns, separated by commas, are {', '.join(model.model_fields)}",
        )


def _parse(line: str, names: Sequence[str], model: type[Row], where: str) -> Row:
    cells = _cells_of(line, where)
    if len(cells) != len(names):
        cause = f"{len(cells)} values for {len(names)} columns"
        raise InputError(cause, path=where, remedy=_ROW_REMEDY)
    values = {
        name: _value(cell, model.model_fields[name].annotation)
        for name, cell in zip(names, cells, strict=True)
    }
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [explain(problem) for problem in error.errors()]
        raise InputError("; ".join(problems), path=where, remedy=_ROW_REMEDY) from error


def _cells_of(line: str, where: str) -> list[str]:
    try:
        return ecsv.cells_of(line)
    except ValueError as error:
        cause = f"the line cannot be divided into cells ({error})"
        raise InputError(cause, path=where, remedy=_ROW_REMEDY) from error


def _value(cell: str, annotation: object) -> object:
    """Return what a cell stands for: a text, None, or a list of numbers in JSON."""
    if cell == "" and annotation is not str:
        return None
    if typing.get_origin(annotation) is tuple:
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(cell)
    return cell


def explain(problem: Mapping[str, Any]) -> str:
    """Return what is wrong with a row in one sentence, from what pydantic says about it."""
    column = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{column}: {message}" if column else message
    return f"{column}: {message}, not {problem['input']!r}"


def _write(path: str | Path, rows: Sequence[Row], model: type[Row]) -> bool:
    if len({row.key for row in rows}) != len(rows):
        raise ValueError("a row occurs twice")
    path = Path(path)
    empty = {name for name in LEFT_OUT_IF_EMPTY if not any(getattr(r, name, "") for r in rows)}
    names = [name for name in model.model_fields if name not in empty]
    old_lines: dict[Row, str] = {}
    if path.is_file():
        old_names, old = _read(path, model)
        old_lines = dict(old) if old_names == names else {}
    lines = [
        old_lines.get(row) or ecsv.row_line(row.model_dump(exclude=empty).values(), ",")
        for row in rows
    ]
    columns = [column for column in ecsv.model_columns(model) if column.name in names]
    header = ecsv.header_lines(columns, delimiter=",")
    text = "\n".join([*header, *lines]) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return True
