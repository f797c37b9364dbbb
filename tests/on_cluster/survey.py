"""A small survey that is run on a cluster, disturbed, and compared with one left in peace."""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import yaml

import coaddflow
from coaddflow.settings.parallel import ParallelSettings

ROOT = Path(__file__).parents[2]

SIMULATION = {
    "seed": 11,
    "camera": "six.yaml",
    "ra": 150.1,
    "dec": 2.2,
    "bands": {
        "r": {"exposures": 4, "exposure_time": 120.0, "zero_point": 25.6, "sky": 21.0, "color": 0.0}
    },
    "survey": {"dither": 10.0, "rotation_step": 2.0, "pointing_error": 10.0},
    "stars": {"density": 70.0, "brightest": 14.5, "faintest": 24.0, "slope": 0.2},
    "galaxies": {"density": 20.0, "brightest": 18.5, "faintest": 24.0},
    "calibration": {"bias": 3, "dark": 3, "flat": 3},
}

SETTINGS = {
    "camera": "six.yaml",
    "exposures": "exposures.ecsv",
    "refcat": {"path": "data/refcat.fits", "fallback": {"magnitude": "mag_r"}},
    "skymap": {
        "kind": "tangent",
        "pixel_scale": 0.2,
        "patch_inner_size": 700,
        "patch_border": 30,
        "tangent": {"ra": 150.1, "dec": 2.2, "width": 0.06, "height": 0.08},
    },
}


def six_ccds():
    """Return a camera of 6 CCDs: the mini camera with a row more."""
    camera = yaml.safe_load(
        (Path(coaddflow.__file__).parent / "instrument" / "cameras" / "mini.yaml").read_text(
            encoding="utf-8"
        )
    )
    camera["detectors"] += [
        {"id": 4, "name": "SSE", "extension": "CCD4", "center": [-2.475, -7.425]},
        {"id": 5, "name": "SSW", "extension": "CCD5", "center": [2.475, -7.425]},
    ]
    return {**camera, "name": "six"}


def make_survey(folder):
    """Simulate a survey in a folder and make its table and settings."""
    camera = six_ccds()
    (folder / "six.yaml").write_text(yaml.safe_dump(camera), encoding="utf-8")
    (folder / "sim.yaml").write_text(yaml.safe_dump(SIMULATION), encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    for command in (["simulate", "sim.yaml", "data"], ["ingest", "data/raw"]):
        subprocess.run([program("coaddflow"), *command], cwd=folder, check=True)


def coarse_granularity():
    """Return the settings of one job an exposure and a tract, or None where there are none."""
    choices = {
        name: get_args(field.annotation) for name, field in ParallelSettings.model_fields.items()
    }
    coarse = {"calexp": "exposure", "coadd": "tract"}
    known = all(choice in choices[name] for name, choice in coarse.items())
    return {"parallel": coarse} if known else None


def program(name):
    """Return the path of a program beside the Python of the tests."""
    return str(Path(sys.executable).parent / name)


@dataclass
class Run:
    """A Snakemake that works, or has worked, on a survey."""

    process: subprocess.Popen
    log: Path
    began: float

    def wait(self, timeout=1500):
        """Wait until it has ended; return its exit code."""
        return self.process.wait(timeout)

    def check(self, timeout=1500):
        """Wait until it has ended, and that it ended well."""
        code = self.wait(timeout)
        assert code == 0, self.text()

    def wait_for_text(self, words, times=1, timeout=180):
        """Wait until it has printed some words, as often as is said."""
        deadline = time.monotonic() + timeout
        while self.text().count(words) < times:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.3)

    def text(self):
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self):
        """Kill it as a power cut does; its jobs know nothing of it."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Survey:
    """A survey in a folder, and the cluster on which it is run.

    Attributes
    ----------
    folder : Path
        The working folder.
    cluster : SlurmCluster
        Where the jobs go.
    profile : str
        Name of the profile.
    env : dict
        Changes to the environment.
    soon : bool
        Whether Snakemake looks at the jobs every few seconds, not as the profile says.
    to_do : tuple of str
        Exposures of a copy that are still to be done.
    first : Run or None
        The run that made the products.
    runs : list of Run
        All runs.
    made, told
        What `products` and `status` said when it was done.
    """

    folder: Path
    cluster: object
    profile: str = "slurm"
    env: dict = field(default_factory=dict)
    soon: bool = True
    to_do: tuple = ("1001", "1002")
    first: Run | None = None
    runs: list = field(default_factory=list)
    made: dict | None = None
    told: tuple | None = None

    def copy_raw(self, raw):
        """Take over settings and table; the raw frames are linked."""
        self.folder.mkdir(parents=True)
        for name in ("config.yaml", "six.yaml", "exposures.ecsv"):
            shutil.copy(raw / name, self.folder)
        (self.folder / "data").symlink_to(raw / "data")

    def forget(self, exposure):
        """Remove the products and logs of an exposure, so that it is to be done."""
        for folder in ("results/calexp", "logs/calexp"):
            shutil.rmtree(self.folder / folder / exposure, ignore_errors=True)
        (self.folder / "logs" / "manifest" / f"{exposure}.log").unlink(missing_ok=True)
        (self.folder / "results" / "summary" / f"{exposure}.ecsv").unlink(missing_ok=True)

    def configure(self, **settings):
        """Change sections of the settings."""
        path = self.folder / "config.yaml"
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        path.write_text(yaml.safe_dump({**content, **settings}), encoding="utf-8")

    def start(self, *arguments, cores=3):
        """Start Snakemake as a user does."""
        snakemake = [program("snakemake")]
        if self.profile == "slurm" and self.soon:
            snakemake = [sys.executable, str(Path(__file__).with_name("snakemake_soon.py"))]
        command = [
            *(*snakemake, *arguments, "--snakefile", str(ROOT / "Snakefile")),
            *("--profile", str(ROOT / "profiles" / self.profile)),
            *("--cores", str(cores), "--quiet", "rules"),
        ]
        log = self.folder / f"run-{time.time():.3f}.txt"
        env = {**self.cluster.env, "OMP_NUM_THREADS": "1", **self.env}
        began = time.time()
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, cwd=self.folder, env=env, stdout=stream, stderr=subprocess.STDOUT
            )
        self.runs.append(Run(process, log, began))
        return self.runs[-1]

    def run(self, *arguments, **options):
        """Run Snakemake to its end."""
        run = self.start(*arguments, **options)
        run.wait()
        return run

    def check_failed(self, run, *words):
        """Check that a run failed, and that `coaddflow status` says why."""
        assert run.wait() == 1, run.text()
        code, text = self.status()
        assert code == 3, text
        for word in words:
            assert word in text

    def fail_once(self, program, words, folder):
        """Put a program before the real one that fails once with some words."""
        wrapper = folder / "bin" / program
        wrapper.parent.mkdir()
        wrapper.write_text(
            f"#!/bin/sh\nmkdir {folder}/failed 2>/dev/null && {{ echo '{words}' >&2; exit 255; }}\n"
            f'exec {shutil.which(program)} "$@"\n'
        )
        wrapper.chmod(0o755)
        self.env["PATH"] = f"{wrapper.parent}{os.pathsep}{self.cluster.env['PATH']}"

    def wait_for_end_of_jobs(self, timeout=600):
        """Wait until no job of the survey is left in the queue."""
        deadline = time.monotonic() + timeout
        while self.live_jobs() and time.monotonic() < deadline:
            time.sleep(1)

    def run_exposures(self, *arguments, **options):
        """Run what is to do of the exposures, without coadds."""
        return self.start(*self.targets, *arguments, **options)

    @property
    def targets(self):
        return [f"results/summary/{exposure}.ecsv" for exposure in self.to_do]

    def end(self):
        """End the Snakemake and the jobs of this survey that still live."""
        for run in self.runs:
            if run.process.poll() is None:
                run.kill()
        for job_id, *_ in self.live_jobs():
            with contextlib.suppress(subprocess.SubprocessError):
                self.cluster.slurm("scancel", job_id)

    def live_jobs(self):
        """Return the jobs of this survey in the queue: id, state, comment, node."""
        text = self.cluster.slurm("squeue", "--noheader", "--format", "%i|%T|%k|%N|%j|%Z")
        rows = [line.split("|") for line in text.splitlines()]
        return [row[:5] for row in rows if row[5] == str(self.folder)]

    def wait_for_job(self, state="RUNNING", timeout=180):
        """Wait until a job of the survey is in a state; return its id and node."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for job_id, job_state, _, node, _ in self.live_jobs():
                if job_state == state:
                    return job_id, node
            time.sleep(0.5)
        raise AssertionError(f"no job is {state}: {self.live_jobs()}")

    def pause_jobs(self, timeout=180):
        """Stop the jobs of all exposures that are to do in their middle; return the processes."""
        deadline = time.monotonic() + timeout
        self.wait_for_step()
        while len(jobs := self.live_jobs()) < len(self.to_do) or {row[1] for row in jobs} != {
            "RUNNING"
        }:
            assert time.monotonic() < deadline, f"not all jobs run: {jobs}"
            time.sleep(0.3)
        return [pid for job_id, _, _, node, _ in jobs for pid in self.cluster.pause(job_id, node)]

    def wait_for_step(self):
        """Wait until the first exposure that is to do is in the middle: a CCD of it is done."""
        self.wait_for_file(f"results/calexp/{self.to_do[0]}/*.json")

    def wait_for_file(self, pattern, timeout=180):
        """Wait until a file is there; return it."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = sorted(self.folder.glob(pattern))
            if found:
                return found[0]
            time.sleep(0.3)
        raise AssertionError(f"there is no {pattern}")

    def products(self, *patterns):
        """Return the checksum of each product."""
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for pattern in patterns or ("results/calexp/**/*", "results/summary/*")
            for path in sorted(self.folder.glob(pattern))
            if path.is_file()
        }

    def status(self, *arguments):
        """Return exit code and text of `coaddflow status`."""
        done = subprocess.run(
            [program("coaddflow"), "status", *arguments],
            cwd=self.folder,
            env=self.cluster.env,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr
