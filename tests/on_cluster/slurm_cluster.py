"""A real Slurm of several nodes on one machine, for tests; started and stopped by anyone.

Everything, the keys of munge and the database of the accounting included, is in one folder and
runs as the user who starts it: nothing in /etc, no root. What it starts it remembers by process
id, and ends nothing else. By hand:

    python tests/on_cluster/slurm_cluster.py start /tmp/slurm     then: export SLURM_CONF=...
    python tests/on_cluster/slurm_cluster.py stop /tmp/slurm

Needs the Debian packages slurm-wlm, slurmdbd, munge and mariadb-server.
"""

import argparse
import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd")
PASSWORD = "slurm"  # noqa: S105 - of a database that lives as long as the test

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmctldPort={ctld_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=3,bf_interval=3,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
DefMemPerCPU=200
SlurmdTimeout={node_timeout}
KillWait=3
MinJobAge=300
MessageTimeout=20
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge/socket
AccountingStoreFlags=job_comment
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] \
CPUs={cpus} RealMemory={memory}
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=1-00:00:00 DefaultTime=01:00:00 State=UP
PartitionName=short Nodes=n[1-{nodes}] MaxTime=00:30:00 DefaultTime=00:10:00 State=UP
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=localhost
DbdPort={dbd_port}
SlurmUser={user}
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct_db
"""


def missing_programs():
    """Return the programs that are not installed."""
    return [name for name in (*PROGRAMS, "sbatch", "sacct") if which(name) is None]


def which(name):
    """Return the path of a program, also of one for administrators."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


@dataclass
class SlurmCluster:
    """A Slurm cluster in a folder.

    Attributes
    ----------
    folder : Path
        Where everything is; its name must be short, for the sake of sockets in it.
    nodes, cpus : int
        Nodes, and CPUs of each; they need not exist.
    memory : int
        Memory of a node, MB; it need not exist. Few, so that a retry can ask for too much.
    node_timeout : int
        Seconds after which a silent node is down.
    """

    folder: Path
    nodes: int = 2
    cpus: int = 4
    memory: int = 6000
    node_timeout: int = 12

    def __post_init__(self):
        self.folder = Path(self.folder).resolve()
        self.conf = self.folder / "slurm.conf"

    @property
    def env(self):
        """Environment in which Slurm's commands speak to this cluster."""
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "SLURM_CONF": str(self.conf), "PATH": path}

    @property
    def node_names(self):
        return [f"n{i}" for i in range(1, self.nodes + 1)]

    # --- start and stop -----------------------------------------------------------------------

    def start(self):
        """Start what does not run yet, and wait until all nodes are there."""
        for name in ("munge", "state", "spool", "run", "log", "sql", "tmp", "bin"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        if not self.conf.exists():
            self._write_configuration()
        self._start_munge()
        self._start_database()
        self.start_daemon("slurmdbd", "-D")
        wait_for(60, self.slurm, "sacctmgr", "-n", "show", "cluster")
        if "lab" not in self.slurm("sacctmgr", "-nP", "show", "cluster"):
            self.slurm("sacctmgr", "-i", "add", "cluster", "lab")
        self.start_controller()
        for node in self.node_names:
            self.start_node(node)
        wait_for(60, self._all_nodes_are_there)

    def stop(self):
        """End everything that was started, in reverse order."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self.slurm("scancel", "--user", getpass.getuser())
            time.sleep(1)
        # those of this folder, which may have been started with another number of nodes
        for started in sorted((self.folder / "run").glob("slurmd.*.started")):
            self.kill_node(started.name.split(".")[1])
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self.stop_daemon(name)

    def start_controller(self):
        self.start_daemon("slurmctld", "-D")
        wait_for(60, self.slurm, "scontrol", "ping")

    def stop_controller(self):
        self.stop_daemon("slurmctld")

    def start_node(self, node):
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self.start_daemon("slurmd", "-D", "-N", node, name=f"slurmd.{node}")

    def kill_node(self, node):
        """End a node at once as a power cut does: its slurmd and all that its jobs run."""
        self.stop_daemon(f"slurmd.{node}", signal.SIGKILL)
        for pid in self.processes_of(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # --- questions ----------------------------------------------------------------------------

    def slurm(self, *command):
        """Run a command of Slurm; return what it prints, raise CalledProcessError."""
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout

    def jobs(self, *states):
        """Return the jobs in the queue: id, state, comment and node of each."""
        text = self.slurm("squeue", "--noheader", "--format", "%i|%T|%k|%N")
        rows = [line.split("|") for line in text.splitlines()]
        return [row for row in rows if not states or row[1] in states]

    def accounting(self, since, timeout=60):
        """Return all jobs submitted since a time, of the accounting, when they have ended.

        Parameters
        ----------
        since : float
            Seconds since the epoch.
        timeout : float
            Seconds to wait until the accounting knows the end of each job.
        """
        begin = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since))
        names = ["JobIDRaw", "State", "Comment", "Start", "End", "NodeList", "Submit", "JobName"]
        deadline = time.monotonic() + timeout
        while True:
            text = self.slurm(
                *("sacct", "-X", "-n", "-P", "--allusers", "--duplicates"),
                *("-S", begin, "--format", ",".join(names)),
            )
            rows = [dict(zip(names, line.split("|"), strict=True)) for line in text.splitlines()]
            rows = [row for row in rows if row["Submit"] >= begin]
            ended = {row["JobIDRaw"] for row in rows if row["End"] != "Unknown"}
            # the accounting is behind the queue, which keeps ended jobs for a while
            queue = self.slurm("squeue", "--noheader", "--states=all", "--format", "%i %V")
            jobs = [line.split() for line in queue.splitlines()]
            waited_for = {row["JobIDRaw"] for row in rows}
            waited_for |= {job_id for job_id, submitted in jobs if submitted >= begin}
            if waited_for <= ended:
                return rows
            if time.monotonic() > deadline:
                raise TimeoutError(f"no end of the jobs {sorted(waited_for - ended)} after {begin}")
            time.sleep(0.5)

    def cpu_seconds(self):
        """Return the CPU time of all jobs of the accounting: comment and seconds of each."""
        text = self.slurm("sacct", "-n", "-P", "--allusers", "--format", "Comment,TotalCPU")
        rows = [row.split("|") for row in text.splitlines()]
        # rows without a comment are the steps of a job
        return [(comment, seconds_of(cpu)) for comment, cpu in rows if comment]

    def processes_of(self, node):
        """Return the ids of all processes that jobs run on a node, slurmstepd included."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if (
                f"SLURMD_NODENAME={node}".encode() in environment
                and f"SLURM_CONF={self.conf}".encode() in environment
            ):
                found.add(int(folder.name))
                found.update(_step_daemons_above(int(folder.name)))
        return found

    def pause(self, job_id, node):
        """Stop the processes of a job, as if it took very long; return their ids."""
        paused = []
        for pid in self.processes_of(node):
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if f"SLURM_JOB_ID={job_id}".encode() in environment:
                    os.kill(pid, signal.SIGSTOP)
                    paused.append(pid)
        return paused

    @staticmethod
    def go_on(pids):
        """Let paused processes go on."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _all_nodes_are_there(self):
        text = self.slurm("sinfo", "-h", "-N", "-o", "%N %T")
        there = {line.split()[0] for line in text.splitlines() if "down" not in line}
        if any("unk" in line or "*" in line for line in text.splitlines()):
            raise OSError(text)
        if len(there) != self.nodes:
            raise OSError(text)

    # --- daemons ------------------------------------------------------------------------------

    def start_daemon(self, program, *arguments, name=None):
        """Start a program in the background unless it runs."""
        name = name or program
        if self.pid_of(name):
            return
        with (self.folder / "log" / f"{name}.log").open("ab") as log:
            path = which(program)
            pid = os.posix_spawn(
                path,
                [path, *arguments],
                {**self.env, "TMPDIR": str(self.folder / "tmp")},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, log.fileno(), 1),
                    (os.POSIX_SPAWN_DUP2, log.fileno(), 2),
                ],
                setsid=True,
            )
        (self.folder / "run" / f"{name}.started").write_text(f"{pid} {_start_time(pid)}")

    def stop_daemon(self, name, number=signal.SIGTERM):
        """End a program that was started here, and wait for it."""
        pid = self.pid_of(name)
        if not pid:
            return
        os.kill(pid, number)
        for _ in range(150):
            if not self.pid_of(name):
                return
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def pid_of(self, name):
        """Return the process id of a program that was started here and runs, or None."""
        try:
            pid, started = (self.folder / "run" / f"{name}.started").read_text().split()
        except (OSError, ValueError):
            return None
        with contextlib.suppress(ChildProcessError):
            os.waitpid(int(pid), os.WNOHANG)
        return int(pid) if _start_time(pid) == started else None

    def _write_configuration(self):
        ports, first = free_ports(3), free_row(self.nodes)
        values = {
            "host": socket.gethostname().partition(".")[0],
            "user": getpass.getuser(),
            "folder": self.folder,
            "ctld_port": ports[0],
            "dbd_port": ports[1],
            "sql_port": ports[2],
            "first_port": first,
            "last_port": first + self.nodes - 1,
            "nodes": self.nodes,
            "cpus": self.cpus,
            "memory": self.memory,
            "node_timeout": self.node_timeout,
            "password": PASSWORD,
        }
        (self.folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**values))
        (self.folder / "slurmdbd.conf").chmod(0o600)
        (self.folder / "sql.port").write_text(str(ports[2]))
        self.conf.write_text(SLURM_CONF.format(**values))
        # the executor takes SLURM_CONF away from the srun in its jobs
        srun = self.folder / "bin" / "srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self.conf} exec {which("srun")} "$@"\n')
        srun.chmod(0o755)

    def _start_munge(self):
        folder = self.folder / "munge"
        folder.chmod(0o755)
        key = folder / "key"
        if not key.exists():
            key.write_bytes(os.urandom(1024))
            key.chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid"}
        files |= {"log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        self.start_daemon("munged", "--foreground", "--force", *options)
        wait_for(20, subprocess.run, ["munge", "-n", f"--socket={folder / 'socket'}"], check=True)

    def _start_database(self):
        folder, user = self.folder / "sql", getpass.getuser()
        port = (self.folder / "sql.port").read_text()
        if not (folder / "mysql").is_dir():
            subprocess.run(
                [
                    *("mariadb-install-db", "--no-defaults", f"--datadir={folder}"),
                    *(
                        f"--user={user}",
                        "--skip-test-db",
                        "--auth-root-authentication-method=normal",
                    ),
                ],
                check=True,
                capture_output=True,
            )
        sock = self.folder / "run" / "sql.sock"
        self.start_daemon(
            *("mariadbd", "--no-defaults", f"--datadir={folder}", f"--user={user}"),
            *(f"--socket={sock}", f"--port={port}", "--bind-address=127.0.0.1"),
            *(f"--pid-file={self.folder / 'run' / 'sql.pid'}", "--innodb-lock-wait-timeout=900"),
            *("--innodb-buffer-pool-size=64M", "--skip-name-resolve"),
        )
        statements = "create database if not exists slurm_acct_db;" + "".join(
            f"create user if not exists 'slurm'@'{host}' identified by '{PASSWORD}';"
            f"grant all on slurm_acct_db.* to 'slurm'@'{host}';"
            for host in ("localhost", "127.0.0.1")
        )
        client = ["mariadb", "--no-defaults", "-u", "root", "-S", str(sock), "-e", statements]
        wait_for(60, subprocess.run, client, check=True)


def seconds_of(clock):
    """Return a time of Slurm ([days-][hours:]minutes:seconds) in seconds."""
    days, _, clock = clock.rpartition("-")
    total = 0.0
    for part in clock.split(":"):
        total = 60 * total + float(part)
    return total + 86400 * int(days or 0)


def _step_daemons_above(pid):
    """Return the slurmstepd processes among the ancestors of a process."""
    found = []
    while pid > 1:
        try:
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition(") ")
        except OSError:
            break
        if "slurmstepd" in name:
            found.append(pid)
        pid = int(rest.split()[1])
    return found


def _start_time(pid):
    """Return when a process started, in ticks of the kernel; None if there is none (a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def free_ports(number):
    """Return free ports of this machine."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def free_row(number):
    """Return the first of a row of free ports."""
    for first in range(20000 + os.getpid() % 1000 * 10, 32000, number):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + number):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise OSError("no free ports")


def wait_for(seconds, question, *arguments, **options):
    """Ask until it does not fail; raise the last error when it still does."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if question is subprocess.run:
                options["capture_output"] = True
            return question(*arguments, **options)
        except (OSError, subprocess.SubprocessError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def main():
    """Start or stop a cluster by hand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    arguments = parser.parse_args()
    cluster = SlurmCluster(arguments.folder, nodes=arguments.nodes)
    if arguments.action == "stop":
        cluster.stop()
        return 0
    if missing_programs():
        print(f"not installed: {', '.join(missing_programs())}", file=sys.stderr)
        return 1
    cluster.start()
    print(f"export SLURM_CONF={cluster.conf} PATH={cluster.folder / 'bin'}:$PATH")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
