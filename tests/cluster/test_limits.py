"""What a cluster has: read from Slurm's answers."""

import os

import pytest

from coaddflow.cluster import limits
from coaddflow.cluster.limits import NO_LIMITS, Limits, minutes_of, slurm_limits

PARTITIONS = """\
PartitionName=main AllowGroups=ALL Default=YES MaxTime=1-00:30:00 MaxMemPerNode=UNLIMITED
PartitionName=short Default=NO MaxTime=00:30:00 MaxMemPerNode=4000 Reason=a b
PartitionName=endless Default=NO MaxTime=UNLIMITED MaxMemPerNode=UNLIMITED
"""

NODES = """\
NodeName=n1 CPUTot=8 CPUEfctv=7 RealMemory=6000 MemSpecLimit=500 Partitions=main,short State=IDLE
NodeName=n2 CPUTot=8 CPUEfctv=7 RealMemory=6000 MemSpecLimit=500 Partitions=main State=DOWN
NodeName=n3 CPUTot=2 RealMemory=16000 Partitions=main State=MIXED
NodeName=n4 CPUTot=64 RealMemory=512000 Partitions=endless State=MIXED Reason=CPUTot=1 later
"""


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Put a scontrol into the PATH that answers as above, and counts how often it is asked."""
    program = tmp_path / "scontrol"
    for name, text in (("partition", PARTITIONS), ("node", NODES)):
        (tmp_path / name).write_text(text)
    program.write_text(f"#!/bin/sh\necho $2 >>{tmp_path}/asked\ncat {tmp_path}/$2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    forget()
    yield tmp_path
    forget()


def forget():
    """Forget what Slurm has said, and that it did not answer."""
    for cached in (limits._slurm_limits, limits._records):
        cached.cache_clear()
    limits.ask_again()


def test_limits_of_partitions_are_asked_once(scontrol):
    main = Limits(((5500, 7), (16000, 2)), 1470, "partition main")
    assert slurm_limits("") == slurm_limits("main") == main
    assert slurm_limits("short") == Limits(((4000, 7),), 30, "partition short")
    assert slurm_limits("endless") == Limits(((512000, 64),), None, "partition endless")
    assert slurm_limits("main,short").runtime == 1470, "a job may go to either"
    assert (scontrol / "asked").read_text().split() == ["partition", "node"]


def test_memory_of_a_node_with_enough_cores(scontrol):
    main = slurm_limits()
    assert [main.memory(cores) for cores in (1, 2, 3, 7, 8)] == [16000, 16000, 5500, 5500, 16000]
    assert main.cores == 7


@pytest.mark.parametrize("answer", ["exit 1", "echo"])
def test_what_slurm_does_not_say_is_no_limit(scontrol, answer):
    (scontrol / "scontrol").write_text(f"#!/bin/sh\n{answer}\n")
    assert slurm_limits("main") == NO_LIMITS
    assert (NO_LIMITS.memory(), NO_LIMITS.cores, NO_LIMITS.runtime) == (None, None, None)


def test_a_controller_that_is_away_is_asked_again_later(scontrol):
    program = (scontrol / "scontrol").read_text()
    (scontrol / "scontrol").write_text(f"#!/bin/sh\necho x >>{scontrol}/failed\nexit 1\n")
    assert {slurm_limits("short") for _ in range(5)} == {NO_LIMITS}
    assert (scontrol / "failed").read_text().split() == ["x"], "not by each job"
    (scontrol / "scontrol").write_text(program)
    limits.ask_again()
    assert slurm_limits("short").runtime == 30


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30", 30),
        ("30:00", 30),
        ("01:30:00", 90),
        ("2-00", 2880),
        ("2-01:05:00", 2945),
        ("UNLIMITED", None),
        ("NONE", None),
    ],
)
def test_times_of_slurm(text, minutes):
    assert minutes_of(text) == minutes
