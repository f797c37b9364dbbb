"""The package reads from top to bottom: imports go one way."""

import ast
from pathlib import Path

import coaddflow

PACKAGE = Path(coaddflow.__file__).parent

ORDER = (
    "errors",
    "fence",
    "files",
    "compiled",
    "settings",
    "geometry",
    "image",
    "tables",
    "runtime",
    "cluster",
    "pool",
    "instrument",
    "ingest",
    "measure",
    "isr",
    "astrometry",
    "calib",
    "calexp",
    "exposure",
    "skymap",
    "corners",
    "solution",
    "warp",
    "coadd",
    "workflow",
    "rehearsal",
    "qa",
    "simulate",
    "cli",
)
"""Packages and modules of the top level, in the order of the data."""


def modules():
    """Return all modules of the package: name and file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name and parts[-1] != "__main__":
            found[name] = path
    return found


def imports_of(path, names):
    """Return the modules of the package that a module imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # what is imported may be a module, or a name in one
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in whole if name.removeprefix("coaddflow.") in names}
            found.add(node.module)
    return {name.removeprefix("coaddflow.") for name in found if name.startswith("coaddflow.")}


def test_imports_go_one_way():
    names = modules()
    assert len(names) > 150
    assert {name.split(".")[0] for name in names} == set(ORDER)
    upwards = [
        f"{name} imports {other}"
        for name, path in names.items()
        for other in imports_of(path, names)
        if ORDER.index(other.split(".")[0]) > ORDER.index(name.split(".")[0])
    ]
    assert not upwards


def test_no_imports_run_in_a_circle():
    names = modules()
    # a package is there before its modules, and imports nothing that needs them
    waiting = {
        name: {other for other in imports_of(path, names) & names.keys() if other != name}
        for name, path in names.items()
    }
    while free := [name for name, needed in waiting.items() if not needed & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting
