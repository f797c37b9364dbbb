"""The manifest: one row a CCD, with everything that later stages must know without its pixels.

The job of a CCD leaves its row as JSON (`write_row`), also when the CCD failed: a failure is a
result with a reason. The rows of an exposure are gathered into its manifest
``results/summary/{exposure}.ecsv``, which is written last: where it stands, all calexps that it
names are whole.
"""

import io
import json
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from coaddflow.errors import OF_EXPOSURE, InputError
from coaddflow.files import atomic_text
from coaddflow.tables import ecsv, paths

FOOTPRINT_POINTS_PER_EDGE = 8

NOTABLE_LOSS = 0.1
"""A CCD that lost more than this fraction of its pixels is named by ``coaddflow status``, and its
loss counts for its exposure."""


class Flag(StrEnum):
    """What a CCD that is used lacks: the codes in `CcdRow.flags`."""

    PREDICTED_WCS = "predicted_wcs"
    EXPOSURE_ZERO_POINT = "exposure_zero_point"
    OWN_SKY = "own_sky"


def _measured(description: str) -> Any:
    """Return the field of a quantity that may be missing."""
    return Field(None, description=description)


class CcdRow(BaseModel):
    """One CCD of one exposure. Quantities that could not be measured are null."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    exposure: str = Field(description="Exposure id.")
    ccd: int = Field(description="CCD number.")
    band: str = Field(description="Band.")
    mjd: float = Field(description="Start of the exposure, MJD TAI.")
    exposure_time: float = Field(description="Exposure time, s.")
    state: Literal["done", "failed"] = Field(description="Whether there is a calexp.")
    reason: str = Field("", description="Short code of the failure; empty if done.")
    message: str = Field("", description="The failure in one sentence; empty if done.")
    flags: str = Field(
        "",
        description="What the CCD lacks although it is used, separated by commas: `predicted_wcs` "
        "(too few stars: the WCS is that of its exposure), `exposure_zero_point` (no zero-point of "
        "its own), `own_sky` (not the sky of the focal plane that was asked for).",
    )
    path: str = Field("", description="The calexp, relative to the working folder.")
    sha256: str = Field("", description="Checksum of the calexp file.")
    nx: int = Field(0, description="Columns.")
    ny: int = Field(0, description="Rows.")
    footprint_ra: list[float] = Field(
        default_factory=list,
        description="Vertices of the outline from the fitted WCS, 8 on each edge, beginning at "
        "pixel (-0.5, -0.5) along the first row; degrees. Of a failed CCD: the outline that the "
        "table of exposures predicts.",
    )
    footprint_dec: list[float] = Field(default_factory=list, description="Likewise; degrees.")
    n_sources: int | None = _measured("Detected sources.")
    n_psf_stars: int | None = _measured("Stars of the PSF model.")
    n_matched: int | None = _measured("Stars of this CCD in the astrometric fit.")
    astrometry_rms: float | None = _measured(
        "Residual of the fit, arcsec (1-d); of a predicted WCS, its expected error."
    )
    pointing_offset: float | None = _measured(
        "Distance of the fitted centre from the predicted one, arcsec."
    )
    n_zero_point: int | None = _measured("Stars of the zero-point.")
    zero_point: float | None = _measured("Magnitude of one electron in total.")
    zero_point_error: float | None = _measured("Error of the zero-point, mag.")
    zero_point_scatter: float | None = _measured("Scatter of its stars, mag.")
    seeing: float | None = _measured("FWHM of the PSF at the centre, arcsec.")
    ellipticity: float | None = _measured("|e| of the PSF at the centre.")
    sky_level: float | None = _measured("Median background, electrons per pixel.")
    sky_noise: float | None = _measured("Standard deviation of empty sky, electrons per pixel.")
    aperture_correction: float | None = _measured("Total flux over flux in the standard aperture.")
    depth: float | None = _measured("Magnitude of a point source at 5 sigma.")
    pixel_scale: float | None = _measured("Arcsec per pixel at the centre.")
    lost_fraction: float | None = _measured("Fraction of the pixels that are BAD, SAT or NO_DATA.")

    @field_validator("message")
    @classmethod
    def _one_line(cls, text: str) -> str:
        """Make one line of an error of many (or of a file's name): a manifest has one a CCD."""
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def write_row(path: str | Path, row: CcdRow) -> None:
    """Write one row as JSON, whole or not at all."""
    atomic_text(path, row.model_dump_json(indent=1) + "\n")


def read_row(path: str | Path) -> CcdRow:
    """Read a row written by `write_row`; raise InputError if it is damaged."""
    try:
        return CcdRow.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise InputError(
            "is not a row of a CCD", path=path, remedy="remove it and run the workflow again"
        ) from error


def write_manifest(path: str | Path, rows: list[CcdRow]) -> None:
    """Write the manifest of an exposure as ECSV, ordered by CCD.

    Raises
    ------
    ValueError
        If the rows are of different exposures, or a CCD occurs twice.
    """
    rows = sorted(rows, key=lambda row: row.ccd)
    if len({row.exposure for row in rows}) != 1 or len({row.ccd for row in rows}) != len(rows):
        raise ValueError("a manifest has each CCD of one exposure once")
    columns = ecsv.model_columns(CcdRow)
    ecsv.write_rows(path, columns, (row.model_dump().values() for row in rows))


def read_manifest(path: str | Path) -> list[CcdRow]:
    """Read a manifest; raise InputError if it is missing or damaged."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise _damaged(path, error) from error
    return rows_of_manifest(path, content)


def rows_of_manifest(path: str | Path, content: bytes) -> list[CcdRow]:
    """Return the rows of a manifest that has been read; errors, as those of `read_manifest`."""
    try:
        # lines may end as on other systems
        text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()
        return [CcdRow.model_validate(_values(cells)) for cells in ecsv.rows_of(text)]
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str | Path, error: Exception) -> InputError:
    return ecsv.damaged(path, "a manifest of coaddflow", error)


def calexp_remedy(exposure: str, ccd: int, results: str | Path = paths.RESULTS) -> str:
    """Return what makes a calexp again that is damaged or gone.

    Its own removal does not: the workflow knows rows and manifests. A job for each CCD promises the
    row, a job for each exposure the manifest.
    """
    names = {"exposure": exposure, "ccd": ccd}
    row, manifest = (
        Path(results) / Path(template.format(**names)).relative_to(paths.RESULTS)
        for template in (paths.ROW, paths.MANIFEST)
    )
    removed = f"{row} and {manifest}" if row.exists() else f"{manifest}"
    return f"remove {removed} and run the workflow again"


class CcdState(NamedTuple):
    """What became of a CCD, as a manifest says it."""

    state: Literal["done", "failed"]
    reason: str
    message: str
    lost_fraction: float = 0.0
    flags: str = ""


def ccd_states(manifest: str | Path) -> dict[int, CcdState] | None:
    """Read what became of the CCDs of an exposure, without a look at anything else.

    Planning asks this of every exposure: the cells stay the text that they are.

    Parameters
    ----------
    manifest : str or Path
        The manifest, or the table of an exposure that was refused.

    Returns
    -------
    dict of int to CcdState, or None
        By CCD; empty if the manifest is damaged, None if there is none.
    """
    try:
        return {
            int(row["ccd"]): CcdState(
                "done" if row["state"] == "done" else "failed",
                row["reason"],
                row["message"],
                float(row.get("lost_fraction") or 0.0),
                row.get("flags", ""),
            )
            for row in ecsv.read_rows(manifest)
        }
    except OSError:
        return None
    except (ValueError, KeyError):
        return {}


def fraction_lost(ccds: Collection[CcdRow | CcdState]) -> float:
    """Return the fraction of an exposure's CCDs that failed, with the parts that others lost.

    CCDs that are only left out with their exposure count for the part that they lost themselves. A
    single CCD that was good enough is not failed by its own lost part.
    """
    if not ccds:
        return 0.0
    lost = [lost_of(ccd) for ccd in ccds]
    return sum(lost) / len(lost) if len(lost) > 1 else float(lost[0] == 1.0)


def lost_of(ccd: CcdRow | CcdState) -> float:
    """Return the fraction of a CCD that its exposure lost: all of it if it failed by itself.

    Losses of up to `NOTABLE_LOSS` (saturated stars, bad columns) do not count.
    """
    if ccd.state == "failed" and ccd.reason not in OF_EXPOSURE:
        return 1.0
    lost = ccd.lost_fraction or 0.0
    return lost if lost > NOTABLE_LOSS else 0.0


def ccds_failed_with(manifest: str | Path, reason: str) -> set[int] | None:
    """Return the CCDs of an exposure that failed for a reason; None without a manifest."""
    ccds = ccd_states(manifest)
    return {ccd for ccd, found in ccds.items() if found.reason == reason} if ccds else None


def _values(cells: dict[str, str]) -> dict[str, object]:
    """Return the values of a row: empty cells are absent ones, lists are JSON."""
    return {
        name: json.loads(cell) if name.startswith("footprint_") else cell
        for name, cell in cells.items()
        if cell
    }
