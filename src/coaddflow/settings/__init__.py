"""All settings of a run, as one typed model.

The model gives the defaults, validates the user's settings (an unknown key is an error that names
it), and generates ``docs/settings.md``. Only pydantic is imported here, because the Snakefile reads
the settings again in every cluster job.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from coaddflow.errors import InputError, did_you_mean
from coaddflow.settings.astrometry import AstrometrySettings
from coaddflow.settings.background import BackgroundSettings
from coaddflow.settings.base import Ids, Section
from coaddflow.settings.calexp import CalexpSettings
from coaddflow.settings.calibrated import CalibratedSettings
from coaddflow.settings.calibs import CalibsSettings
from coaddflow.settings.coadd import CoaddSettings
from coaddflow.settings.detection import DetectionSettings
from coaddflow.settings.detrend import CosmicsSettings, DetrendSettings, InterpolationSettings
from coaddflow.settings.exposure import ExposureSettings
from coaddflow.settings.parallel import ParallelSettings
from coaddflow.settings.photometry import PhotometrySettings
from coaddflow.settings.prediction import PredictionSettings
from coaddflow.settings.products import ProductsSettings
from coaddflow.settings.psf import PsfSettings
from coaddflow.settings.refcat import RefcatSettings
from coaddflow.settings.selection import SelectionSettings
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.settings.warp import WarpSettings


class Settings(Section):
    """The settings of a run; `config.yaml` shows every key with its default."""

    camera: str | None = None
    """Name of a shipped camera, or path of a camera file; needed for raw exposures."""
    exposures: str | None = None
    """Table of raw exposures, made by `coaddflow ingest`."""
    bands: Ids | None = None
    """Bands to process; null: all in the exposure table."""
    exclude: Ids = ()
    """Exposures to ignore, as if they were not in the tables."""
    exclude_ccds: tuple[int, ...] = ()
    """CCDs to ignore in all exposures."""
    refcat: RefcatSettings = Field(default_factory=RefcatSettings)
    calibs: CalibsSettings = Field(default_factory=CalibsSettings)
    detrend: DetrendSettings = Field(default_factory=DetrendSettings)
    cosmics: CosmicsSettings = Field(default_factory=CosmicsSettings)
    interpolation: InterpolationSettings = Field(default_factory=InterpolationSettings)
    background: BackgroundSettings = Field(default_factory=BackgroundSettings)
    detection: DetectionSettings = Field(default_factory=DetectionSettings)
    psf: PsfSettings = Field(default_factory=PsfSettings)
    astrometry: AstrometrySettings = Field(default_factory=AstrometrySettings)
    photometry: PhotometrySettings = Field(default_factory=PhotometrySettings)
    calexp: CalexpSettings = Field(default_factory=CalexpSettings)
    exposure: ExposureSettings = Field(default_factory=ExposureSettings)
    calibrated: CalibratedSettings = Field(default_factory=CalibratedSettings)
    prediction: PredictionSettings = Field(default_factory=PredictionSettings)
    skymap: SkymapSettings = Field(default_factory=SkymapSettings)
    selection: SelectionSettings = Field(default_factory=SelectionSettings)
    warp: WarpSettings = Field(default_factory=WarpSettings)
    coadd: CoaddSettings = Field(default_factory=CoaddSettings)
    products: ProductsSettings = Field(default_factory=ProductsSettings)
    parallel: ParallelSettings = Field(default_factory=ParallelSettings)

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if self.exposure.enabled and self.parallel.calexp != "exposure":
            keys = " and ".join(f"exposure.{name}.enabled" for name in self.exposure.enabled)
            raise ValueError(f"{keys} needs `parallel.calexp: exposure`")
        if self.coadd.background_matching.enabled and self.parallel.coadd != "tract":
            raise ValueError("coadd.background_matching.enabled needs `parallel.coadd: tract`")
        return self

    def changed_in(self, *names: str) -> dict[str, Any]:
        """Return what products depend on in some sections and differs from its default.

        Plain values by section, for provenance and for the ``params`` of rules; sections in
        which nothing has been changed are left out.
        """
        found = {name: getattr(self, name).changed() for name in names}
        return {name: values for name, values in found.items() if values}

    def only(self, *names: str) -> "Settings":
        """Return settings in which only some sections can be read.

        A job takes its settings through this, with the sections of its stage: one that uses a
        setting without being done again when it changes fails at once.
        """
        restricted = self.model_copy()
        for name in set(Settings.model_fields) - set(names):
            restricted.__dict__.pop(name, None)
        return restricted

    def provenance(self) -> dict[str, Any]:
        """Return `changed_in` all sections that can be read here (see `only`)."""
        sections = (
            name for name in sorted(self.__dict__) if isinstance(getattr(self, name), Section)
        )
        return self.changed_in(*sections)


def load_settings(config: Mapping[str, Any], source: str | Path | None = None) -> Settings:
    """Check a configuration and fill in the defaults.

    Parameters
    ----------
    config : mapping
        Content of the YAML file.
    source : str or Path, optional
        The file, for the message.

    Raises
    ------
    InputError
        If a key is unknown or a value is not allowed; names every such key.
    """
    try:
        return Settings.model_validate(dict(config))
    except ValidationError as error:
        raise InputError(
            "; ".join(_explain(problem) for problem in error.errors()),
            path=source,
            remedy="see docs/settings.md for all settings",
        ) from error


def _explain(problem: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if not key:
        return str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {key!r}{_what_was_meant(problem['loc'])}"
    if problem["type"] == "model_type":
        meant = "" if problem["input"] is None else _what_was_meant(problem["loc"])
        return f"setting {key!r} is a section with keys of its own{meant}"
    if problem["type"] == "tuple_type":
        one = problem["input"]
        return f"setting {key!r} is a list, in brackets: [{one}]"
    return f"setting {key!r}: {problem['msg']}, not {problem['input']!r}"


def _what_was_meant(loc: tuple[str | int, ...]) -> str:
    """Return a question for the setting that an unknown key may stand for.

    Such are a similar key of the same section, the same key of another section, and a key that is
    written with its sections before it.
    """
    sections = _keys_by_section(Settings)
    own, name = ".".join(map(str, loc[:-1])), str(loc[-1])
    dotted = f"{own}.{name}" if own else name
    if "." in name:
        section, _, last = dotted.rpartition(".")
        if last in sections.get(section, ()):
            return f" (did you mean {name.replace('.', ': {')}: ...{'}' * name.count('.')}?)"
    # a section is not meant where its own name was written
    similar = did_you_mean(name, [key for key in sections.get(own, ()) if key != name])
    if similar:
        return similar
    known = [f"{section}.{key}".strip(".") for section, keys in sections.items() for key in keys]
    elsewhere = [key for key in known if key.rpartition(".")[2] == name and key != dotted]
    if elsewhere:
        return f" (did you mean {' or '.join(map(repr, elsewhere[:3]))}?)"
    return did_you_mean(dotted, known)


def _keys_by_section(model: type[Section], prefix: str = "") -> dict[str, list[str]]:
    """Return the keys of all sections of a model, by the dotted name of their section."""
    found = {prefix: list(model.model_fields)}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= _keys_by_section(field.annotation, f"{prefix}.{name}".strip("."))
    return found
