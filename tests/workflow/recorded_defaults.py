"""The defaults of the settings as they were when the versions of the stages were last raised.

When a default changes: raise the version of the stages that use it (workflow/stages.py), then
``python tests/workflow/recorded_defaults.py`` records the defaults of now.
"""

from pathlib import Path

import yaml

from coaddflow.settings import Settings
from coaddflow.settings.base import Section
from coaddflow.workflow.stages import STAGES

RECORDED = Path(__file__).with_suffix(".yaml")


def defaults_of_now():
    """Return the version of each stage, and the defaults of the sections that it uses."""
    settings = Settings()
    sections = {name for stage in STAGES.values() for name in stage.sections}
    return {
        "versions": {name: stage.version for name, stage in STAGES.items()},
        "defaults": {name: _plain(getattr(settings, name)) for name in sorted(sections)},
    }


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
