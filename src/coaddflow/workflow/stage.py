"""The context of a script: its log, its settings, and what it works on.

A script is ``with stage(snakemake) as job:`` and one call. `stage.mock` gives the same job outside
of Snakemake, so that one job of a survey can be stepped through in a debugger::

    python -m pdb -m coaddflow.workflow.stage calexp exposure=1001 ccd=3

Only the standard library is imported here: the number of threads of the numerical libraries must be
set before they are loaded.
"""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from coaddflow import fence
from coaddflow.errors import ReplacedError
from coaddflow.runtime.log import job_log
from coaddflow.tables.paths import CALIB_KINDS
from coaddflow.workflow.stages import STAGES, Stage

if TYPE_CHECKING:
    from coaddflow.instrument.camera import Camera
    from coaddflow.settings import Settings
    from coaddflow.skymap.base import SkyMap
    from coaddflow.skymap.tract import Tract

REPOSITORY = Path(__file__).parents[3]


class Job:
    """What a script works on.

    Attributes
    ----------
    input, output, params, wildcards : object
        Those of the job, as Snakemake gives them to a script.
    config : dict
        The settings file of the run.
    stage : Stage
        The entry of the stage in the registry.
    """

    def __init__(self, snakemake: Any):
        self.input, self.output = snakemake.input, snakemake.output
        self.params, self.wildcards = snakemake.params, snakemake.wildcards
        self.config: dict[str, Any] = snakemake.config
        self.stage: Stage = STAGES[snakemake.rule]
        self._snakemake = snakemake

    def sections(self, *more: str) -> list[str]:
        """Return the sections of the settings that the stage uses, and further ones."""
        return list(dict.fromkeys((*self.stage.sections, *more)))

    def settings(self, *more: str) -> "Settings":
        """Return settings in which only the sections of the stage can be read, and further ones.

        Parameters
        ----------
        *more : str
            Sections that do not change the products of the stage.
        """
        from coaddflow.settings import load_settings

        return load_settings(self.config).only(*self.sections(*more))

    @functools.cached_property
    def camera(self) -> "Camera":
        """The camera of the survey."""
        from coaddflow.instrument.camera import load_camera

        return load_camera(self.config["camera"])

    @property
    def ccd(self) -> int:
        """The CCD of the job."""
        return int(self.wildcards.ccd)

    @property
    def calibs(self) -> dict[str, str]:
        """Calibration frames among the inputs, by kind, of kinds of which there is one."""
        files = {kind: self.input.get(kind) for kind in CALIB_KINDS}
        return {kind: path for kind, path in files.items() if path and isinstance(path, str)}

    @property
    def calibs_of_frames(self) -> dict[str, dict[str, str]]:
        """Calibration frames by raw file and kind, of kinds of which there are several."""
        return self.params.made_by.get("calibs_of_frames", {})

    @property
    def exposure_times(self) -> dict[str, float]:
        """Raw frames of a calibration frame with their exposure times, s."""
        from coaddflow.tables.calibs import read_frame_table

        if table := self.input.get("frames"):
            return {row.path: row.exposure_time for row in read_frame_table(table)}
        return self.params.exposure_times

    @property
    def raw_ccds(self) -> list[dict[str, Any]]:
        """Number, raw file and calibration frames of each CCD of a raw exposure."""
        from coaddflow.tables.calibs import read_calib_table
        from coaddflow.tables.exposures import ccd_file

        calibs = read_calib_table(self.input.calibs) if self.input.calibs else {}
        raw = self.params.raw
        return [
            {"ccd": ccd, "raw": ccd_file(raw, extension), "calibs": calibs.get(ccd, {})}
            for ccd, extension in self.params.ccds.items()
        ]

    @property
    def skymap(self) -> "SkyMap":
        """The sky map of the survey."""
        from coaddflow.settings.skymap import SkymapSettings
        from coaddflow.skymap.maps import make_skymap

        return make_skymap(SkymapSettings.model_validate(self.params.skymap))

    @property
    def tract(self) -> "Tract":
        """The tract of the job."""
        return self.skymap.tract(int(self.wildcards.tract))

    @property
    def threads(self) -> int:
        """How many threads share the work of a job that does not scatter it over workers."""
        return self._snakemake.threads

    @property
    def workers(self) -> int:
        """How many workers the job may have besides the process that gathers."""
        return self._snakemake.resources.get("tasks", self._snakemake.threads + 1) - 1

    @property
    def memory_mb(self) -> float:
        """Memory of the job, MB."""
        return self._snakemake.resources.mem_mb


class stage(contextlib.AbstractContextManager):  # noqa: N801 - reads as a statement in scripts
    """Run a block as the job of a stage: with its log and its token (`fence`).

    Parameters
    ----------
    snakemake : object
        What Snakemake gives to a script, or what `stage.mock` returns.
    """

    def __init__(self, snakemake: Any):
        self._log = job_log(snakemake.log[0]) if snakemake.log else _log_on_terminal()
        self._job = Job(snakemake)
        token = self._job.stage.token(dict(snakemake.wildcards.items()))
        self._fence = fence.fence_of(token)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Job:
        try:
            fence.begin(self._fence)
        except ReplacedError as error:
            # the log is that of the newer job
            sys.exit(f"coaddflow: {error}")
        with contextlib.ExitStack() as opened:
            opened.enter_context(self._log)
            opened.enter_context(fence.fenced_by(self._fence))
            self._open = opened.pop_all()
        return self._job

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.__exit__(*error)

    @staticmethod
    def mock(
        rule: str,
        *,
        configfile: str | Path | None = None,
        snakefile: str | Path = REPOSITORY / "Snakefile",
        **wildcards: object,
    ) -> Any:
        """Return what Snakemake would give to the script of a rule, in this process.

        It has no log file: messages go to the terminal, and errors are raised as they are.

        Parameters
        ----------
        rule : str
            Name of the rule.
        configfile : path, optional
            Settings of the survey; by default ``config.yaml`` of the working folder, which must be
            that of the survey.
        snakefile : path
            The Snakefile.
        **wildcards
            The wildcards of the job, such as ``exposure="1001", ccd=3``.

        Raises
        ------
        ValueError
            If the run has no such rule, or no job of the rule with these wildcards.
        """
        workflow = load_workflow(snakefile, configfile)

        from snakemake.dag import DAG
        from snakemake.jobs import Job as SnakemakeJob

        rules = {known.name: known for known in workflow.rules if known.script}
        if rule not in rules:
            raise ValueError(f"this run has no rule {rule!r}; it has {', '.join(sorted(rules))}")
        found = rules[rule]
        if set(wildcards) != found.wildcard_names:
            wanted = ", ".join(sorted(found.wildcard_names)) or "none"
            raise ValueError(f"rule {rule!r} has the wildcards: {wanted}")
        values = {name: str(value) for name, value in wildcards.items()}
        units = list(STAGES[rule].units(workflow.globals["PLAN"]))
        if values not in units:
            raise ValueError(
                f"this run has no job {rule} {_text(values)}"
                + (f"; it has, for example, {rule} {_text(units[0])}" if units else "")
            )
        job = SnakemakeJob(found, DAG(workflow, rules=[]), values)
        return SimpleNamespace(
            rule=rule,
            input=job.input,
            output=job.output,
            params=job.params,
            wildcards=job.wildcards,
            threads=job.threads,
            resources=job.resources,
            log=[],
            config=workflow.config,
            script=(Path(snakefile).parent / "rules" / found.script).resolve(),
        )


def _text(wildcards: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in wildcards.items())


def load_workflow(snakefile: str | Path, configfile: str | Path | None = None) -> Any:
    """Return the workflow that a Snakefile describes; nothing is planned and nothing runs.

    Parameters
    ----------
    snakefile : path
        The Snakefile.
    configfile : path, optional
        Settings of the survey; by default ``config.yaml`` of the working folder.
    """
    from snakemake.api import SnakemakeApi
    from snakemake.settings.types import (
        ConfigSettings,
        DAGSettings,
        DeploymentSettings,
        ExecutionSettings,
        GroupSettings,
        OutputSettings,
        Quietness,
        ResourceSettings,
        SchedulingSettings,
        StorageSettings,
        WorkflowSettings,
    )
    from snakemake.workflow import Workflow

    api = SnakemakeApi(OutputSettings(quiet={Quietness.ALL}))
    workflow = Workflow(
        ConfigSettings(configfiles=[Path(configfile)] if configfile else []),
        ResourceSettings(cores=os.cpu_count()),
        WorkflowSettings(),
        api.logger_manager,
        storage_settings=StorageSettings(),
        dag_settings=DAGSettings(),
        execution_settings=ExecutionSettings(),
        deployment_settings=DeploymentSettings(),
        scheduling_settings=SchedulingSettings(),
        group_settings=GroupSettings(),
        output_settings=api.output_settings,
        storage_provider_settings={},
    )
    workflow.include(Path(snakefile))
    return workflow


@contextlib.contextmanager
def _log_on_terminal() -> Iterator[None]:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    yield


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one job of a survey in this process, by the script of its rule."""
    import argparse
    import runpy

    parser = argparse.ArgumentParser(
        prog="python -m coaddflow.workflow.stage",
        description="Run one job of a survey in this process; call it in the survey's folder.",
    )
    parser.add_argument("rule", help="name of the rule, such as calexp")
    parser.add_argument("wildcards", nargs="*", help="such as exposure=1001 ccd=3")
    parser.add_argument("--configfile", help="settings of the survey (default: config.yaml)")
    parser.add_argument("--snakefile", default=REPOSITORY / "Snakefile", type=Path)
    options = parser.parse_args(arguments)
    wildcards = dict(text.partition("=")[::2] for text in options.wildcards)
    given = {"configfile": options.configfile, "snakefile": options.snakefile}
    try:
        mocked = stage.mock(options.rule, **given, **wildcards)
    except ValueError as error:
        parser.error(str(error))
    runpy.run_path(str(mocked.script), {"snakemake": mocked})


if __name__ == "__main__":
    sys.exit(main())
