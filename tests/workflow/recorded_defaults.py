"""The defaults of the settings as they were when the versions of the stages were last raised.

When a default changes: raise the version of the stages that use it (workflow/stages.py), then
``python tests/workflow/recorded_defaults.py`` records the defaults of now.
"""

import typing
from pathlib import Path

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from coaddflow.instrument.camera import Camera
from coaddflow.settings import Settings
from coaddflow.settings.base import Section
from coaddflow.tables.exposures import ExposureRow, ImageRow
from coaddflow.workflow.plan import NOT_IN_PARAMS
from coaddflow.workflow.stages import STAGES

RECORDED = Path(__file__).with_suffix(".yaml")

MODELS = {"camera": Camera, "exposures": ExposureRow, "images": ImageRow}
"""What params carry besides settings (`Stage.reads`), values that are the default left out."""

UNUSED = {(Camera, "description"), (Camera, "header")} | {
    (ExposureRow, name) for name in NOT_IN_PARAMS
}
"""What of them no params carry."""


def defaults_of_now():
    """Return the version of each stage, and the defaults of the sections and models it uses."""
    settings = Settings()
    sections = {name for stage in STAGES.values() for name in (*stage.sections, *stage.reads)}
    return {
        "versions": {name: stage.version for name, stage in STAGES.items()},
        "defaults": {
            name: _of_model(MODELS[name]) if name in MODELS else _plain(getattr(settings, name))
            for name in sorted(sections)
        },
    }


def _of_model(model):
    """Return all defaults of a model and of the models in it, by class: ``Detector.rotation``."""
    found = {}
    for name, field in model.model_fields.items():
        if (model, name) in UNUSED:
            continue
        default = field.get_default(call_default_factory=True)
        if default is not PydanticUndefined:
            plain = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
            found[f"{model.__name__}.{name}"] = list(plain) if isinstance(plain, tuple) else plain
        for nested in _models_in(field.annotation):
            found |= _of_model(nested)
    return found


def _models_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def _plain(section):
    """Return all defaults of a section that products depend on, flat: ``clip.sigma``: 5.0."""
    found = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name in section.without_effect:
            continue
        if isinstance(value, Section):
            found |= {f"{name}.{key}": nested for key, nested in _plain(value).items()}
        else:
            found[name] = section.model_dump(mode="json", include={name})[name]
    return found


if __name__ == "__main__":
    RECORDED.write_text(yaml.safe_dump(defaults_of_now()), encoding="utf-8")
