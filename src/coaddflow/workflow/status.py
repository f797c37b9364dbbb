"""How far a survey is: every CCD of every exposure is done, failed, or missing, and every coadd.

The answer comes from the plan (what there should be), the manifests, the rows of single CCDs
where the manifest is not written yet, the result lines of job logs, and what the cluster says about
its jobs. All are read as the small texts that they are; no image is opened.
"""

import json
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from coaddflow.cluster.attempts import Attempt, histories
from coaddflow.cluster.history import ClusterJob, latest_jobs
from coaddflow.errors import InputError
from coaddflow.runtime.log import NO_LOG, NO_RESULT, FailedJob, cluster_job_of, failed_jobs
from coaddflow.tables import paths
from coaddflow.tables.manifest import ccd_states
from coaddflow.tables.pointings import has_new
from coaddflow.tables.verdict import read_verdict
from coaddflow.tables.warps import read_warp_table
from coaddflow.workflow.left_out import left_out_lines
from coaddflow.workflow.plan import Plan
from coaddflow.workflow.stages import (
    CALIB_STAGES,
    STAGES,
    Stage,
    files_by_job,
    files_by_label,
    job_names,
    promises_by_label,
)
from coaddflow.workflow.wholeness import expected_hash, is_whole_fits, made_with

State = Literal["done", "failed", "missing"]
STATES: tuple[State, ...] = get_args(State)

ALL_DONE, SOMETHING_FAILED, SOMETHING_MISSING, TOO_MANY_LEFT_OUT = 0, 1, 3, 4
"""Exit codes of `coaddflow status` (2 is for wrong usage and unusable input)."""


@dataclass(frozen=True)
class CcdStatus:
    """What became of one CCD."""

    exposure: str
    ccd: int
    state: State
    """``failed``: the CCD has a row that says why it has no calexp. ``missing``: there is no result
    yet, or it is gone."""
    reason: str = ""
    """Short code of a failure; for missing CCDs what is known, if anything."""
    message: str = ""
    """The same in one sentence."""
    log: str = ""
    """Log of the CCD's job, if there is one and the CCD is not done."""
    lost_fraction: float = 0.0
    """Fraction of its pixels that are BAD, SAT or NO_DATA; of CCDs that are done."""
    flags: str = ""
    """What a CCD that is used lacks (`tables.manifest.Flag`), separated by commas."""
    remedy: tuple[str, ...] = ()
    """Files to remove before a run makes the CCD again; empty: nothing."""


@dataclass(frozen=True)
class ExposureStatus:
    """What became of the CCDs of one exposure."""

    exposure: str
    band: str
    ccds: tuple[CcdStatus, ...]
    """Its CCDs, in order."""
    manifest: bool
    """Whether its manifest is written: whether later stages can use it."""
    note: str = ""
    """Why the manifest is not written, where a log tells."""
    job: ClusterJob | None = None
    """The last job of the cluster that was to make it, if that did not end well."""
    left_out: str = ""
    """Why it is left out of all coadds as a whole; empty: it is not."""
    sets: str = ""
    """The sets of calibration frames that it takes; empty: there is one for all nights."""

    def count(self, state: State) -> int:
        """Return the number of CCDs in a state."""
        return sum(ccd.state == state for ccd in self.ccds)

    @property
    def is_done(self) -> bool:
        """Whether all CCDs are done and the manifest is written."""
        return self.manifest and self.count("done") == len(self.ccds)


@dataclass(frozen=True)
class ProductStatus:
    """How many products of tracts and survey are there."""

    kind: str
    """What they are called: their label in the registry."""
    planned: int
    """How many there should be."""
    missing: tuple[str, ...] = ()
    """Those that are not there, below the folder of the products."""
    promise: str = ""
    """What must be removed before a run makes them again; empty: nothing."""
    damaged: tuple[str, ...] = ()
    """Those that are there but cut off, below the folder of the products."""
    remove: tuple[str, ...] = ()
    """Files to remove before a run makes again what is missing or damaged; those that are there."""
    needs_run: bool = False
    """Whether a run makes some of them without anything being removed."""


@dataclass(frozen=True)
class SurveyStatus:
    """What became of all exposures of a run."""

    exposures: tuple[ExposureStatus, ...] = field(default_factory=tuple)
    """The exposures, in the order of the plan."""
    products: tuple[ProductStatus, ...] = field(default_factory=tuple)
    """What is made from them."""
    jobs: tuple[ClusterJob, ...] = field(default_factory=tuple)
    """Jobs of the cluster for other things (calibration frames, tracts) whose products are not all
    there."""
    not_coadded: tuple[str, ...] = ()
    """What the selection left out of the coadds of each band and tract, and which have no data."""
    max_left_out_fraction: float = 1.0
    """Setting `calexp.max_left_out_fraction`."""
    attempts: dict[str, list[Attempt]] = field(default_factory=dict)
    """Attempts that failed and submissions that were refused, by job."""
    finished: frozenset[str] = frozenset()
    """Jobs of the cluster whose products are all there."""
    failed_steps: tuple[FailedJob, ...] = field(default_factory=tuple)
    """Steps for other things than exposures that failed, whose products are not there."""
    lost_warps: tuple[str, ...] = field(default_factory=tuple)
    """Tables of warps that name files that are gone: coadds that are made again need them."""
    other_settings: tuple[str, ...] = field(default_factory=tuple)
    """Exposures and coadds that were made with other settings than those of today."""

    def count(self, state: State) -> int:
        """Return the number of CCDs in a state."""
        return sum(exposure.count(state) for exposure in self.exposures)

    @property
    def left_out(self) -> list[ExposureStatus]:
        """The exposures that are left out of all coadds."""
        return [exposure for exposure in self.exposures if exposure.left_out]

    @property
    def exit_code(self) -> int:
        """0: all done; 1: all ran, but CCDs failed, or products were lost; 3: a run makes more.

        4: nothing is missing, but more exposures are left out than the settings allow.

        What a run makes again only after something has been removed by hand does not count as
        missing: a script that waits for the end of a run would wait for ever.
        """
        ccds = [ccd for exposure in self.exposures for ccd in exposure.ccds]
        lost = [ccd for ccd in ccds if ccd.remedy]
        if any(ccd.state == "missing" and not ccd.remedy for ccd in ccds):
            return SOMETHING_MISSING
        if self.other_settings or any(kind.needs_run for kind in self.products):
            return SOMETHING_MISSING
        unfinished = [e for e in self.exposures if not e.manifest]
        if any(not any(ccd.remedy for ccd in exposure.ccds) for exposure in unfinished):
            return SOMETHING_MISSING
        if len(self.left_out) > self.max_left_out_fraction * len(self.exposures):
            return TOO_MANY_LEFT_OUT
        removed = any(kind.missing or kind.damaged for kind in self.products)
        return SOMETHING_FAILED if lost or removed or self.count("failed") else ALL_DONE


def survey_status(
    plan: Plan, results: str | Path = "results", logs: str | Path = "logs", folder: str | Path = "."
) -> SurveyStatus:
    """Find out what became of every CCD of a run.

    Parameters
    ----------
    plan : Plan
        What there should be.
    results, logs : path
        Folders of the products and of the job logs.
    folder : path
        The working folder, where Snakemake keeps what it knows of jobs of a cluster.

    Returns
    -------
    SurveyStatus
        Exposures in the order of the plan.
    """
    results, logs = Path(results), Path(logs)
    # the step that refuses an exposure, or the one that does all of it
    steps = (*failed_jobs(logs / "exposure"), *failed_jobs(logs / "manifest"))
    notes = {job.job: job.reason for job in steps if job.reason != NO_LOG}
    folders = _Folders(results)
    products = _product_status(plan, folders)
    files = files_by_job(plan)
    unfinished = {job for job in files if folders.missing(files[job])}
    jobs = latest_jobs(folder, job_names(), wanted=unfinished.__contains__)
    exposures = tuple(
        _exposure_status(
            plan,
            exposure,
            results,
            logs,
            notes.get(exposure, ""),
            jobs.get(f"exposure_{exposure}"),
            _is_locked(folder),
        )
        for exposure in plan.exposures
    )
    others = [
        job
        for job in jobs.values()
        if not job.unit.startswith("exposure_") and job.outcome != "done" and job.unit in unfinished
    ]
    return SurveyStatus(
        exposures,
        products,
        tuple(others),
        tuple(left_out_lines(plan, results)),
        plan.settings.calexp.max_left_out_fraction,
        histories(folder),
        frozenset(files) - unfinished,
        () if _is_locked(folder) else _failed_steps(plan, logs, folders),
        _lost_warps(plan, results),
        _of_other_settings(plan, results),
    )


def _is_locked(folder: str | Path) -> bool:
    """Return whether a Snakemake works in a folder, or was killed there."""
    return any((Path(folder) / ".snakemake/locks").glob("*.lock"))


def _product_status(plan: Plan, folders: "_Folders") -> tuple[ProductStatus, ...]:
    """Return which products of tracts and survey are missing or cut off, and what to remove."""
    promises, found = promises_by_label(plan), []
    for label, files in files_by_label(plan).items():
        missing, damaged = folders.missing(files), folders.damaged(files)
        promise = promises.get(label, "")
        # a run makes again what its job promises, if that is not there
        lost = [f"{paths.RESULTS}/{name}" for name in (*missing, *damaged)]
        removed = [_promise_of(promise, name) or name for name in lost]
        there = tuple(dict.fromkeys(name for name in removed if not folders.missing([name])))
        needs_run = any(folders.missing([name]) for name in removed)
        status = ProductStatus(label, len(files), missing, promise, damaged, there, needs_run)
        found.append(status)
    return tuple(found)


def _promise_of(promise: str, name: str) -> str:
    """Return what the job that makes a product promises Snakemake; empty: the product itself.

    ``name`` is a product, ``promise`` the template of the promise.
    """
    if not promise:
        return ""
    made_by = {p.path: s for s in STAGES.values() for p in s.products[1:]}
    for template, stage in made_by.items():
        match = re.fullmatch(_pattern(template), name)
        if match and stage.products[0].path == promise:
            return promise.format(**match.groupdict())
    return ""


def _pattern(template: str) -> str:
    """Return the regular expression of a template of paths."""
    return re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(template))


def _failed_steps(plan: Plan, logs: Path, folders: "_Folders") -> tuple[FailedJob, ...]:
    """Return the steps of tracts, calibration frames and survey that failed for good.

    A log that is older than the product that its step has made since says nothing.
    """
    stages = [s for s in STAGES.values() if s.is_planned(plan) and s.name not in _OF_EXPOSURES]
    found = []
    for job in failed_jobs(logs, skipped=_OF_EXPOSURES):
        if job.reason == NO_LOG:
            continue
        for stage in stages:
            match = re.fullmatch(_log_pattern(stage, plan), job.job)
            if match and folders.missing([stage.products[0].file(match.groupdict())]):
                found.append(job)
    return tuple(found)


_OF_EXPOSURES = ("calexp", "calibrated", "manifest", "exposure", "calibrated_exposure")
"""Stages whose failures are told with their exposures."""


def _log_pattern(stage: Stage, plan: Plan) -> str:
    """Return the regular expression of the logs of a stage, below the folder of logs."""
    wildcards = re.findall(r"\{(\w+)\}", stage.products[0].template(plan))
    is_calib = stage.name in CALIB_STAGES
    name = f"calibs/{stage.name.removeprefix('master_')}" if is_calib else stage.name
    return "/".join([re.escape(name), *(f"(?P<{one}>[^/]+)" for one in wildcards)])


def _lost_warps(plan: Plan, results: Path) -> tuple[str, ...]:
    """Return the tables of warps of which a file is gone or cut off."""
    stage, found = STAGES["warp"], []
    for name in stage.files(plan):
        table = results / Path(name).relative_to(paths.RESULTS)
        try:
            warps = [table.parent / row.path for row in read_warp_table(table).warps]
        except InputError:
            warps = [table] if table.is_file() else []
        if not all(warp.is_file() and is_whole_fits(warp) for warp in warps):
            found.append(str(table))
    return tuple(found)


def _of_other_settings(plan: Plan, results: Path) -> tuple[str, ...]:
    """Return the exposures and coadds whose headers name other settings than those of today.

    Of an exposure one calexp is looked at. A run makes them again.
    """
    stages = {stage.name: stage for stage in STAGES.values() if stage.is_planned(plan)}
    found = []
    for exposure in plan.exposures:
        kind = "calibrated" if exposure in plan.images else "calexp"
        stage = stages.get(kind) or stages[{"calexp": "exposure"}.get(kind, "calibrated_exposure")]
        folder = results / "calexp" / exposure
        names = (made_with(folder / f"{ccd}.fits") for ccd in plan.ccds_of(exposure))
        found_hash = next((name for name in names if name), None)
        if found_hash not in (None, expected_hash(plan.settings, stage.sections)):
            found.append(f"exposure {exposure}")
    stage = stages.get("coadd") or stages["tract"]
    wanted = expected_hash(plan.settings, stage.sections)
    for units in STAGES["coadd"].products[0].units(plan):
        name = Path(paths.COADD.format(**units)).relative_to(paths.RESULTS)
        if made_with(results / name) not in (None, wanted):
            found.append(str(name))
    return tuple(found)


class _Folders:
    """What is in the folders of the products, each listed once."""

    def __init__(self, results: Path):
        self._results = results
        self._listed: dict[Path, set[str]] = {}

    def missing(self, files: Sequence[str]) -> tuple[str, ...]:
        """Return those of some products that are not there, below the folder of the products."""
        names = (Path(path).relative_to(paths.RESULTS) for path in files)
        return tuple(str(name) for name in names if not self._has(self._results / name))

    def damaged(self, files: Sequence[str]) -> tuple[str, ...]:
        """Return those FITS files that are there, but shorter than their headers say."""
        names = (Path(path).relative_to(paths.RESULTS) for path in files if path.endswith(".fits"))
        there = (name for name in names if self._has(self._results / name))
        return tuple(str(name) for name in there if not is_whole_fits(self._results / name))

    def _has(self, path: Path) -> bool:
        if path.parent not in self._listed:
            self._listed[path.parent] = {found.name for found in path.parent.glob("*")}
        return path.name in self._listed[path.parent]


def _exposure_status(
    plan: Plan,
    exposure: str,
    results: Path,
    logs: Path,
    note: str,
    job: ClusterJob | None,
    locked: bool,
) -> ExposureStatus:
    folder = results / "calexp" / exposure
    manifest = results / "summary" / f"{exposure}.ecsv"
    rows = ccd_states(manifest)
    written = rows is not None
    damaged_manifest = rows == {}
    if rows is None:
        rows = _rows_without_manifest(results, exposure, refused=bool(note))
    kind = "calibrated" if exposure in plan.images else "calexp"
    log_folder = logs / kind / exposure
    is_there = {path.name for path in folder.glob("*.fits")}
    planned = plan.ccds_of(exposure)
    complete = all(ccd in rows for ccd in planned)
    ended = {} if complete else {job.job: job for job in failed_jobs(log_folder)}
    ccds = []
    for ccd in planned:
        row = rows.get(ccd, ("missing", "damaged_manifest" if damaged_manifest else "", ""))
        state, reason, message, remedy = _state_of_ccd(row[:3], folder, manifest, ccd, is_there)
        log = log_folder / f"{ccd}.log"
        step = ended.get(str(ccd))
        # Snakemake leaves empty logs of all steps of a job that failed: that of the job tells more
        if state == "missing" and step and not remedy and (step.reason != NO_LOG or job is None):
            is_live = job.outcome == "live" if job is not None else locked
            runs = step.reason == NO_RESULT and is_live
            reason = "running" if runs else "job_failed"
            message = "its job runs" if runs else _why_ended(step, job)
        shown = str(log) if state != "done" and log.is_file() and not remedy else ""
        of_ccd = row[3:] if state == "done" else ()  # what was lost, and flags
        status = CcdStatus(exposure, ccd, state, reason, message, shown, *of_ccd)
        ccds.append(replace(status, remedy=remedy))
    if written or (job is not None and job.outcome == "done"):
        job = None
    note = "" if written else note
    left_out = _left_out(results / "summary" / f"{exposure}.ecsv") if written else ""
    band, sets = plan.band_of(exposure), plan.shown_sets(exposure)
    return ExposureStatus(exposure, band, tuple(ccds), written, note, job, left_out, sets)


def _left_out(manifest: Path) -> str:
    """Return why an exposure is left out, and what mends it."""
    verdict = read_verdict(manifest)
    if verdict.cause and has_new(manifest.stem, manifest.parent.with_name("pointings")):
        return f"{verdict.message}; the next run uses the fitted pointing"
    return verdict.message if verdict.cause else ""


def _state_of_ccd(
    row: tuple[State, str, str], folder: Path, manifest: Path, ccd: int, is_there: Container[str]
) -> tuple[State, str, str, tuple[str, ...]]:
    """Return state, reason and message of a CCD by its row and its calexp, and what to remove."""
    state, reason, message = row
    calexp, remedy = folder / f"{ccd}.fits", ()
    if reason == "damaged_manifest":
        message, remedy = f"{manifest} is cut off or damaged", (str(manifest),)
    elif reason == "damaged_row":
        remedy = (str(folder / f"{ccd}.json"),)
    elif state == "done" and calexp.name not in is_there:
        reason, message = "calexp_gone", f"{calexp} is not there any more"
        remedy = _to_remake(folder, manifest, ccd)
    elif state == "done" and not is_whole_fits(calexp):
        reason, message = "calexp_truncated", f"{calexp} is cut off"
        remedy = _to_remake(folder, manifest, ccd)
    if remedy:
        state = "missing"
        message += f": remove {' and '.join(remedy)} and run the workflow again"
    return state, reason, message, remedy


def _to_remake(folder: Path, manifest: Path, ccd: int) -> tuple[str, ...]:
    """Return what must be removed before a run makes a CCD again: its row, if it has one."""
    row = folder / f"{ccd}.json"
    return tuple(str(path) for path in (row, manifest) if path.is_file())


def _why_ended(ended: FailedJob, job: ClusterJob | None) -> str:
    """Return why a step of an exposure ended, from its log, or else from what the cluster says."""
    if ended.reason != NO_RESULT or job is None:
        return ended.reason
    number = cluster_job_of(ended.log)
    if number.partition(".")[0] == job.job_id.partition(".")[0]:
        return job.explanation
    return f"the log has no result line; it was {job.system} job {number}; {job.explanation}"


def _rows_without_manifest(
    results: Path, exposure: str, refused: bool
) -> dict[int, tuple[State, str, str]]:
    """Return the rows of an exposure that has no manifest.

    On a cluster an exposure that was refused takes its products with it, and only the table that
    says why is left.
    """
    rows = _single_rows(results / "calexp" / exposure)
    kept = ccd_states(results / "summary" / f"{exposure}.failed.ecsv") if refused else None
    gone = "it was calibrated, and taken away when its exposure was refused"
    for ccd, (state, reason, message, *_) in (kept or {}).items():
        told = (state, reason, message) if state == "failed" else ("missing", "refused", gone)
        rows.setdefault(ccd, told)
    return rows


def _single_rows(folder: Path) -> dict[int, tuple[State, str, str]]:
    """Return the same from the rows of single CCDs."""
    rows: dict[int, tuple[State, str, str]] = {}
    for path in folder.glob("*.json"):
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            rows[int(row["ccd"])] = (row["state"], row["reason"], row["message"])
        except (OSError, ValueError, KeyError, TypeError):
            if path.stem.isdigit() and path.is_file():
                rows[int(path.stem)] = ("missing", "damaged_row", f"{path} is cut off or damaged")
    return rows
