"""Duplicate keys of a settings file."""

from pathlib import Path

import yaml

from coaddflow.errors import InputError


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
