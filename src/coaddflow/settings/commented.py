"""A settings file with an explanation of every key.

    python -m coaddflow.settings.commented config.yaml

rewrites a settings file: its values, all other keys with their defaults, and the description of
each key from the model above it. Comments at the beginning of the file are kept.
"""

import itertools
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import BaseModel

from coaddflow.settings import load_settings
from coaddflow.settings.base import descriptions

WIDTH = 100

SHORT = {"calibrated": "Images calibrated elsewhere, see configs/decam-calibrated.yaml."}
"""Sections that are not written out if they have their defaults, and what stands there instead."""


def rewrite(path: str | Path) -> str:
    """Return a settings file rewritten with all keys and their descriptions.

    Raises InputError if a value is not allowed.
    """
    text = Path(path).read_text(encoding="utf-8")
    beginning = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    lines = [*beginning, *_section_lines(load_settings(yaml.safe_load(text) or {}), 0)]
    return "\n".join(lines).strip() + "\n"


def _section_lines(section: BaseModel, depth: int) -> Iterator[str]:
    indent, meaning = "  " * depth, descriptions(type(section))
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if depth == 0 or isinstance(value, BaseModel):
            yield ""
        if name in SHORT and value == field.get_default(call_default_factory=True):
            yield from _comment(SHORT[name], indent)
            yield f"{indent}# {name}: ..."
        elif isinstance(value, BaseModel):
            yield from _comment(meaning[name] or type(value).__doc__ or "", indent)
            yield f"{indent}{name}:"
            yield from _section_lines(value, depth + 1)
        else:
            yield from _comment(meaning[name], indent)
            yield f"{indent}{name}: {_plain(value)}"


def _comment(text: str, indent: str) -> list[str]:
    first_paragraph = " ".join(text.split("\n\n", maxsplit=1)[0].split())
    start = f"{indent}# "
    return textwrap.wrap(
        first_paragraph,
        WIDTH,
        initial_indent=start,
        subsequent_indent=start,
        break_on_hyphens=False,
    )


def _plain(value: object) -> str:
    """Return a value as one line of YAML."""
    text = yaml.safe_dump(_dumped(value), default_flow_style=True, width=10_000, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _dumped(value: object) -> object:
    """Return models as their values other than defaults, and tuples as lists."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, dict):
        return {key: _dumped(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_dumped(item) for item in value]
    return value


if __name__ == "__main__":
    for name in sys.argv[1:]:
        new_text = rewrite(name)
        if new_text != Path(name).read_text(encoding="utf-8"):
            Path(name).write_text(new_text, encoding="utf-8")
