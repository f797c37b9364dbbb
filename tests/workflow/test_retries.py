"""A retry asks for more of what was short, for no more than there is, and its history is kept."""

import subprocess
import sys

import pytest
from survey_run import environment

from coaddflow.cluster.attempts import histories
from coaddflow.runtime.log import BEGUN, FAILED

SNAKEFILE = """
import time
from coaddflow.workflow import snakemake_patches
from coaddflow.workflow.retries import Retries

RETRIES = snakemake_patches.replace_internals(time.time() - 1, True)
ENDS = {ends}

rule all:
    input: expand("{{end}}.done", end=ENDS)

def words(wildcards):
    return ENDS[wildcards.end]

rule made:
    output: "{{end}}.done"
    log: "{{end}}.log"
    retries: 3
    resources: mem_mb=100, runtime=10
    params: words=words
    shell:
        "echo {{resources.mem_mb}} {{resources.runtime}} >>{{wildcards.end}}.asked; "
        "printf '%s' '{{params.words}}' >{{log}}; false"
"""

ENDS = {
    "memory": f"{FAILED}out of memory\n",
    "worker": f"{FAILED}CCD 3: the worker was killed by SIGKILL; it probably ran out of memory\n",
    "needed": f"{FAILED}the CCDs need 350 MB, and the job has 100 MB\n",
    "cancelled": f"{FAILED}stopped by SIGTERM (time limit, or cancelled)\n",
    "full": f"{FAILED}OSError: no space left on device\n",
    "killed": f"{BEGUN}here\n",
}
"""How jobs end that are tried four times: the last words in their logs."""


def run(folder, *arguments, snakefile=SNAKEFILE, ends=ENDS):
    """Run the workflow in a folder on this machine; return what it prints."""
    (folder / "Snakefile").write_text(snakefile.format(ends=ends))
    command = [sys.executable, "-m", "snakemake", "--cores", "6", "--quiet", "all", "-k"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    return done.stderr


def asked(folder, end):
    """Return memory and time that each attempt asked for."""
    return [
        tuple(map(int, line.split())) for line in (folder / f"{end}.asked").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A folder in which each job has been tried as often as it may, with 350 MB at most."""
    folder = tmp_path_factory.mktemp("ended")
    text = run(folder, "--resources", "mem_mb=1500")
    return folder, text


@pytest.mark.parametrize(
    ("end", "memory"),
    [
        ("memory", [100, 200, 300, 400]),
        ("worker", [100, 200, 300, 400]),
        ("needed", [100, 350]),
        ("cancelled", [100] * 4),
        ("full", [100] * 4),
    ],
)
def test_only_memory_that_was_short_grows(ended, end, memory):
    folder, _ = ended
    assert asked(folder, end) == [(amount, 10) for amount in memory]


def test_a_process_killed_while_the_kernel_had_memory_asks_for_the_same(ended):
    folder, _ = ended
    (first, *_, last) = histories(folder)["made_killed"]
    if first.words == "killed by the kernel":
        pytest.skip("this kernel does not count what it kills, or has killed something just now")
    assert (first.outcome, last.outcome) == ("killed", "killed")
    assert asked(folder, "killed") == [(100, 10)] * 4


def test_another_run_begins_where_the_last_ended(ended):
    folder, _ = ended
    run(folder, "memory.done", "--resources", "mem_mb=450", "--retries", "0")
    assert asked(folder, "memory")[4:] == [(450, 10)], "five times as much, but not more than that"


def test_a_request_by_hand_begins_anew_and_grows_as_well(tmp_path):
    by_hand = ("--set-resources", "made:mem_mb=70")
    run(tmp_path, "memory.done", *by_hand, "--resources", "mem_mb=180")
    # 280 would be more than there is; once that has failed there is nothing more to give
    assert [memory for memory, _ in asked(tmp_path, "memory")] == [70, 140, 180]
    run(tmp_path, "memory.done", "--set-resources", "made:mem_mb=60*attempt**2")
    assert [memory for memory, _ in asked(tmp_path, "memory")][3:] == [60, 240, 540, 960]


SIDE_BY_SIDE = """
import time
from coaddflow.workflow import snakemake_patches

snakemake_patches.replace_internals(time.time() - 1, True)

rule all:
    input: "0.txt", "1.txt"

rule made:
    output: "{{n}}.txt"
    log: "{{n}}.log"
    retries: 1
    resources: mem_mb=100
    shell:
        "if mkdir {{wildcards.n}}.begun; then echo '{failed}out of memory' >{{log}}; false; "
        "else date +%s.%N >{{output}}; sleep 0.8; date +%s.%N >>{{output}}; fi"
"""


def check_one_after_the_other(folder):
    """Check that the two jobs of a workflow, which leave their times, did not run together."""
    spans = sorted(
        list(map(float, (folder / f"{number}.txt").read_text().split())) for number in range(2)
    )
    assert spans[0][1] <= spans[1][0]


def test_jobs_that_ask_for_more_run_beside_others_only_if_there_is_room(tmp_path):
    snakefile = SIDE_BY_SIDE.replace("{failed}", FAILED)
    # twice 100 MB fit, twice 200 do not
    run(tmp_path, "--resources", "mem_mb=300", snakefile=snakefile)
    check_one_after_the_other(tmp_path)


TIMES = """
import time
from coaddflow.workflow import snakemake_patches

snakemake_patches.replace_internals(time.time() - 1, True)

onstart:
    if config.get("patched"):
        snakemake_patches.keep_to_cores_of_this_machine(workflow)

rule all:
    input: "0.txt", "1.txt"

rule made:
    output: "{n}.txt"
    threads: 2
    shell: "date +%s.%N >{output}; sleep 0.8; date +%s.%N >>{output}"
"""


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
def test_jobs_beside_a_profile_with_cores_start_more_than_there_are_cores_unless_limited(
    tmp_path, patched
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("cores: 2\n")
    arguments = ["--profile", "mine", "-j", "2"] + (["--config", "patched=1"] if patched else [])
    (tmp_path / "Snakefile").write_text(TIMES)
    command = [sys.executable, "-m", "snakemake", "--quiet", "all", *arguments]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=environment())
    (_, end), (start, _) = sorted(
        list(map(float, (tmp_path / f"{n}.txt").read_text().split())) for n in range(2)
    )
    assert (end <= start) is patched
