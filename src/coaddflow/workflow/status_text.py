"""The status of a survey as text for people, and as JSON for scripts."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from coaddflow.cluster.attempts import told
from coaddflow.cluster.history import ClusterJob
from coaddflow.runtime.log import FailedJob
from coaddflow.tables.manifest import NOTABLE_LOSS
from coaddflow.workflow.status import (
    SOMETHING_MISSING,
    STATES,
    CcdStatus,
    ExposureStatus,
    ProductStatus,
    SurveyStatus,
)

_LISTED, _FLAGGED = 20, 5
"""Lines of a kind, and CCDs with a flag, that are listed unless all are asked for."""


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
        counts = [exposure.count(state) for state in STATES]
        refused = "  no manifest" if exposure.note and not exposure.manifest else ""
        refused = "  left out" if exposure.left_out else refused
        lines.append(
            f"{exposure.exposure:<{width}} {exposure.band:<6} {counts[0]:>5} {counts[1]:>6} "
            f"{counts[2]:>7}{f'  {exposure.sets}' if exposure.sets else ''}{refused}"
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
        "ccds": {state: status.count(state) for state in STATES},
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
                "sets": exposure.sets,
                "job": exposure.job and _job_json(exposure.job),
                **{state: exposure.count(state) for state in STATES},
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
