"""Run Snakemake with another state of the package: as if it had been updated.

python patched_snakemake.py '{"versions": {"warp": 2}, "more_settings": true}' ARGUMENTS...
"""

import dataclasses
import json
import sys

from pydantic import Field, create_model

from coaddflow import settings
from coaddflow.settings.base import Section
from coaddflow.workflow import plan, stages


def raise_versions(versions):
    """Give stages other versions."""
    for name, version in versions.items():
        stages.STAGES[name] = dataclasses.replace(stages.STAGES[name], version=version)


def add_neutral_settings():
    """Give every section a key that changes nothing by default, and the whole a new section.

    The section `exposure` has nothing but parts that can be switched on.
    """
    sections = {}
    for name, field in settings.Settings.model_fields.items():
        if name == "exposure" or not isinstance(field.annotation, type):
            continue
        if issubclass(field.annotation, Section):
            longer = create_model(name, __base__=field.annotation, neutral=(int, 0))
            sections[name] = (longer, Field(default_factory=longer))
    plan.SkymapSettings = sections["skymap"][0]
    new = create_model("new", __base__=Section, neutral=(int, 0))
    sections["new"] = (new, Field(default_factory=new))
    settings.Settings = create_model("Settings", __base__=settings.Settings, **sections)
    for name, stage in stages.STAGES.items():
        stages.STAGES[name] = dataclasses.replace(stage, sections=(*stage.sections, "new"))


if __name__ == "__main__":
    changes = json.loads(sys.argv[1])
    raise_versions(changes.get("versions", {}))
    if changes.get("more_settings"):
        add_neutral_settings()
    from snakemake.cli import main

    main(sys.argv[2:])
