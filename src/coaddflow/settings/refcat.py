"""Settings of the reference catalogue."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from coaddflow.errors import InputError
from coaddflow.settings.base import Section

_PLAIN_ENDINGS = (".fits", ".fit", ".cat", ".csv", ".ecsv", ".tsv", ".vot", ".votable", ".xml")
_CATALOGUE_ENDINGS = (
    *_PLAIN_ENDINGS,
    *(f"{ending}.gz" for ending in _PLAIN_ENDINGS),
    ".parquet",
    ".parq",
)
"""Names of files that are taken from a folder."""


class MagnitudeColumn(Section):
    """Columns with the magnitudes of one band."""

    magnitude: str
    """Column of the magnitude."""
    error: str | None = None
    """Column of the magnitude error, mag; null: unknown."""
    unit: Literal["auto", "mag", "nJy", "uJy", "mJy", "Jy"] = "auto"
    """What `magnitude` and `color` are: magnitudes, or fluxes, which become AB magnitudes; `auto`:
    as the file says, else magnitudes."""
    color: tuple[str, str] | None = None
    """Two magnitude columns; the colour is the first minus the second."""
    color_terms: tuple[float, ...] = ()
    """c0, c1, c2, ...: c0 + c1 * colour + c2 * colour^2 ... is added to the magnitude to transform
    it to the band of the camera."""

    @model_validator(mode="after")
    def _check(self) -> "MagnitudeColumn":
        if len(self.color_terms) > 1 and self.color is None:
            raise ValueError("color_terms with more than a constant need `color`")
        return self

    @property
    def magnitudes(self) -> tuple[str, ...]:
        """Columns of magnitudes (or fluxes) that are needed."""
        return (self.magnitude, *(self.color or ()))

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are needed."""
        return (*self.magnitudes, *((self.error,) if self.error is not None else ()))


class RefcatSettings(Section):
    """Reference catalogue: its files and columns."""

    path: str | tuple[str, ...] = ()
    """File, folder, or pattern such as `gaia/*.fits`, or a list of these: FITS tables, VOTable,
    CSV, tab-separated text, ECSV (Gaia's bulk files) and Parquet (needs `coaddflow[parquet]`),
    plain or gzip-compressed."""
    format: Literal["auto", "fits", "votable", "csv", "tsv", "ecsv", "parquet"] = "auto"
    """Format of the files; `auto`: from their first bytes."""
    ra: str = "ra"
    """Column of the right ascension, ICRS. Names of columns may differ in capitals."""
    dec: str = "dec"
    """Column of the declination, ICRS."""
    position_unit: Literal["auto", "deg", "rad", "hourangle"] = "auto"
    """Unit of the positions; `auto`: as the file says, else degrees (LSST's `coord_ra` and
    `coord_dec`: radians, if their values can be)."""
    bands: dict[str, MagnitudeColumn] = Field(default_factory=dict)
    """Magnitude columns of each band."""
    fallback: MagnitudeColumn | None = Field(
        default_factory=lambda: MagnitudeColumn(magnitude="mag")
    )
    """Magnitude columns of bands that are not in `bands`; null: such bands are an error."""
    pm_ra: str | None = None
    """Column of the proper motion in right ascension times cos(dec). A star without one stays at
    its catalogue position."""
    pm_dec: str | None = None
    """Column of the proper motion in declination."""
    motion_unit: Literal["auto", "mas/yr", "arcsec/yr", "deg/yr", "rad/yr"] = "auto"
    """Unit of the proper motions; `auto`: as the file says, else mas/yr (LSST's: rad/yr)."""
    epoch: float | None = Field(None, ge=1800.0, le=2200.0)
    """Epoch of the positions, Julian year, such as 2016.0."""
    epoch_column: str | None = None
    """Column of the epoch, if it differs between stars: Julian year, MJD or JD."""
    plausible_magnitudes: tuple[float, float] = (0.0, 40.0)
    """Magnitudes that are not between these are missing values: catalogues write 0, 99 or -999."""
    faintest: float | None = None
    """Faintest magnitude in the band that is used; null: no limit."""

    @model_validator(mode="after")
    def _check(self) -> "RefcatSettings":
        if (self.pm_ra is None) != (self.pm_dec is None):
            raise ValueError("pm_ra and pm_dec go together: give both or none")
        if self.pm_ra is not None and self.epoch is None and self.epoch_column is None:
            raise ValueError("proper motions need the epoch of the positions: epoch")
        if not self.plausible_magnitudes[0] < self.plausible_magnitudes[1]:
            raise ValueError("plausible_magnitudes are the smallest and the largest, in this order")
        return self

    def magnitude_column(self, band: str) -> MagnitudeColumn:
        """Return where the magnitudes of a band come from, or raise InputError."""
        column = self.bands.get(band, self.fallback)
        if column is None:
            raise InputError(
                f"the reference catalogue has no magnitude for band {band!r}",
                remedy=f"add it to refcat.bands (there are {sorted(self.bands)}), or set "
                "refcat.fallback",
            )
        return column

    def files(self) -> list[Path]:
        """Return the catalogue's files, in the order of their names.

        Raises
        ------
        InputError
            If none is given, or one is not there, or a folder or pattern has none.
        """
        entries = (self.path,) if isinstance(self.path, str) else self.path
        if not entries or not all(entries):
            raise InputError(
                "no reference catalogue is given", remedy="set refcat.path to a file or folder"
            )
        found: set[Path] = set()
        for entry in entries:
            found.update(_expand(entry))
        return sorted(found)


def _expand(entry: str) -> list[Path]:
    """Return the files that a path, a folder or a pattern stands for."""
    path = Path(entry)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [f for f in path.iterdir() if f.name.lower().endswith(_CATALOGUE_ENDINGS)]
        files = [f for f in files if f.is_file() and not f.name.startswith(".")]
        what = f"has no catalogue file ({', '.join(_CATALOGUE_ENDINGS)})"
    elif any(character in entry for character in "*?["):
        pattern = path.relative_to(path.anchor) if path.is_absolute() else path
        files = [f for f in Path(path.anchor).glob(str(pattern)) if f.is_file()]
        what = "is a pattern that no file matches"
    else:
        files, what = [], "does not exist"
    if not files:
        raise InputError(f"the reference catalogue {what}", path=entry, remedy="check refcat.path")
    return files
