"""A group of thousands of steps reaches a cluster: no argument of a command is too long."""

import json
import os
import re
import subprocess
import sys

from survey_run import REPOSITORY, environment

MAX_ARG_STRLEN = 131072
"""Bytes of one argument of a program on Linux, with the zero at its end."""

EXPOSURES = 3600

SNAKEFILE = """
from coaddflow.cluster import slurm
from coaddflow.workflow import snakemake_patches

snakemake_patches.check_groups_once()

onstart:
    slurm.prepare_cluster(workflow)

rule tract:
    input: expand("warp/0/c4d_210101_{n}_ooi.ecsv", n=range(%d))
    output: "list.txt"
    group: "tract_0"
    shell: "touch {output}"

rule warp:
    output: "warp/{tract}/{exposure}.ecsv"
    group: "tract_0"
    shell: "touch {output}"
"""

PROGRAMS = {
    "scontrol": "#!/bin/sh\necho 'MinJobAge = 300 sec'\n",
    "squeue": "#!/bin/sh\n",
    "sbatch": f"""#!{sys.executable}
import json, sys
script = sys.stdin.read() if "/dev/stdin" in sys.argv else ""
json.dump([sys.argv, script], open("submitted.json", "w"))
sys.exit("this is a test")
""",
}


def test_a_tract_of_thousands_of_exposures_is_submitted(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "profiles").symlink_to(REPOSITORY / "profiles")
    (tmp_path / "Snakefile").write_text(SNAKEFILE % EXPOSURES)
    command = [sys.executable, "-m", "snakemake", "--executor", "slurm", "--slurm-no-account"]
    command += ["--jobs", "1", "--cores", "1", "--scheduler", "greedy", "--quiet", "all"]
    command += ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks=1"]
    command += ["--default-resources", "slurm_partition=main", "mem_mb=100", "runtime=10"]
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*command, "--seconds-between-status-checks", "1"],
        cwd=tmp_path,
        env=environment() | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "this is a test" in done.stderr, done.stderr
    arguments, script = json.loads((tmp_path / "submitted.json").read_text())
    assert max(len(argument.encode()) for argument in arguments) < MAX_ARG_STRLEN
    (line,) = [line for line in script.splitlines() if "--target-jobs" in line]
    assert len(set(re.findall(r"exposure=c4d_210101_(\d+)_ooi", line))) == EXPOSURES
    assert len(line) > MAX_ARG_STRLEN, "as one argument it would be too long"
    assert "--slurm-jobstep-pass-command-as-script" in line, "nor is it one in the job"
