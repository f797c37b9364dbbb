"""The model of the settings, the page made from it, and the settings files of the project."""

import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from coaddflow.cli.arguments import read_settings
from coaddflow.errors import InputError
from coaddflow.settings import Settings, load_settings
from coaddflow.settings.base import Section, descriptions
from coaddflow.settings.document import default_settings, settings_page, settings_schema
from coaddflow.tables.paths import CALIB_KINDS

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config.yaml"
# those named so are settings of simulated surveys
SURVEYS = sorted((ROOT / "configs").glob("*-survey.yaml"))
FILES = sorted({*(ROOT / "configs").glob("*.yaml"), *ROOT.glob("config.yaml")} - set(SURVEYS))


def sections(model=Settings):
    """Yield all models that settings are made of."""
    yield model
    for field in model.model_fields.values():
        for option in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield from sections(option)


def setting_names(model=Settings, prefix=""):
    """Yield the dotted names of all settings, each section before its keys."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for section in (field.annotation, *typing.get_args(field.annotation)):
            is_section = isinstance(section, type) and issubclass(section, BaseModel)
            if is_section and typing.get_origin(field.annotation) is not dict:
                yield from setting_names(section, f"{prefix}{name}.")


def test_all_defaults_are_allowed_values():
    assert load_settings(yaml.safe_load(default_settings())) == Settings()


def test_every_setting_is_explained_and_no_unknown_key_is_swallowed():
    for model in sections():
        assert issubclass(model, Section) and model.__doc__, model
        assert model.model_config["extra"] == "forbid" and model.model_config["frozen"], model
        for name, field in model.model_fields.items():
            text = descriptions(model)[name] or (field.annotation.__doc__ or "")
            assert text.strip().endswith("."), f"{model.__name__}.{name}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"skymapp": {}}, "unknown setting 'skymapp'"),
        ({"skymap": {"rings": {"rings": 3}}}, "unknown setting 'skymap.rings.rings'"),
        ({"prediction": {"margin": "wide"}}, "setting 'prediction.margin': .*, not 'wide'"),
        ({"prediction": {"margin": -1}}, "setting 'prediction.margin'"),
        ({"psf": {"order": 99}, "warp": {"kernel": "x"}}, "'psf.order'.*'warp.kernel'"),
        ({"calibrated": {"mask": {"planes": 3}}}, "'calibrated.mask.planes'"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(content, said):
    with pytest.raises(InputError, match=said) as caught:
        load_settings(content, "run.yaml")
    assert str(caught.value).startswith("run.yaml: ")


def test_the_snakefile_pays_for_pydantic_only():
    code = "import sys, coaddflow.settings; print({'numpy', 'astropy', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# the page


def test_the_page_of_settings_is_that_of_the_model():
    """When this fails: `coaddflow settings > docs/settings.md`."""
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == settings_page()


def test_the_page_has_every_key_of_every_section():
    page = settings_page()
    rows = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    headings = set(re.findall(r"^#+ `(.+)`$", page, flags=re.MULTILINE))
    for name in setting_names():
        assert name.rpartition(".")[2] in rows or name in headings, name


def test_the_schema_knows_what_the_model_refuses():
    schema = json.loads(settings_schema())
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Settings.model_fields)


# the files of the project


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_settings_files_of_the_project_are_valid(path):
    read_settings(path)


def keys_of(content, prefix=""):
    for key, value in content.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")


@pytest.mark.skipif(not CONFIG.exists(), reason="config.yaml is not there")
def test_the_default_settings_file_shows_every_key():
    shown = set(keys_of(yaml.safe_load(CONFIG.read_text(encoding="utf-8"))))
    # a key may also be shown as a comment, where its default is meant
    commented = set(re.findall(r"^\s*#\s*(\w+):", CONFIG.read_text(), flags=re.MULTILINE))
    # what is inside the example of a fact, of a column or of an absent section is on the page
    inner = ("calibrated.", "refcat.bands.", "refcat.fallback.", "calibs.sets.nights.")
    inner += tuple(f"calibs.{kind}.sets." for kind in CALIB_KINDS)
    missing = [
        name
        for name in setting_names()
        if name not in shown
        and name.rpartition(".")[2] not in commented
        and not name.startswith(inner)
    ]
    assert missing == []


@pytest.mark.skipif(not CONFIG.exists(), reason="config.yaml is not there")
def test_every_key_of_the_default_settings_file_is_explained():
    unexplained = []
    lines = CONFIG.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        is_key = re.match(r"\s*[\w-]+:", line)
        before = lines[number - 1].strip() if number else ""
        if is_key and "#" not in line and not before.startswith("#"):
            unexplained.append(line)
    assert unexplained == []
