"""Settings files as YAML: a mapping without duplicate keys."""

from pathlib import Path
from typing import Any

import yaml

from coaddflow.errors import InputError


def read_file(path: str | Path) -> dict[str, Any]:
    """Return the content of a settings file.

    Raises
    ------
    InputError
        If it cannot be read, is not YAML or not a mapping, or has a duplicate key; names the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or "not text"
        raise InputError(
            f"the settings cannot be read: {cause}",
            path=path,
            remedy="give the file with --config (snakemake: --configfile)",
        ) from error
    try:
        content = yaml.safe_load(text)
        check_keys(text, path)
    except yaml.YAMLError as error:
        raise _not_yaml(error, path) from error
    if content is not None and not isinstance(content, dict):
        raise InputError("has no settings in it", path=path, remedy="write keys and values")
    return content or {}


def _not_yaml(error: yaml.YAMLError, path: str | Path) -> InputError:
    """Return what is wrong with a file in one line: the line, and tabs for what they are."""
    mark = getattr(error, "problem_mark", None)
    line = f" in line {mark.line + 1}" if mark is not None else ""
    problem = getattr(error, "problem", None) or str(error)
    if "'\\t'" in problem:
        problem, remedy = "a tab", "indent with spaces"
    else:
        remedy = "correct the line"
    return InputError(f"is not YAML{line}: {problem}", path=path, remedy=remedy)


def check_keys(text: str, path: str | Path) -> None:
    """Reject duplicate keys in a section, of which YAML would silently take the last.

    Parameters
    ----------
    text : str
        Content of a settings file.
    path : str or Path
        The file, for the message.

    Raises
    ------
    InputError
        If a key is duplicated; names the key and both lines.
    yaml.YAMLError
        If the text is not YAML.
    """
    _check_node(yaml.compose(text, Loader=yaml.SafeLoader), path)


def _check_node(node: yaml.Node | None, path: str | Path) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if str(key.value) in seen:
                raise InputError(
                    f"duplicate key {key.value!r} in lines {seen[str(key.value)]} and {line}",
                    path=path,
                    remedy="remove one of them",
                )
            seen[str(key.value)] = line
            _check_node(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_node(item, path)
