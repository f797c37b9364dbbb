"""Keys of a settings file that stand twice."""

from pathlib import Path

import yaml

from coaddflow.errors import InputError


def check_keys(text: str, path: str | Path) -> None:
    """Refuse keys that stand twice in one section: YAML would take the last in silence.

    Parameters
    ----------
    text : str
        Content of a settings file.
    path : str or Path
        The file, for the message.

    Raises
    ------
    InputError
        If a key stands twice; names it and both lines.
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
                    f"key {key.value!r} stands twice, in lines {seen[str(key.value)]} and {line}",
                    path=path,
                    remedy="remove one of them",
                )
            seen[str(key.value)] = line
            _check_node(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_node(item, path)
