"""How far a survey is: every CCD of every exposure is done, failed, or missing, and every coadd.

The answer comes from the plan (what there should be), the manifests, the rows of single CCDs
where the manifest is not written yet, the result lines of job logs, and what the cluster says about
its jobs. All are read as the small texts that they are; no image is opened.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from coaddflow.cluster.attempts import Attempt, histories, told
from coaddflow.cluster.history import ClusterJob, latest_jobs
from coaddflow.runtime.log import NO_LOG, NO_RESULT, FailedJob, cluster_job_of, failed_jobs
from coaddflow.tables import paths
from coaddflow.tables.manifest import ccd_states
from coaddflow.workflow.plan import Plan
from coaddflow.workflow.stages import files_by_job, files_by_label, job_names, promises_by_label

State = Literal["done", "failed", "missing"]
_STATES: tuple[State, ...] = get_args(State)

ALL_DONE, SOMETHING_FAILED, SOMETHING_MISSING = 0, 1, 3
"""Exit codes of `coaddflow status` (2 is for wrong usage and unusable input)."""

_LISTED = 20


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
    attempts: dict[str, list[Attempt]] = field(default_factory=dict)
    """Attempts that failed and submissions that were refused, by job."""
    finished: frozenset[str] = frozenset()
    """Jobs of the cluster whose products are all there."""

    def count(self, state: State) -> int:
        """Return the number of CCDs in a state."""
        return sum(exposure.count(state) for exposure in self.exposures)

    @property
    def exit_code(self) -> int:
        """0: all done; 1: all ran, but some CCDs failed; 3: CCDs, coadds or others are missing."""
        if self.count("missing") or not all(exposure.manifest for exposure in self.exposures):
            return SOMETHING_MISSING
        if any(kind.missing for kind in self.products):
            return SOMETHING_MISSING
        return SOMETHING_FAILED if self.count("failed") else ALL_DONE


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
    folders, promises = _Folders(results), promises_by_label(plan)
    products = tuple(
        ProductStatus(label, len(files), folders.missing(files), promises.get(label, ""))
        for label, files in files_by_label(plan).items()
    )
    files = files_by_job(plan)
    unfinished = {job for job in files if folders.missing(files[job])}
    jobs = latest_jobs(folder, job_names(), wanted=unfinished.__contains__)
    exposures = tuple(
        _exposure_status(
            plan, exposure, results, logs, notes.get(exposure, ""), jobs.get(f"exposure_{exposure}")
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
        histories(folder),
        frozenset(files) - unfinished,
    )


class _Folders:
    """What is in the folders of the products, each listed once."""

    def __init__(self, results: Path):
        self._results = results
        self._listed: dict[Path, set[str]] = {}

    def missing(self, files: Sequence[str]) -> tuple[str, ...]:
        """Return those of some products that are not there, below the folder of the products."""
        names = (Path(path).relative_to(paths.RESULTS) for path in files)
        return tuple(str(name) for name in names if not self._has(self._results / name))

    def _has(self, path: Path) -> bool:
        if path.parent not in self._listed:
            self._listed[path.parent] = {found.name for found in path.parent.glob("*")}
        return path.name in self._listed[path.parent]


def _exposure_status(
    plan: Plan, exposure: str, results: Path, logs: Path, note: str, job: ClusterJob | None
) -> ExposureStatus:
    folder = results / "calexp" / exposure
    rows = ccd_states(results / "summary" / f"{exposure}.ecsv")
    written = rows is not None
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
        state, reason, message = rows.get(ccd, ("missing", "", ""))
        if state == "done" and f"{ccd}.fits" not in is_there:
            state, reason = "missing", "calexp_gone"
            message = (
                f"{folder / str(ccd)}.fits is not there any more: remove "
                f"{results / 'summary' / exposure}.ecsv and run the workflow again"
            )
        log = log_folder / f"{ccd}.log"
        step = ended.get(str(ccd))
        # Snakemake leaves empty logs of all steps of a job that failed: that of the job tells more
        if state == "missing" and step and (step.reason != NO_LOG or job is None):
            reason, message = "job_failed", _why_ended(step, job)
        shown = str(log) if state != "done" and log.is_file() else ""
        ccds.append(CcdStatus(exposure, ccd, state, reason, message, shown))
    if written or (job is not None and job.outcome == "done"):
        job = None
    note = "" if written else note
    return ExposureStatus(exposure, plan.band_of(exposure), tuple(ccds), written, note, job)


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
    for ccd, (state, reason, message) in (kept or {}).items():
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
            # not a row: the CCD is missing
            continue
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
        *_product_lines(status.products, limit),
        *_job_lines(status.jobs, limit),
        *_attempt_lines(status, every_exposure),
    ]
    n_done = sum(exposure.is_done for exposure in status.exposures)
    lines.append(
        f"{len(status.exposures)} exposures, {n_done} done; "
        f"{sum(len(e.ccds) for e in status.exposures)} CCDs: {status.count('done')} done, "
        f"{status.count('failed')} failed, {status.count('missing')} missing"
    )
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
        lines.append(
            f"{exposure.exposure:<{width}} {exposure.band:<6} {counts[0]:>5} {counts[1]:>6} "
            f"{counts[2]:>7}{refused}"
        )
        lines += [f"  {exposure.note}"] if refused else []
        lines += [f"  {exposure.job.explanation}"] if exposure.job else []
    return [*lines, *_rest(len(exposures), limit, "exposures"), ""]


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
    for ccd in told[:limit]:
        lines.append(f"  {ccd.exposure} CCD {ccd.ccd}  {ccd.reason}: {ccd.message}")
        lines += [f"    log: {ccd.log}"] if ccd.log else []
    return [*lines, *_rest(len(told), limit, "CCDs"), ""]


def _product_lines(products: Sequence[ProductStatus], limit: int | None) -> list[str]:
    """Return which products are missing, where some are there: before that it says nothing."""
    lines = []
    for kind in products:
        if 0 < len(kind.missing) < kind.planned:
            promise = re.sub(r"\{(\w+)\}", lambda match: match[1].upper(), kind.promise)
            remedy = f" (remove {promise}, then run again)" if promise else ""
            lines.append(f"{kind.kind} that are missing{remedy}:")
            lines += [f"  {name}" for name in kind.missing[:limit]]
            lines += _rest(len(kind.missing), limit, kind.kind)
    return [*lines, ""] if lines else []


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
        "exposures": [
            {
                "exposure": exposure.exposure,
                "band": exposure.band,
                "manifest": exposure.manifest,
                "note": exposure.note,
                "job": exposure.job and _job_json(exposure.job),
                **{state: exposure.count(state) for state in _STATES},
                "not_done": [asdict(ccd) for ccd in exposure.ccds if ccd.state != "done"],
            }
            for exposure in status.exposures
        ],
        "products": [asdict(kind) for kind in status.products],
        "jobs": [_job_json(job) for job in status.jobs],
        "attempts": {
            key: [one._asdict() for one in attempts] for key, attempts in status.attempts.items()
        },
    }
    return json.dumps(content, indent=1)


def _job_json(job: ClusterJob) -> dict[str, str]:
    fields = {key: value for key, value in job._asdict().items() if key != "names"}
    return {**fields, "unit": job.unit, "explanation": job.explanation}
