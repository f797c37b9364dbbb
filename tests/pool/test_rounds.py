"""Rounds of work give the same results whether or not workers die on the way."""

import pool_work as work
import pytest

from coaddflow.errors import CcdFailure
from coaddflow.pool import Pool, PoolError, Rounds

KEYS = ["a", "b", "c", "d"]


def numbers(factor):
    return {key: factor * (place + 1) for place, key in enumerate(KEYS)}


@pytest.fixture(params=["serial", "processes"])
def pool(request):
    with Pool(request.param, 2) as opened:
        yield opened


@pytest.fixture
def processes():
    with Pool("processes", 2) as opened:
        yield opened


def test_every_round_finds_what_the_one_before_has_kept(pool):
    rounds = Rounds(pool, KEYS)
    assert rounds.do(work.add_to_state, numbers(1)) == numbers(1)
    assert rounds.do(work.add_to_state, numbers(10)) == numbers(11)


def test_items_that_leave_are_no_longer_processed(pool):
    rounds = Rounds(pool, KEYS)
    rounds.do(work.add_to_state, numbers(1))
    rounds.leave("b")
    assert rounds.keys == ["a", "c", "d"]
    assert rounds.do(work.add_to_state, numbers(1)) == {"a": 2, "c": 6, "d": 8}


@pytest.mark.parametrize("fatal_round", [0, 1, 2])
def test_items_of_a_dead_worker_are_restarted(processes, tmp_path, fatal_round, caplog):
    rounds = Rounds(processes, KEYS, label="CCD {}".format)
    for number in range(3):
        arguments = numbers(10**number)
        if number == fatal_round:
            arguments["c"] = (arguments["c"], tmp_path / "died")
        found = rounds.do(work.add_to_state, arguments)
    assert (tmp_path / "died").exists()
    assert found == numbers(111)
    assert "restarted because their worker died: " in caplog.text
    assert "CCD c" in caplog.text


def test_work_on_an_item_ends_with_the_result_that_says_so(processes, tmp_path):
    rounds = Rounds(processes, KEYS, is_end=work.is_two)
    assert rounds.do(work.add_to_state, numbers(1)) == numbers(1)
    assert rounds.keys == ["a", "c", "d"]
    # restarted, "a" reaches 2 in the first step: the second one is not done
    with_death = {"a": (1, tmp_path / "died"), "c": 1, "d": 1}
    assert rounds.do(work.add_to_state, with_death) == {"a": 2, "c": 4, "d": 5}
    assert rounds.keys == ["c", "d"]


def test_an_item_that_ends_two_workers_ends_the_work_with_its_name(processes):
    rounds = Rounds(processes, KEYS, label="CCD {}".format)
    with pytest.raises(PoolError, match=r"CCD a has killed two workers .*more memory"):
        rounds.do(work.end_worker, numbers(1))


def test_what_a_function_raises_is_raised_when_the_others_have_ended(pool):
    with pytest.raises(CcdFailure, match="no_stars"):
        Rounds(pool, KEYS).do(work.fail_at_three, numbers(1))
