"""A PBS server for tests: qsub, qstat, qdel and pbsnodes that answer as OpenPBS 23.06 was seen to.

The commands are this file under other names; what the server knows is in server.json beside them,
and what they were called with in calls.jsonl, but for questions about nodes and queues. Its nodes
and queues are those of the recorded answers in openpbs/: four nodes of 8 cores and 6 GB.
"""

import json
import os
import shutil
import signal
import sys
import textwrap
from pathlib import Path

RECORDED = Path(__file__).parent / "openpbs"

ENVIRONMENT = {
    "PBS_O_HOME": "/home/astro",
    "PBS_O_LANG": "C.UTF-8",
    "PBS_O_PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/pbs/bin",
    "PBS_O_WORKDIR": "/data/survey",
}


def install(folder):
    """Put the commands and an empty server into a folder."""
    folder.mkdir(parents=True)
    for name in ("nodes", "queues", "server"):
        shutil.copy(RECORDED / f"{name}.json", folder / f"{name}-answer.json")
    for name in ("qsub", "qstat", "qdel", "pbsnodes"):
        shutil.copy(__file__, folder / name)
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(f"#!{sys.executable} -S\n{text}", encoding="utf-8")
        (folder / name).chmod(0o755)
    # what runs here need not wait for a network
    (folder / "sleep").write_text("#!/bin/sh\n", encoding="utf-8")
    (folder / "sleep").chmod(0o755)
    server = Server(folder)
    server.write(jobs={}, history=True, dialect="openpbs", failures=[], away=0, next_id=1275)
    return server


class Server:
    """What the server knows, as the test sets it."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def read(self):
        return json.loads((self.folder / "server.json").read_text(encoding="utf-8"))

    def write(self, **state):
        (self.folder / "server.json").write_text(json.dumps(state), encoding="utf-8")

    def set(self, **changes):
        self.write(**{**self.read(), **changes})

    def set_job(self, job_id, **facts):
        jobs = self.read()["jobs"]
        jobs[job_id] = {**jobs.get(job_id, {}), **facts}
        self.set(jobs=jobs)

    def change_answer(self, about, change):
        """Let a function change what the server says about "nodes", "queues" or "server"."""
        path = self.folder / f"{about}-answer.json"
        answer = json.loads(path.read_text(encoding="utf-8"))
        change(answer)
        path.write_text(json.dumps(answer), encoding="utf-8")

    def script(self, number):
        """Return the copy of a script that the server has kept; 1 is the first submission."""
        return self.folder / f"script-{number}.sh"

    def calls(self, command=None):
        try:
            lines = (self.folder / "calls.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        calls = [json.loads(line) for line in lines]
        return [call for call in calls if command in (None, call[0])]


def fold(line):
    """Break a long line as PBS does: after 79 characters, continued after a tab."""
    return "\n\t".join(textwrap.wrap(line, 78, drop_whitespace=False, break_on_hyphens=False))


def block(job_id, job):
    """Return what ``qstat -f`` prints about a job."""
    environment = {**ENVIRONMENT, **job.get("environment", {})}
    lines = [
        f"Job_Name = {job.get('name', 'exposure_1001')}",
        "Job_Owner = astro@login1",
        f"job_state = {job['state']}",
        "queue = workq",
        "server = node1",
        f"Output_Path = login1:/data/survey/{job.get('output', 'o')}",
        "Rerunable = False",
        "Resource_List.select = 1:ncpus=1:mem=100mb",
        "substate = 42",
        "Variable_List = " + ",".join(f"{key}={value}" for key, value in environment.items()),
    ]
    if job.get("comment"):
        lines.append(f"comment = {job['comment']}")
    lines.append("etime = Sun Nov 22 17:53:58 2026")
    if job.get("exit_status") is not None:
        lines.append(f"Exit_status = {job['exit_status']}")
    lines.append("Submit_arguments = -N exposure_1001 -l select=1:ncpus=1:mem=100mb")
    return f"Job Id: {job_id}\n" + "\n".join(f"    {fold(line)}" for line in lines) + "\n"


def torque_block(job_id, job):
    """Return what the qstat of slurm-wlm-torque prints about a job."""
    facts = {"Job_Name": "sbatch", "Job_Owner": "astro@login1", "job_state": job["state"]}
    body = "".join(f"\t{name} = {value}\n" for name, value in facts.items())
    return f"Job Id:\t{job_id}\n{body}"


def qstat(server, state, arguments):
    """Play qstat -x -f and qstat -f."""
    if state["dialect"] == "torque":
        for option in ("E", "x"):
            if f"-{option}" in arguments:
                return 2, "", f"Unknown option: {option}\nUsage:\n    qstat [-f] ..."
        jobs = {i: state["jobs"][i] for i in arguments[1:] if i in state["jobs"]}
        text = "".join(torque_block(i, job) + "\n" for i, job in jobs.items())
        return (0 if jobs else 153), text, ""
    asked = [word for word in arguments if not word.startswith("-")] or list(state["jobs"])
    if "-E" in arguments and state["dialect"] == "old":
        return 2, "", "qstat: invalid option -- 'E'\nusage:\nqstat [-f] [-J] ..."
    if "-x" in arguments and not state["history"]:
        text = "qstat: PBS is not configured to maintain job history {}\n"
        return 0, "", "".join(map(text.format, asked))
    if "-E" in arguments:
        # jobs that it does not know, or without -x finished ones, are left out without a word
        known = [i for i in asked if i in state["jobs"]]
        known = [i for i in known if state["jobs"][i]["state"] != "F" or "-x" in arguments]
        text = "".join(block(i, state["jobs"][i]) + "\n" for i in known)
        return (0, text, "") if known else (153, "", f"qstat: Unknown Job Id {asked[0]}\n")
    code, out, err = 0, "", ""
    for job_id in asked:
        job = state["jobs"].get(job_id)
        finished = job is not None and job["state"] == "F"
        if job is None or (finished and not state["history"]):
            code, err = 153, f"{err}qstat: Unknown Job Id {job_id}\n"
        elif finished and "-x" not in arguments:
            code, err = 35, f"{err}qstat: {job_id} Job has finished, use -x or -H to obtain ...\n"
        else:
            out += block(job_id, job) + "\n"
    return code, out, err


def qsub(server, state, arguments):
    """Play qsub: the first planned failure, or a new job."""
    output = arguments[arguments.index("-o") + 1]
    number = len(server.calls("qsub"))
    shutil.copy(arguments[-1], server.folder / f"script-{number}.sh")
    if state["failures"]:
        failure = state["failures"].pop(0)
        if failure.get("gets_in"):
            state["jobs"]["999.node1"] = {"state": "Q", "output": output}
        server.write(**state)
        if failure.get("kills"):
            os.kill(os.getppid(), signal.SIGKILL)
            return 0, "999.node1\n", ""
        return failure["code"], "", failure["err"] + "\n"
    job_id = f"{state['next_id']}.node1"
    state["next_id"] += 1
    state["jobs"][job_id] = {"state": "Q", "output": output}
    server.write(**state)
    return 0, f"{job_id}\n", ""


def qdel(server, state, arguments):
    """Play qdel."""
    for job_id in arguments:
        if not state["jobs"].get(job_id, {}).get("immortal"):
            state["jobs"].pop(job_id, None)
    server.write(**state)
    return 0, "", ""


ABOUT = {"-Qf": "queues", "-Bf": "server"}
"""What qstat is asked about, by its first argument, if not about jobs."""


def play(path, arguments):
    """Answer as the command of this name."""
    server = Server(Path(path).parent)
    name = Path(path).name
    about = "nodes" if name == "pbsnodes" else ABOUT.get(arguments[0])
    if about:
        known = not server.read()["away"] and server.read()["dialect"] != "torque"
        sys.stdout.write((server.folder / f"{about}-answer.json").read_text() if known else "")
        return 0 if known else 1
    with (server.folder / "calls.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps([name, *arguments]) + "\n")
    state = server.read()
    if state["away"]:
        server.set(away=state["away"] - 1)
        print("Connection refused", file=sys.stderr)
        print(f"{name}: cannot connect to server node1 (errno=111)", file=sys.stderr)
        return 255
    command = {"qsub": qsub, "qstat": qstat, "qdel": qdel}[name]
    code, out, err = command(server, state, arguments)
    sys.stdout.write(out)
    sys.stderr.write(err)
    return code


if __name__ == "__main__":
    sys.stdout.flush()
    os.umask(0o022)
    raise SystemExit(play(sys.argv[0], sys.argv[1:]))
