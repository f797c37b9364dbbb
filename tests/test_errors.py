"""Errors, and what is made of their causes."""

import ast
import signal
from pathlib import Path

import pytest
from survey_run import REPOSITORY

from coaddflow.errors import InputError, causes, is_lasting


@pytest.fixture
def no_endless_walk():
    """Fail instead of running for ever."""

    def stop(*_):
        raise AssertionError("still walking")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_causes_in_a_circle_are_walked_once(length, no_endless_walk):
    circle = [InputError(f"number {k}") for k in range(length)]
    for k, error in enumerate(circle):
        error.__cause__ = circle[k - 1]
    assert len(list(causes(circle[0]))) == length
    assert is_lasting(circle[0])
    circle[-1].__cause__, circle[0].__cause__ = circle[0], OSError("stale file handle")
    assert not is_lasting(circle[-1])


def test_no_error_is_raised_from_itself():
    found = []
    for folder in ("src", "scripts", "rules", "profiles", "benchmarks"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise) and node.cause is not None:
                    same = ast.dump(node.exc) == ast.dump(node.cause)
                    found += [f"{path}:{node.lineno}"] * same
    assert found == []
