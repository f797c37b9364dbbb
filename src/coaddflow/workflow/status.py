"""How far a survey is: every CCD of every exposure is done, failed, or missing, and every coadd.

The answer comes from the plan (what there should be), the manifests, the rows of single CCDs
where the manifest is not written yet, the result lines of job logs, and what the cluster says about
its jobs. All are read as the small texts that they are; no image is opened.
"""

import json
import re
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from coaddflow.cluster.attempts import Attempt, histories, told
from coaddflow.cluster.history import ClusterJob, latest_jobs
from coaddflow.errors import InputError
from coaddflow.runtime.log import NO_LOG, NO_RESULT, FailedJob, cluster_job_of, failed_jobs
from coaddflow.tables import paths
from coaddflow.tables.manifest import NOTABLE_LOSS, ccd_states
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
from coaddflow.workflow.wholeness import expected_hash, has_fits_size, is_whole_fits, made_with

State = Literal["done", "failed", "missing"]
_STATES: tuple[State, ...] = get_args(State)

ALL_DONE, SOMETHING_FAILED, SOMETHING_MISSING, TOO_MANY_LEFT_OUT = 0, 1, 3, 4
"""Exit codes of `coaddflow status` (2 is for wrong usage and unusable input)."""

_LISTED, _FLAGGED = 20, 5


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
        if any(kind.needs_run for kind in self.products):
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
    for job in failed_jobs(logs) if logs.is_dir() else ():
        if job.reason == NO_LOG or job.job.partition("/")[0] in _OF_EXPOSURES:
            continue
        for stage in stages:
            match = re.fullmatch(_log_pattern(stage), job.job)
            if match and folders.missing([stage.products[0].path.format(**match.groupdict())]):
                found.append(job)
    return tuple(found)


_OF_EXPOSURES = ("calexp", "calibrated", "manifest", "exposure", "calibrated_exposure")
"""Stages whose failures are told with their exposures."""


def _log_pattern(stage: Stage) -> str:
    """Return the regular expression of the logs of a stage, below the folder of logs."""
    wildcards = re.findall(r"\{(\w+)\}", stage.products[0].path)
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
        if not all(warp.is_file() and has_fits_size(warp) for warp in warps):
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
    damaged_manifest = rows is not None and not set(plan.ccds_of(exposure)) <= set(rows)
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
    band = plan.band_of(exposure)
    return ExposureStatus(exposure, band, tuple(ccds), written, note, job, left_out)


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
    elif state == "done" and not has_fits_size(calexp):
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


def status_table(status: SurveyStatus, every_exposure: bool = False) -> str:
    """Return the status as text for people.

    Parameters
    ----------
    status : SurveyStatus
        What to tell.
    every_exposure : bool
        List all exposures and all failures; else those that are not done, and only the first.
    """
    limit = None if every_exposure else _LISTED
    shown = [e for e in status.exposures if every_exposure or not e.is_done]
    lines = [
        *_exposure_lines(shown, limit),
        *_failure_lines(status, limit),
        *_loss_lines(status, limit),
        *_product_lines(status.products, limit),
        *_step_lines(status.failed_steps, limit),
        *_job_lines(status.jobs, limit),
        *status.not_coadded[:limit],
        *_rest(len(status.not_coadded), limit, "bands of tracts with CCDs that are left out"),
        *_attempt_lines(status, every_exposure),
        *_warp_lines(status.lost_warps, limit),
        *_settings_lines(status.other_settings, limit),
    ]
    n_done = sum(exposure.is_done for exposure in status.exposures)
    lines.append(
        f"{len(status.exposures)} exposures, {n_done} done; "
        f"{sum(len(e.ccds) for e in status.exposures)} CCDs: {status.count('done')} done, "
        f"{status.count('failed')} failed, {status.count('missing')} missing"
    )
    lines += [*_left_out_lines(status), *_flag_lines(status)]
    counts = [
        f"{kind.planned - len(kind.missing)} of {kind.planned} {kind.kind}"
        for kind in status.products
        if kind.planned
    ]
    lines += [", ".join(counts)] if counts else []
    return "\n".join(lines)


def _exposure_lines(exposures: Sequence[ExposureStatus], limit: int | None) -> list[str]:
    if not exposures:
        return []
    width = max(8, *(len(exposure.exposure) for exposure in exposures[:limit]))
    lines = [f"{'exposure':<{width}} {'band':<6} {'done':>5} {'failed':>6} {'missing':>7}"]
    for exposure in exposures[:limit]:
        counts = [exposure.count(state) for state in _STATES]
        refused = "  no manifest" if exposure.note and not exposure.manifest else ""
        refused = "  left out" if exposure.left_out else refused
        lines.append(
            f"{exposure.exposure:<{width}} {exposure.band:<6} {counts[0]:>5} {counts[1]:>6} "
            f"{counts[2]:>7}{refused}"
        )
        lines += [f"  {exposure.left_out or exposure.note}"] if refused else []
        lines += [f"  {exposure.job.explanation}"] if exposure.job else []
    return [*lines, *_rest(len(exposures), limit, "exposures"), ""]


def _left_out_lines(status: SurveyStatus) -> list[str]:
    """Return how many exposures are left out, and whether that is too many."""
    n, limit = len(status.left_out), status.max_left_out_fraction
    if not n:
        return []
    too_many = n > limit * len(status.exposures)
    more = f", more than calexp.max_left_out_fraction = {limit:g} allows" if too_many else ""
    return [f"{n} of {len(status.exposures)} exposures left out of all coadds{more}"]


def _flag_lines(status: SurveyStatus) -> list[str]:
    """Return how many CCDs are used although they lack something, and in which exposures."""
    exposures: dict[str, Counter[str]] = {}
    for exposure in status.exposures:
        for ccd in exposure.ccds:
            for flag in filter(None, ccd.flags.split(",")):
                exposures.setdefault(flag, Counter())[exposure.exposure] += 1
    lines = []
    for flag, counts in exposures.items():
        names = ", ".join(list(counts)[:_FLAGGED]) + (", ..." if len(counts) > _FLAGGED else "")
        lines.append(f"flag {flag}: {counts.total()} CCDs of {len(counts)} exposures ({names})")
    return lines


def _failure_lines(status: SurveyStatus, limit: int | None) -> list[str]:
    told = [
        ccd
        for exposure in status.exposures
        for ccd in exposure.ccds
        if ccd.state == "failed" or (ccd.state == "missing" and ccd.reason)
    ]
    if not told:
        return []
    reasons = Counter(ccd.reason for ccd in told).most_common()
    lines = ["why: " + ", ".join(f"{count} {reason}" for reason, count in reasons)]
    alike: dict[tuple, list[CcdStatus]] = {}
    for ccd in told:
        # identical reasons are told once, unless everything is to be listed
        own = () if limit else (ccd.exposure, ccd.ccd)
        alike.setdefault((ccd.reason, ccd.message, *own), []).append(ccd)
    for (reason, message, *_), ccds in list(alike.items())[:limit]:
        first = ccds[0]
        others = f" and {len(ccds) - 1} more" if len(ccds) > 1 else ""
        lines.append(f"  {first.exposure} CCD {first.ccd}{others}  {reason}: {message}")
        lines += [f"    log: {first.log}"] if first.log else []
    hidden = sum(len(ccds) for ccds in list(alike.values())[limit:]) if limit else 0
    more = [f"  ... and {hidden} more CCDs: --all lists them"] if hidden else []
    return [*lines, *more, ""]


def _loss_lines(status: SurveyStatus, limit: int | None) -> list[str]:
    """Return which CCDs are done but lost a large part of their pixels."""
    told = sorted(_with_losses(status), key=lambda ccd: -ccd.lost_fraction)
    if not told:
        return []
    lines = [f"CCDs that are done but lost more than {100 * NOTABLE_LOSS:.0f} % of their pixels:"]
    for ccd in told[:limit]:
        lost = f"{100 * ccd.lost_fraction:.0f} % are BAD, SAT or NO_DATA"
        lines.append(f"  {ccd.exposure} CCD {ccd.ccd}  {lost}")
    return [*lines, *_rest(len(told), limit, "CCDs"), ""]


def _with_losses(status: SurveyStatus) -> list[CcdStatus]:
    ccds = (ccd for exposure in status.exposures for ccd in exposure.ccds)
    return [ccd for ccd in ccds if ccd.state == "done" and ccd.lost_fraction > NOTABLE_LOSS]


def _product_lines(products: Sequence[ProductStatus], limit: int | None) -> list[str]:
    """Return which products are missing, where some are there: before that it says nothing."""
    lines = []
    for kind in products:
        told = kind.missing if len(kind.missing) < kind.planned or kind.remove else ()
        for what, names in (("missing", told), ("cut off", kind.damaged)):
            if names:
                lines.append(f"{kind.kind} that are {what}:")
                lines += [f"  {name}" for name in names[:limit]]
                lines += _rest(len(names), limit, kind.kind)
        if (told or kind.damaged) and kind.remove:
            lines.append("  to make them again remove, and run the workflow again:")
            lines += [f"    {name}" for name in kind.remove[:limit]]
            lines += _rest(len(kind.remove), limit, "files")
    return [*lines, ""] if lines else []


def _step_lines(steps: Sequence[FailedJob], limit: int | None) -> list[str]:
    """Return which steps of tracts, calibration frames and survey failed, and why."""
    if not steps:
        return []
    lines = ["steps that failed (run the same command again when the cause is removed):"]
    for step in steps[:limit]:
        lines += [f"  {step.job}  {step.reason}", f"    log: {step.log}"]
    return [*lines, *_rest(len(steps), limit, "steps"), ""]


def _warp_lines(tables: Sequence[str], limit: int | None) -> list[str]:
    """Return which warps are gone, and what to remove before a run makes them again."""
    if not tables:
        return []
    lines = ["warps that are gone or cut off; to make them again remove, and run again:"]
    lines += [f"  {table}" for table in tables[:limit]]
    return [*lines, *_rest(len(tables), limit, "tables"), ""]


def _settings_lines(names: Sequence[str], limit: int | None) -> list[str]:
    """Return which products are of other settings than those of today."""
    if not names:
        return []
    shown = ", ".join(names[:limit]) + (", ..." if limit and len(names) > limit else "")
    return [f"made with other settings than these ({len(names)}), a run makes them again: {shown}"]


def _job_lines(jobs: Sequence[ClusterJob], limit: int | None) -> list[str]:
    if not jobs:
        return []
    lines = ["jobs of the cluster whose products are not there:"]
    for job in jobs[:limit]:
        lines.append(f"  {job.unit}  {job.explanation}")
        lines += [f"    log: {job.log}"] if job.log else []
    return [*lines, *_rest(len(jobs), limit, "jobs"), ""]


def _attempt_lines(status: SurveyStatus, every_job: bool) -> list[str]:
    """Return each failed attempt at jobs that are not done; of the others on demand."""
    shown = list(status.attempts)
    if not every_job:
        is_done = status.exit_code != SOMETHING_MISSING
        shown = [key for key in shown if not is_done and key not in status.finished]
    if not shown:
        return []
    lines, limit = ["attempts that failed:"], None if every_job else _LISTED
    for key in shown[:limit]:
        lines.append(f"  {key}")
        lines += [f"    {one.when.replace('T', ' ')}  {told(one)}" for one in status.attempts[key]]
    return [*lines, *_rest(len(shown), limit, "jobs"), ""]


def _rest(total: int, limit: int | None, what: str) -> list[str]:
    hidden = 0 if limit is None else total - limit
    return [f"  ... and {hidden} more {what}: --all lists them"] if hidden > 0 else []


def status_json(status: SurveyStatus) -> str:
    """Return the status as JSON: totals, and for each exposure what is not done."""
    content = {
        "exit_code": status.exit_code,
        "ccds": {state: status.count(state) for state in _STATES},
        "flags": dict(
            Counter(
                flag
                for exposure in status.exposures
                for ccd in exposure.ccds
                for flag in filter(None, ccd.flags.split(","))
            )
        ),
        "left_out": [exposure.exposure for exposure in status.left_out],
        "exposures": [
            {
                "exposure": exposure.exposure,
                "band": exposure.band,
                "manifest": exposure.manifest,
                "note": exposure.note,
                "left_out": exposure.left_out,
                "job": exposure.job and _job_json(exposure.job),
                **{state: exposure.count(state) for state in _STATES},
                "not_done": [asdict(ccd) for ccd in exposure.ccds if ccd.state != "done"],
            }
            for exposure in status.exposures
        ],
        "incomplete": [asdict(ccd) for ccd in _with_losses(status)],
        "products": [asdict(kind) for kind in status.products],
        "failed_steps": [asdict(step) | {"log": str(step.log)} for step in status.failed_steps],
        "lost_warps": list(status.lost_warps),
        "other_settings": list(status.other_settings),
        "jobs": [_job_json(job) for job in status.jobs],
        "not_coadded": list(status.not_coadded),
        "attempts": {
            key: [one._asdict() for one in attempts] for key, attempts in status.attempts.items()
        },
    }
    return json.dumps(content, indent=1)


def _job_json(job: ClusterJob) -> dict[str, str]:
    fields = {key: value for key, value in job._asdict().items() if key != "names"}
    return {**fields, "unit": job.unit, "explanation": job.explanation}
