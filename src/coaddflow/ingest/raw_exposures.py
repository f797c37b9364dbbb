"""Ingest: a folder of raw files becomes the table of exposures.

Only headers are read; the sizes in them are compared with the file and the camera. A file that
cannot be used is skipped with its reason, never silently, and never keeps the others from coming
in. Exposures that the table already has stay as they are.
"""

import fnmatch
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from coaddflow.errors import OF_EXPOSURE, InputError
from coaddflow.image.fits_hdus import HduHeader, NotFitsError
from coaddflow.ingest.pointing import MAX_MISFIT, Pointing, fit_pointing, misfit
from coaddflow.instrument.camera import Amplifier, Camera, Detector
from coaddflow.instrument.file_layout import file_template
from coaddflow.instrument.header_values import (
    FileHeaders,
    HeaderValueError,
    Problems,
    header_id,
    header_mjd,
    header_number,
    header_text,
    headers_of,
    read_hdus,
)
from coaddflow.instrument.raw import (
    amplifier_hdu,
    amplifier_values,
    is_hdu,
    largest_hdu,
    shape_problem,
)
from coaddflow.settings.value_key import ValueKey
from coaddflow.tables import paths
from coaddflow.tables.exposures import (
    KINDS,
    WILDCARD,
    ExposureRow,
    Row,
    explain,
    file_of,
    path_in_table,
    read_exposures,
    write_exposures,
)
from coaddflow.tables.manifest import CcdRow, read_manifest, read_row
from coaddflow.tables.verdict import read_verdict

_CAMERA_KEY = "camera key header."

Item = TypeVar("Item")

PROGRESS_DELAY = 0.5
"""Seconds before a progress bar is shown."""


@dataclass(frozen=True)
class Skip:
    """A file (or pattern of files) that was not used: a code for the reason, and a sentence."""

    file: str
    reason: str
    message: str


@dataclass
class IngestReport:
    """What became of the files."""

    added: list[str] = field(default_factory=list)
    """Exposures (or images) that are new in the table."""
    replaced: list[str] = field(default_factory=list)
    """Those whose row was replaced."""
    unchanged: list[str] = field(default_factory=list)
    """Those that the table has with the same values."""
    kept: list[str] = field(default_factory=list)
    """Those that the table has with other values, which were kept."""
    skipped: list[Skip] = field(default_factory=list)
    """Files that were not used, with the reason."""
    doubtful: list[Skip] = field(default_factory=list)
    """Files that were used, and what in them contradicts the camera, the settings or itself."""
    n_rows: int = 0
    """Rows of the table now."""
    written: bool = False
    """Whether the table was changed."""


@dataclass(frozen=True)
class RawFiles:
    """The files of one exposure, and their common name (`file_layout.file_template`)."""

    template: Path
    files: tuple[Path, ...]


def ingest(
    sources: Sequence[str | Path], camera: Camera, table: str | Path, replace_rows: bool = False
) -> IngestReport:
    """Add the raw exposures of folders or files to a table.

    Parameters
    ----------
    sources : sequence of path
        Folders (searched with all folders in them) or files.
    camera : Camera
        Tells which files are raw files and where their headers say what.
    table : path
        The exposure table; made if it is not there.
    replace_rows : bool
        Rows that the table has already are replaced by what the files say now.

    Raises
    ------
    InputError
        If a source is not there, no file has the name of a raw file, nothing could be used and
        there is no table yet, or the table on disk is damaged.
    """
    raw, skipped = find_raw_files(sources, camera)
    report = IngestReport(skipped=skipped)
    rows: list[ExposureRow] = []
    for group in with_progress(raw, "reading headers"):
        try:
            rows.append(exposure_row(group, camera, table, report))
        except HeaderValueError as error:
            skip = Skip(printable(group.template), error.reason, error.message)
            report.skipped.append(skip)
    old = read_exposures(table) if Path(table).is_file() else []
    # headers do not say it
    sets = {row.exposure: row.sets for row in old if row.sets}
    rows = [row.model_copy(update={"sets": sets.get(row.exposure, "")}) for row in rows]
    merged = merge_rows(old, rows, table, replace_rows, report)
    report.written = write_exposures(table, merged)
    return report


def find_raw_files(
    sources: Sequence[str | Path], camera: Camera
) -> tuple[list[RawFiles], list[Skip]]:
    """Find raw files by their names, and group those of one exposure; skip all other files."""
    skipped: list[Skip] = []
    names = [name.lower() for name in camera.layout.names]
    groups: dict[Path, list[Path]] = {}
    for path in files_in(sources):
        if not any(fnmatch.fnmatchcase(path.name.lower(), name) for name in names):
            message = f"raw files of {camera.name} are named {' or '.join(camera.layout.names)}"
            skipped.append(Skip(printable(path), "other_name", message))
            continue
        try:
            check_name(path)
            groups.setdefault(_template(path, camera), []).append(path)
        except HeaderValueError as error:
            skipped.append(Skip(printable(path), error.reason, error.message))
    if not groups and not any(skip.reason == "bad_name" for skip in skipped):
        raise InputError(
            f"no raw files of camera {camera.name} in it",
            path=", ".join(str(source) for source in sources),
            remedy=f"raw files must be named {' or '.join(camera.layout.names)}",
        )
    return [RawFiles(template, tuple(files)) for template, files in groups.items()], skipped


def exposure_row(
    raw: RawFiles, camera: Camera, table: str | Path, report: IngestReport
) -> ExposureRow:
    """Make the row of one exposure from its headers.

    Raises HeaderValueError, with all that is wrong, if that is not possible. The report notes
    damaged files of single CCDs, and what contradicts the camera.
    """
    hdus = _read_files(raw, camera, report)
    file = next(iter(hdus))
    image = FileHeaders(file, headers_of(hdus[file], camera.layout.header_hdu))
    keys, problems = camera.header, Problems()
    kind = problems.read(_kind_of, camera, image)
    # a bias or a flat needs no pointing, and no date
    pointed, banded = kind in ("science", None), kind in ("science", "flat", None)
    ra, dec, rotation = (
        problems.read(header_number, getattr(keys, name), name, image) if pointed else None
        for name in ("ra", "dec", "rotation")
    )
    band = problems.read(header_id, keys.band, "band", image, _CAMERA_KEY) if banded else ""
    values = {
        "exposure": problems.read(header_id, keys.exposure, "exposure", image, _CAMERA_KEY),
        "kind": kind,
        "band": band,
        "ra": None if ra is None else ra % 360.0,
        "dec": dec,
        "rotation": None if rotation is None else rotation % 360.0,
        "mjd": (problems if pointed else Problems()).read(header_mjd, keys.mjd, "mjd", image),
        "exposure_time": problems.read(_exposure_time, camera, image, kind),
        "path": path_in_table(raw.template, table),
        "n_files": len(raw.files),
    }
    problems.raise_all()
    for note in [*image.notes, *_doubts(hdus, camera)]:
        report.doubtful.append(Skip(printable(raw.template), "doubtful", note))
    try:
        return ExposureRow.model_validate(values)
    except ValidationError as error:
        raise HeaderValueError("bad_value", explain(error.errors()[0])) from error


def _kind_of(camera: Camera, image: FileHeaders) -> str:
    kind = header_text(camera.header.kind, "kind", image)
    kind = kind.lower() if kind.lower() in KINDS else kind
    if kind not in KINDS:
        raise HeaderValueError(
            "other_kind",
            f"is of kind {kind!r}, not one of {', '.join(KINDS)}: if it is one of them, say so "
            "in `header.kind.values` of the camera",
        )
    return kind


def _read_files(raw: RawFiles, camera: Camera, report: IngestReport) -> dict[Path, list[HduHeader]]:
    """Read the headers of all files of an exposure; a damaged CCD does not lose its exposure."""
    found, errors = {}, {}
    largest = largest_hdu(camera.detectors)
    for file in raw.files:
        try:
            found[file] = read_hdus(file, largest)
        except HeaderValueError as error:
            errors[file] = error
    if not found:
        raise next(iter(errors.values()))
    for file, error in errors.items():
        message = f"{error.message} (its exposure is used without this CCD)"
        report.skipped.append(Skip(printable(file), error.reason, message))
    return found


def _doubts(hdus: dict[Path, list[HduHeader]], camera: Camera) -> list[str]:
    """Return what the headers of an exposure say otherwise than the camera file."""
    shapes: list[str] = []
    gains: list[str] = []
    missing: list[str] = []
    detectors = {str(detector.extension): detector for detector in camera.detectors}
    for file, found in hdus.items():
        own = camera.detectors
        if camera.layout.files == "ccd":
            _, extension = file_template(file.name, camera.layout)
            own = (detectors[extension],)
        for detector in own:
            names = {amplifier_hdu(camera, detector, one) for one in detector.amplifiers}
            if not all(any(is_hdu(name, hdu) for hdu in found) for name in names):
                missing.append(f"CCD {detector.id} is not in it: it will fail")
                continue
            shape, gain = _doubts_of(found, camera, detector)
            shapes += filter(None, [shape])
            gains += filter(None, [gain])
    # of many CCDs they are all alike
    return [
        text if len(doubts) == 1 else f"{text} (and {len(doubts) - 1} more)"
        for doubts in (missing, shapes, gains)
        for text in doubts[:1]
    ]


def _doubts_of(found: list[HduHeader], camera: Camera, detector: Detector) -> tuple[str, str]:
    """Return what is wrong with the sizes and the gain of a CCD; empty if nothing is."""
    by_name: dict[str | int, list[Amplifier]] = {}
    for amplifier in detector.amplifiers:
        by_name.setdefault(amplifier_hdu(camera, detector, amplifier), []).append(amplifier)
    for name, amplifiers in by_name.items():
        hdu = next((hdu for hdu in found if is_hdu(name, hdu)), None)
        if hdu is None:
            continue
        problem = shape_problem(hdu, detector, amplifiers)
        if problem:
            return f"{problem}: it will fail with wrong_shape", ""
        try:
            doubt = _number_doubt(hdu, detector)
            if not doubt and camera.layout.header_hdu < len(found):
                doubt = _gain_doubt([hdu, found[camera.layout.header_hdu]], detector, amplifiers)
        except NotFitsError as error:
            return f"CCD {detector.id}: {error}: it will fail with not_fits", ""
        if doubt:
            return "", doubt
    return "", ""


def _number_doubt(hdu: HduHeader, detector: Detector) -> str:
    """Compare the number of amplifiers in the header of a CCD with the camera file."""
    own = len(detector.amplifiers)
    for keyword in ("NAMPS", "NUMAMPS", "NOUTPUTS"):
        said = Problems().read(
            header_number,
            ValueKey(keyword=keyword),
            "amplifiers",
            FileHeaders(Path(), (hdu.header,)),
        )
        if said is not None and said != own:
            return f"CCD {detector.id}: {keyword} is {said:g}, and the camera file has {own}"
    return ""


def _gain_doubt(
    hdus: Sequence[HduHeader], detector: Detector, amplifiers: Sequence[Amplifier]
) -> str:
    """Compare the gains of headers with those of the camera file."""
    headers = [hdu.header for hdu in hdus]
    for amplifier in amplifiers:
        where = f"amplifier {amplifier.name} of CCD {detector.id}"
        if amplifier.gain_keyword is not None:
            values, problem = amplifier_values(amplifier, headers)
            if problem:
                return f"{where}: {problem}: it will fail with missing_keyword"
            ratio = values["gain"] / amplifier.gain
            if not 0.5 <= ratio <= 2.0:
                return (
                    f"{where}: {amplifier.gain_keyword} is {values['gain']:g}, which counts, and "
                    f"the camera file says {amplifier.gain:g}"
                )
        elif len(detector.amplifiers) == 1:
            plain = amplifier.model_copy(update={"gain_keyword": "GAIN"})
            gain = amplifier_values(plain, headers)[0].get("gain")
            if gain is not None and abs(gain / amplifier.gain - 1.0) > 0.1:
                return (
                    f"{where}: GAIN is {gain:g}, and the camera file, which counts, says "
                    f"{amplifier.gain:g}: set gain_keyword if the header is right"
                )
    return ""


def with_progress(items: Collection[Item], what: str) -> Iterable[Item]:
    """Return the items; a bar shows how far they are, on a terminal and only if it takes time."""
    from tqdm import tqdm  # jobs that import this module have no use for it

    return tqdm(items, what, delay=PROGRESS_DELAY, leave=False, disable=None)


def repoint(
    table: str | Path,
    results: str | Path,
    camera: Camera,
    max_misfit: float = MAX_MISFIT,
    also_passed: bool = False,
) -> tuple[dict[str, Pointing], list[Skip]]:
    """Correct the pointings of an exposure table by those of the fitted CCDs.

    Exposures that passed did so with the pointing that they have, and keep it: another one would
    redo them and their dependents.

    Parameters
    ----------
    results : path
        Folder of the results, or its folder ``summary``.
    max_misfit : float
        Largest rms between predicted and fitted outlines, as part of their extent; where it is
        larger, the camera file (scale, parity, positions) is at fault and not the pointing.
    also_passed : bool
        Correct exposures that passed too.

    Returns
    -------
    pointings : dict
        New pointings by exposure.
    skipped : list of Skip
        Exposures that keep their pointing, with the reason.
    """
    pointings: dict[str, Pointing] = {}
    skipped: list[Skip] = []
    rows: list[ExposureRow] = []
    old = read_exposures(table)
    for row in with_progress(old, "reading manifests"):
        rows.append(row)
        if row.kind != "science" or (not also_passed and _has_passed(row, Path(results))):
            continue
        fitted = fitted_rows(row.exposure, Path(results))
        if not fitted:
            message = f"{results} has no fitted CCD of exposure {row.exposure}"
            skipped.append(Skip(row.exposure, "not_fitted", message))
            continue
        found = fit_pointing(fitted, camera, row.ra, row.dec, row.rotation)
        message = misfit(found, max_misfit)
        if message is not None:
            skipped.append(Skip(row.exposure, "camera_does_not_fit", message))
            continue
        pointings[row.exposure] = found
        rows[-1] = row.model_copy(update=found.angles._asdict())
    write_exposures(table, rows)
    return pointings, skipped


def _product(template: str, results: Path, **wildcards: str) -> Path:
    """Return a product in a folder of results, which may be given by its folder ``summary``."""
    folder = results.parent if results.name == "summary" else results
    return folder / Path(template.format(**wildcards)).relative_to(paths.RESULTS)


def _has_passed(row: ExposureRow, results: Path) -> bool:
    """Return whether an exposure has a manifest, and is not left out."""
    manifest = _product(paths.MANIFEST, results, exposure=row.exposure)
    return manifest.is_file() and not read_verdict(manifest).cause


def fitted_rows(exposure: str, results: Path) -> list[CcdRow]:
    """Return the CCDs of an exposure that have a fitted footprint.

    They are in its manifest, also if it was left out; if its job failed, in the table of its
    failure; or else in the rows of its CCDs.
    """
    manifest = _product(paths.MANIFEST, results, exposure=exposure)
    for table in (manifest, manifest.with_suffix(".failed.ecsv")):
        if table.is_file():
            rows = read_manifest(table)
            break
    else:
        single = _product(paths.ROW, results, exposure=exposure, ccd="*")
        rows = [read_row(path) for path in sorted(single.parent.glob(single.name))]
    fitted = (row for row in rows if row.state == "done" or row.reason in OF_EXPOSURE)
    return [row for row in fitted if row.footprint_ra]


def files_in(sources: Iterable[str | Path]) -> list[Path]:
    """Return files, and all files in folders, in the order of their names.

    Hidden files are left out (many programs copy to such names first), links are followed. Raises
    InputError if a source is not there.
    """
    found: set[Path] = set()
    for source in sources:
        path = Path(source)
        if path.is_file():
            found.add(path)
        elif path.is_dir():
            found.update(_walk(path))
        else:
            raise InputError(
                "there is no such file or folder", path=path, remedy="give the folder of raw files"
            )
    return sorted(found)


def _walk(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder but hidden ones; links are followed, each folder once."""
    seen: set[str] = set()
    for name, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(name)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(item for item in folders if not item.startswith("."))
        yield from (Path(name, item) for item in files if not item.startswith("."))


def _template(path: Path, camera: Camera) -> Path:
    """Return the common name of the exposure's files: with one per CCD, the CCD taken out."""
    if camera.layout.files == "exposure":
        return path
    try:
        name, extension = file_template(path.name, camera.layout)
    except InputError as error:
        raise HeaderValueError("no_ccd_in_name", error.cause) from error
    if extension not in {str(detector.extension) for detector in camera.detectors}:
        raise HeaderValueError("other_ccd", f"camera {camera.name} has no CCD {extension!r}")
    return path.with_name(name)


def _exposure_time(camera: Camera, image: FileHeaders, kind: str | None) -> float:
    key = camera.header.exposure_time
    if kind == "bias":
        return Problems().read(header_number, key, "exposure_time", image) or 0.0
    time = header_number(key, "exposure_time", image)
    if time == 0.0:
        name = f"exposure_time ({key.keyword})" if key.keyword else "exposure_time"
        raise HeaderValueError("bad_value", f"{name} is 0")
    return time


def check_name(path: Path) -> None:
    """Raise HeaderValueError if a path cannot be written into a table, or would be read otherwise.

    Tables are lines of UTF-8; Snakemake takes words in braces for wildcards.
    """
    name = os.path.abspath(path)  # noqa: PTH100 - symbolic links of raw data stay
    if re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]|[\ud800-\udfff]", name):
        what = "has a line break, a control character, or one that is not UTF-8 in its path"
        raise HeaderValueError("bad_name", f"{what}: rename it")
    if WILDCARD.search(name):
        what = "has a word in braces in its path, which Snakemake takes for a wildcard"
        raise HeaderValueError("bad_name", f"{what}: rename the file or the folder")


def printable(path: str | Path) -> str:
    """Return a path for messages: what cannot be printed is escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def merge_rows(
    old: Sequence[Row],
    rows: Sequence[Row],
    table: str | Path,
    replace_rows: bool,
    report: IngestReport,
) -> list[Row]:
    """Return the rows of a table with those of new files; the report notes what became of them.

    Two files of one exposure (or image) are never chosen between in silence: the first stays.
    Raises InputError if there is no row at all.
    """
    merged = {row.key: row for row in old}
    found: dict[tuple, Row] = {}
    for row in rows:
        known, name = merged.get(row.key), "/".join(str(part) for part in row.key)
        if row.key in found or (known and known.source != row.source and not replace_rows):
            other = file_of((found.get(row.key) or known).path, table)
            message = f"its id {name} is that of {other}, which stays"
            if row.key not in found:
                message += " in the table unless you say --replace"
            file = printable(file_of(row.path, table))
            report.skipped.append(Skip(file, "duplicate_id", message))
            continue
        found[row.key] = row
        if known is None:
            report.added.append(name)
        elif known == row:
            report.unchanged.append(name)
        elif replace_rows:
            report.replaced.append(name)
        else:
            report.kept.append(name)
            continue
        merged[row.key] = row
    if not merged:
        unusable = [skip for skip in report.skipped if skip.reason != "other_name"]
        raise InputError(
            f"none of {len(unusable)} raw files can be used; the first: {unusable[0].message}",
            path=unusable[0].file,
            remedy="check that the camera or the settings are those of these files",
        )
    report.n_rows = len(merged)
    return list(merged.values())
