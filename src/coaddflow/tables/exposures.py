"""The tables a survey starts from: raw exposures, and images calibrated elsewhere.

Both are ECSV with commas: `astropy.table.Table.read` reads them with units and descriptions, and
so does any spreadsheet. The Snakefile reads them again in every job of a cluster; hence this
module knows only the `csv` module and pydantic. A plain CSV file made by hand is read as well.

Paths in a table are relative to the table's folder, unless they are absolute.
"""

import contextlib
import csv
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

_CCD_IN_NAME = re.compile(r"\{ccd(?:\+(\d+))?\}")

_UNIT_DEG = {"unit": "deg"}
_UNIT_D = {"unit": "d"}
_UNIT_S = {"unit": "s"}
_UNIT_PIX = {"unit": "pix"}
_UNIT_MAG = {"unit": "mag"}
_UNIT_ARCSEC = {"unit": "arcsec"}
_UNIT_ELECTRON = {"unit": "electron"}

_ROW_REMEDY = "correct the line, or make the table again with `coaddflow ingest`"


def _id_of(kind: str) -> AfterValidator:
    """Return a check of an id that explains itself in pydantic's words."""

    def check(text: str) -> str:
        try:
            return check_id(text, kind)
        except InputError as error:
            raise ValueError(f"{error.cause}: {error.remedy}") from None

    return AfterValidator(check)


def _one_line(text: str) -> str:
    if not text or re.search(r"[\x00-\x1f]", text):
        raise ValueError("a path is one line of text")
    return text


ExposureId = Annotated[str, _id_of("exposure")]
PathText = Annotated[str, AfterValidator(_one_line)]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ExposureRow(_Row):
    """One raw exposure."""

    exposure: ExposureId = Field(description="Exposure id")
    kind: Kind = Field(description="science, bias, dark or flat")
    band: str = Field(description="Band; empty for bias and dark")
    ra: float | None = Field(
        ge=0, lt=360, description="Pointing, ICRS", json_schema_extra=_UNIT_DEG
    )
    dec: float | None = Field(
        ge=-90, le=90, description="Pointing, ICRS", json_schema_extra=_UNIT_DEG
    )
    rotation: float | None = Field(
        description="Position angle of the focal plane's +y", json_schema_extra=_UNIT_DEG
    )
    mjd: float = Field(
        description="Start of the exposure, MJD in the TAI time scale", json_schema_extra=_UNIT_D
    )
    exposure_time: float = Field(ge=0, description="Exposure time", json_schema_extra=_UNIT_S)
    path: PathText = Field(
        description="Raw file, relative to this table; {ccd} stands for the CCD where each has a "
        "file of its own"
    )
    n_files: int = Field(1, ge=1, description="Files of the exposure when it was ingested")

    @model_validator(mode="after")
    def _check(self) -> "ExposureRow":
        if self.kind in ("science", "flat"):
            _id_of("band").func(self.band)
        if self.kind == "science" and None in (self.ra, self.dec, self.rotation):
            raise ValueError("a science exposure needs ra, dec and rotation")
        return self

    @property
    def key(self) -> tuple[str]:
        """What tells the row from all others."""
        return (self.exposure,)

    @property
    def source(self) -> tuple[str, int]:
        """Where the row's pixels are: file and HDU."""
        return self.path, 0


class ImageRow(_Row):
    """One image that was calibrated elsewhere, with the facts that its calexp needs."""

    exposure: ExposureId = Field(description="Exposure id")
    ccd: int = Field(ge=0, description="CCD number")
    band: Annotated[str, _id_of("band")] = Field(description="Band")
    mjd: float = Field(
        description="Start of the exposure, MJD in the TAI time scale", json_schema_extra=_UNIT_D
    )
    exposure_time: float = Field(ge=0, description="Exposure time", json_schema_extra=_UNIT_S)
    path: PathText = Field(description="Image file, relative to this table")
    hdu: int = Field(ge=0, description="HDU of the image")
    weight_path: str = Field("", description="Weight file; empty: none")
    weight_hdu: int | None = Field(None, ge=0, description="HDU of the weight map")
    mask_path: str = Field("", description="Mask file; empty: none")
    mask_hdu: int | None = Field(None, ge=0, description="HDU of the mask")
    nx: int = Field(gt=0, description="Columns", json_schema_extra=_UNIT_PIX)
    ny: int = Field(gt=0, description="Rows", json_schema_extra=_UNIT_PIX)
    footprint_ra: tuple[float, float, float, float] = Field(
        description="Corners from pixel (-0.5, -0.5) along the first row",
        json_schema_extra=_UNIT_DEG,
    )
    footprint_dec: tuple[float, float, float, float] = Field(
        description="Likewise", json_schema_extra=_UNIT_DEG
    )
    electrons_per_unit: float = Field(gt=0, description="Electrons per unit of the image")
    zero_point: float = Field(
        description="AB magnitude of one electron in total", json_schema_extra=_UNIT_MAG
    )
    zero_point_error: float | None = Field(
        None, ge=0, description="Error of the zero-point", json_schema_extra=_UNIT_MAG
    )
    seeing: float | None = Field(
        None,
        gt=0,
        description="FWHM of the PSF; empty: to be measured",
        json_schema_extra=_UNIT_ARCSEC,
    )
    sky_level: float | None = Field(
        None,
        description="Sky, electrons per pixel; empty: to be measured",
        json_schema_extra=_UNIT_ELECTRON,
    )

    @property
    def key(self) -> tuple[str, int]:
        """What tells the row from all others."""
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
    would not change is not touched, so that nothing that hangs on it is redone.

    Returns
    -------
    bool
        Whether the file was written.

    Raises
    ------
    ValueError
        If an exposure occurs twice.
    """
    return _write(path, sorted(rows, key=lambda row: (row.mjd, row.key)), ExposureRow)


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
    """Return the file that a table names.

    Parameters
    ----------
    text : str
        A path as it stands in the table.
    table : str or Path
        The table.
    ccd : str
        `Detector.extension`, where each CCD has a file: stands for ``{ccd}`` in the name, or is
        added to the number in ``{ccd+00123400}``.
    """

    def name_of_ccd(match: re.Match) -> str:
        first = match.group(1)
        return ccd if first is None else f"{int(first) + int(ccd):0{len(first)}d}"

    name = _CCD_IN_NAME.sub(name_of_ccd, text) if ccd else text
    return Path(os.path.normpath(Path(table).parent.resolve() / name))


def _read(path: str | Path, model: type[Row]) -> tuple[list[str], list[tuple[Row, str]]]:
    """Return the column names, and rows with their lines."""
    path = Path(path)
    lines = _numbered_lines(path)
    if not lines:
        raise InputError("the table is empty", path=path, remedy="make it with `coaddflow ingest`")
    (header_number, header), *body = lines
    names = next(csv.reader([header]))
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


def _numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Return what `ecsv.numbered_lines` does, or an error for people."""
    try:
        return ecsv.numbered_lines(path)
    except UnicodeDecodeError:
        raise InputError("is not a text table", path=path, remedy="give an ECSV table") from None
    except OSError as error:
        raise InputError(
            f"the table cannot be read: {error.strerror}",
            path=path,
            remedy="make it with `coaddflow ingest`",
        ) from error


def _check_columns(names: Sequence[str], model: type[_Row], where: str) -> None:
    unknown = [name for name in names if name not in model.model_fields]
    missing = [
        name
        for name, field in model.model_fields.items()
        if field.is_required() and name not in names
    ]
    if unknown or missing or len(set(names)) != len(names):
        problems = [f"unknown column {name!r}" for name in unknown]
        problems += [f"missing column {name!r}" for name in missing]
        problems += ["a column occurs twice"] if len(set(names)) != len(names) else []
        raise InputError(
            "; ".join(problems),
            path=where,
            remedy=f"the columns, separated by commas, are {', '.join(model.model_fields)}",
        )


def _parse(line: str, names: Sequence[str], model: type[Row], where: str) -> Row:
    cells = next(csv.reader([line]))
    if len(cells) != len(names):
        raise InputError(
            f"{len(cells)} values for {len(names)} columns", path=where, remedy=_ROW_REMEDY
        )
    values = {
        name: _value(cell, model.model_fields[name].annotation)
        for name, cell in zip(names, cells, strict=True)
    }
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [explain(problem) for problem in error.errors()]
        raise InputError("; ".join(problems), path=where, remedy=_ROW_REMEDY) from error


def _value(cell: str, annotation: object) -> object:
    """Return what a cell stands for: a text, None, or a list of numbers in JSON."""
    if cell == "" and annotation is not str:
        return None
    if typing.get_origin(annotation) is tuple:
        with contextlib.suppress(ValueError):
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
    names = list(model.model_fields)
    old_lines: dict[Row, str] = {}
    if path.is_file():
        old_names, old = _read(path, model)
        old_lines = dict(old) if old_names == names else {}
    lines = [
        old_lines.get(row) or ecsv.row_line(row.model_dump().values(), delimiter=",")
        for row in rows
    ]
    header = ecsv.header_lines(ecsv.model_columns(model), delimiter=",")
    text = "\n".join([*header, *lines]) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return True
