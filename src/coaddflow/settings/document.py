"""The page ``docs/settings.md``, the JSON schema and a YAML file, generated from the model.

The model is the only place where a setting is described.
"""

import datetime
import json
import re
import types
import typing
from collections.abc import Iterable

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from coaddflow.settings import Settings
from coaddflow.settings.base import descriptions

_INTRODUCTION = """\
# Settings

A run is configured by one YAML file: `config.yaml`, or the one given with `--configfile`. It needs
only what differs from the defaults. An unknown key or a value that is not allowed stops the run
before it begins, with a message that names the key; `coaddflow check-config FILE` makes the same
check. Paths are relative to the folder in which the workflow runs.

This page is generated from `src/coaddflow/settings/` (`coaddflow settings`). Methods are described
in [stages.md](stages.md), mask planes in [products.md](products.md#mask-planes).
"""

_PLAIN = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true/false",
    datetime.date: "date",
    type(None): "null",
}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def settings_page() -> str:
    """Return the documentation of all settings as Markdown."""
    return f"{_INTRODUCTION}\n{model_tables(Settings, 'The run as a whole')}"


def model_tables(model: type[BaseModel], title: str) -> str:
    """Return the keys of a model as Markdown: the top level under a title, then each section."""
    top = [name for name, field in model.model_fields.items() if _section(field)[1] != ""]
    lines = [f"## {title}", "", *_table(model, top), ""]
    for names, section in _sections(model).items():
        lines += _section_lines(names, section)
    return "\n".join(lines).rstrip() + "\n"


def settings_schema() -> str:
    """Return the JSON schema of the settings, for editors that validate YAML."""
    return json.dumps(Settings.model_json_schema(), indent=1) + "\n"


def default_settings() -> str:
    """Return all settings with their defaults as YAML."""
    import yaml

    return yaml.safe_dump(Settings().model_dump(mode="json"), sort_keys=False)


def _sections(top: type[BaseModel]) -> dict[tuple[str, ...], type[BaseModel]]:
    """Return all sections with their names, in the order of the model."""
    names: dict[type[BaseModel], list[str]] = {}

    def collect(model: type[BaseModel], prefix: str) -> None:
        for key, field in model.model_fields.items():
            inner, suffix = _section(field)
            if inner is not None:
                name = f"{prefix}{key}{suffix}"
                names.setdefault(inner, []).append(name)
                collect(inner, f"{name}.")

    collect(top, "")
    return {tuple(known_as): model for model, known_as in names.items()}


def _section_lines(names: tuple[str, ...], model: type[BaseModel]) -> list[str]:
    """Return the heading, purpose and table of a section."""
    level = 3 if "." in names[0] else 2
    lines = [f"{'#' * level} `{names[0]}`", "", _purpose(model), ""]
    if len(names) > 1:
        also = ", ".join(f"`{name}`" for name in names[1:])
        lines += [f"The same keys are in {also}.", ""]
    return [*lines, *_table(model, model.model_fields), ""]


def _purpose(model: type[BaseModel]) -> str:
    """Return the docstring of a section, one line per paragraph."""
    paragraphs = re.split(r"\n\s*\n", (model.__doc__ or "").strip().replace("``", "`"))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _table(model: type[BaseModel], names: Iterable[str]) -> list[str]:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    meaning = descriptions(model)
    for name in names:
        field = model.model_fields[name]
        cells = [f"`{name}`", _type_of(field), _default_of(field), meaning[name]]
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return rows


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _section(field: FieldInfo) -> tuple[type[BaseModel] | None, str | None]:
    """Return the model of a field that is a section, or a mapping or list of them; else None.

    Also what follows the name of the field: nothing after that of a section.
    """
    for option in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            suffix = {dict: ".<name>", tuple: "[]", list: "[]"}
            return option, suffix.get(typing.get_origin(field.annotation), "")
    return None, None


def _is_union(annotation: object) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _type_of(field: FieldInfo) -> str:
    bounds = [
        f"{word} {getattr(item, bound):g}"
        for item in field.metadata
        for bound, word in _BOUNDS.items()
        if hasattr(item, bound)
    ]
    return ", ".join([_words(field.annotation), *bounds])


def _words(annotation: object) -> str:
    """Return the name of a type for readers."""
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _words(options[0])
    if origin is typing.Literal:
        return " or ".join(f"`{option}`" for option in options)
    if _is_union(annotation):
        return " or ".join(dict.fromkeys(_words(option) for option in options))
    if origin is dict:
        return f"mapping to {_words(options[1])}"
    if origin in (tuple, list):
        return _words_of_list(options)
    return "section" if issubclass(annotation, BaseModel) else _PLAIN[annotation]


def _words_of_list(options: tuple) -> str:
    items = [_words(option) for option in options if option is not Ellipsis]
    if len(items) > 1 and len(set(items)) == 1:
        return f"{len(items)} x {items[0]}"
    return f"list of {', '.join(items)}"


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, BaseModel):
        changed = default.model_dump(mode="json", exclude_defaults=True)
        return f"`{json.dumps(changed)}`" if changed else "see below"
    if isinstance(default, tuple | dict):
        default = json.loads(json.dumps(default, default=lambda value: value.model_dump()))
    return f"`{json.dumps(default)}`"
