"""What the programs of profiles/pbs cost: processor time of a submission and of a look at a job.

    python benchmarks/pbs_programs.py [JOBS]

The server is the one of the tests, whose commands are small Python programs: their time is in that
of a submission (one qsub) and not in that of a look (the answer of one qstat serves all).
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

import fake_pbs  # noqa: E402 - of the tests

SCRIPT = """\
#!/bin/sh
# properties = {properties}
cd /data && python -m snakemake --target-jobs {targets} --cores 8 && exit 0 || exit 1
"""


def job_script(number, ccds=104):
    """Write the job script of an exposure."""
    properties = {
        "type": "group",
        "groupid": f"exposure_{number}",
        "threads": 8,
        "resources": {"mem_mb": 6000, "runtime": 60},
    }
    targets = " ".join(f"'calexp:exposure={number},ccd={ccd}'" for ccd in range(ccds))
    path = Path(f"job-{number}.sh")
    path.write_text(SCRIPT.format(properties=json.dumps(properties), targets=targets))
    return path


def measure(what, commands):
    """Run commands one after the other; print processor and wall time of one, return the output."""
    before, walls, printed = resource.getrusage(resource.RUSAGE_CHILDREN), [], []
    for command in commands:
        started = time.perf_counter()
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
        )
        walls.append(time.perf_counter() - started)
        printed.append(done.stdout.strip())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / len(commands)
    print(f"{what:<28} {cpu:6.3f} CPU-s  {median(walls):6.3f} s wall (median of {len(walls)})")
    return printed


def main():
    """Measure in a folder that goes afterwards."""
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    programs = ROOT / "profiles" / "pbs"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        server = fake_pbs.install(Path(folder) / "bin")
        os.environ["PATH"] = f"{server.folder}{os.pathsep}{os.environ['PATH']}"
        python = [sys.executable]
        measure("python -c 0", [[*python, "-c", "0"]] * jobs)
        measure("the server's own part", [[str(server.folder / "qdel"), "1"]] * 20)
        scripts = [str(job_script(number)) for number in range(jobs)]
        submit, status = str(programs / "submit.py"), str(programs / "status.py")
        ids = measure("submission", [[*python, submit, script] for script in scripts])
        measure("look, server is asked", [[*python, status, job_id] for job_id in ids[:1]])
        measure("look", [[*python, status, job_id] for job_id in ids[1:]])
        measure("taking a job up", [[*python, submit, script] for script in scripts[:20]])
        os.chdir("/")


if __name__ == "__main__":
    main()
