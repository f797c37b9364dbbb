"""Run Snakemake with another state of the package: as if it had been updated.

python patched_snakemake.py '{"versions": {"warp": 2}, "more_settings": true}' ARGUMENTS...
"""

import dataclasses
import functools
import inspect
import json
import operator
import sys
import types
import typing

from pydantic import Field, TypeAdapter, create_model

from coaddflow import settings
from coaddflow.settings.base import Section
from coaddflow.settings.exposure import ExposureSettings
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.workflow import plan, stages


def raise_versions(versions):
    """Give stages other versions."""
    for name, version in versions.items():
        stages.STAGES[name] = dataclasses.replace(stages.STAGES[name], version=version)


def add_neutral_settings():
    """Give every section, at any depth, a key that changes nothing by default, and add a section.

    The section `exposure` itself has nothing but parts that can be switched on.
    """
    new = create_model("new", __base__=Section, neutral=(int, 0))
    sections = longer_fields(settings.Settings) | {"new": (new, Field(default_factory=new))}
    settings.Settings = create_model("Settings", __base__=settings.Settings, **sections)
    plan.SkymapSettings = longer(SkymapSettings)
    for name, stage in stages.STAGES.items():
        stages.STAGES[name] = dataclasses.replace(stage, sections=(*stage.sections, "new"))
    added = settings.Settings()
    parts = (added.coadd, added.coadd.clip, added.calibs.bias, added.exposure.sky)
    assert not any(part.neutral for part in (*parts, added.refcat.fallback))


@functools.cache
def longer(section):
    """Return a section with the new key in itself and in all sections below it."""
    key = {} if section is ExposureSettings else {"neutral": (int, 0)}
    return create_model(section.__name__, __base__=section, **longer_fields(section), **key)


def longer_fields(section):
    """Return type and default of the fields of a section that hold sections, with the new key."""
    longer_ones = {
        name: longer_type(field.annotation) for name, field in section.model_fields.items()
    }
    return {
        name: (longer_ones[name], longer_default(field, longer_ones[name]))
        for name, field in section.model_fields.items()
        if longer_ones[name] != field.annotation
    }


def longer_default(field, annotation):
    """Return the default of a field as a value of the longer type."""
    read = TypeAdapter(annotation).validate_python

    def default(value):
        return read(value.model_dump() if isinstance(value, Section) else value)

    if field.default_factory is not None:
        return Field(default_factory=lambda: default(field.default_factory()))
    return default(field.default)


def longer_type(annotation):
    """Return a type, such as ``dict[str, MagnitudeColumn]``, with longer sections in it."""
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        return longer(annotation)
    arguments = typing.get_args(annotation)
    longer_ones = tuple(map(longer_type, arguments))
    if longer_ones == arguments:
        return annotation
    if isinstance(annotation, types.UnionType):
        return functools.reduce(operator.or_, longer_ones)
    return typing.get_origin(annotation)[longer_ones]


if __name__ == "__main__":
    changes = json.loads(sys.argv[1])
    raise_versions(changes.get("versions", {}))
    if changes.get("more_settings"):
        add_neutral_settings()
    from snakemake.cli import main

    main(sys.argv[2:])
