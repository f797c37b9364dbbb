"""What a run tells its user at the beginning and at the end.

Everything is read from small files (manifests as text, databases are not opened), since the
Snakefile calls this in the process that schedules the jobs.
"""

import re
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coaddflow.cluster import attempts
from coaddflow.cluster.history import ClusterJob, latest_jobs
from coaddflow.errors import Reason
from coaddflow.runtime import log as joblog
from coaddflow.tables import paths, pointings
from coaddflow.tables.manifest import ccd_states
from coaddflow.tables.paths import CALIB_KINDS, KINDS_BY_BAND
from coaddflow.tables.verdict import read_verdict
from coaddflow.workflow.left_out import left_out_lines
from coaddflow.workflow.plan import Plan
from coaddflow.workflow.stages import files_by_label, job_names

_LISTED = 10

INTERRUPTED = 130
"""Exit code of a run that was ended with Ctrl-C, as shells have it."""


def start_text(plan: Plan) -> str:
    """Return what the run is about, and warnings of what a user may not expect."""
    n_patches = sum(len(plan.patches_of(band, t)) for band in plan.bands for t in plan.tracts)
    n_ccds = sum(len(plan.ccds_of(exposure)) for exposure in plan.exposures)
    lines = [
        f"coaddflow: {_count(len(plan.exposures), 'exposure')} with {_count(n_ccds, 'CCD')} in "
        f"{_count(len(plan.bands), 'band')} ({', '.join(plan.bands)}), "
        f"{_count(len(plan.tracts), 'tract')}, {_count(n_patches, 'coadd')}"
    ]
    lines += [f"coaddflow: note: {note}" for note in notes(plan)]
    return "\n".join(lines)


def notes(plan: Plan) -> list[str]:
    """Return what the plan leaves out, or would surprise with."""
    found = []
    for kind in CALIB_KINDS if plan.science else ():
        source = getattr(plan.settings.calibs, kind).source
        bands = plan.bands if kind in KINDS_BY_BAND else plan.bands[:1]
        # kinds that have sets are said below, with their frames
        without = [
            band
            for band in bands
            if not plan.calib_sets.exists(kind, band) and not plan.calib_sets.dated([kind], band)
        ]
        if source not in ("none", "given") and without:
            which = f" for {', '.join(without)}" if kind in KINDS_BY_BAND else ""
            found.append(f"no master {kind}{which}: too few exposures in the table")
    found += _set_notes(plan)
    if plan.settings.exposure.crosstalk.enabled and not plan.crosstalk:
        found.append(
            "exposure.crosstalk is switched on, but the camera file has no crosstalk between "
            "CCDs; `coaddflow crosstalk` measures it"
        )
    if plan.pointings:
        found.append(
            f"{_count(len(plan.pointings), 'exposure')} with the pointing that an earlier run "
            f"fitted, in place of that of {plan.settings.exposures}: {_some(list(plan.pointings))}"
        )
    off_map = [exposure for exposure in plan.exposures if not plan.overlaps[exposure]]
    if off_map:
        found.append(f"{_count(len(off_map), 'exposure')} off the sky map: {_some(off_map)}")
    if frames := _without_raw_files(plan, plan.calibration):
        found.append(
            f"the raw files of {_count(len(frames), 'calibration frame')} are missing "
            f"({_some(frames)}): what has been made from them stays as it is"
        )
    if missing := _without_raw_files(plan, plan.science):
        found.append(
            f"the raw files of {_count(len(missing), 'exposure')} are missing ({_some(missing)}): "
            "what has been made from them stays as it is, the others fail"
        )
    return found


def _set_notes(plan: Plan) -> list[str]:
    """Return what exposures take although no set holds for them, and which frames are not used."""
    found = []
    for kind in CALIB_KINDS:
        if far := plan.exposures_outside(kind):
            found.append(
                f"{_count(len(far), 'exposure')} of nights for which no set of {kind} frames holds "
                f"take the nearest one: {_some(far)}"
            )
        if unused := plan.frames_without_set(kind):
            least = plan.settings.calibs.least_frames(kind)
            found.append(
                f"{_count(len(unused), f'{kind} frame')} in no set (outside of the nights of all "
                f"sets, or fewer than {least} in a set): {_some(unused)}"
            )
    if plan.differing_sets:
        found.append(
            f"the column `sets` of {plan.settings.exposures} is out of date for "
            f"{_count(len(plan.differing_sets), 'exposure')}; `coaddflow ingest --sets` brings it "
            "up to date"
        )
    return found


def set_lines(plan: Plan) -> list[str]:
    """Return the sets of calibration frames with what is in them and who takes them.

    A line for each set of a kind (and band) that has sets; empty where there is one for all nights.
    """
    lines = []
    for kind, band in plan.dated_kinds:
        takers = Counter(one.name for one in plan.sets_of_exposures(kind, band).values() if one)
        for one in plan.calib_sets.of(kind, band):
            frames = len(plan.calib_frames(kind, band, one.name))
            made_of = f"{_count(frames, 'frame')}, " if frames else ""
            lines.append(
                f"{' '.join(filter(None, (kind, band)))} {one.name}: {made_of}taken by "
                f"{_count(takers[one.name], 'exposure')}"
            )
    return lines


def _without_raw_files(plan: Plan, exposures: Iterable[str]) -> list[str]:
    """Return those of some raw exposures whose first file is not there."""
    return [e for e in exposures if not Path(plan.raw_file(e, min(plan.ccds))).exists()]


def demo_hint(workflow: Any) -> str:
    """Return what to do where a run has the settings of the demo, which has no data yet."""
    demo = Path(workflow.basedir, "config.yaml").resolve()
    if [Path(path).resolve() for path in workflow.configfiles] != [demo]:
        return ""
    return (
        ". These are the settings of the demo: `make demo` makes its data and runs it; "
        "--configfile FILE takes the settings of another survey"
    )


def interrupted_text(done: int, total: int) -> str:
    """Return what a run says that was ended with Ctrl-C."""
    return f"coaddflow: interrupted; {done} of {total} jobs done; the same command goes on"


def success_text(plan: Plan) -> str:
    """Return what there is after a run."""
    lines = [_ccd_summary(plan), *_left_out_lines(plan)]
    pictures = [paths.PICTURE.format(tract=tract) for tract in plan.tracts]
    lines += [f"coaddflow: picture {path}" for path in pictures if Path(path).exists()][:10]
    coadds = Path(paths.COADD).parents[2]
    lines.append(f"coaddflow: coadds {coadds}/, corner database {paths.SURVEY_CORNERS}")
    lines += [f"coaddflow: note: {line}" for line in left_out_lines(plan)[:_LISTED]]
    left_over = leftover_coadds(plan)
    if left_over:
        lines.append(
            f"coaddflow: note: {_count(len(left_over), 'coadd')} of exposures that are no longer "
            f"in the survey may be removed: {_some(left_over)}"
        )
    return "\n".join(lines)


def leftover_coadds(plan: Plan) -> list[str]:
    """Return coadds that are there but not in the plan, such as those of dropped exposures."""
    planned = set(files_by_label(plan)["coadds"])
    # what a killed process was writing begins with a dot
    found = {path.as_posix() for path in Path().glob(re.sub(r"\{\w+\}", "[!.]*", paths.COADD))}
    return sorted(found - planned)


def failure_text(logs: str | Path, since: float) -> str:
    """Return a table of what failed since a time, why, and where its log is."""
    failed = joblog.failed_jobs(logs, since)
    jobs = [job for job in latest_jobs(".", job_names(), since).values() if not _went_well(job)]
    if jobs:
        # Snakemake leaves empty logs of all steps of a job that failed
        failed = [step for step in failed if step.reason != joblog.NO_LOG]
    killed = [job for job in jobs if job.outcome != "failed" or not failed]
    killed = [job for job in killed if job.outcome != "refused"]
    refused = refused_jobs(since)
    if not failed and not killed and not refused:
        return "coaddflow: the run failed before or between jobs; see Snakemake's messages above"
    counts = (
        (len(failed), "step", "failed"),
        (len(killed), "job", "of the cluster ended early"),
        (len(refused), "job", "not accepted by the cluster"),
    )
    what = ", ".join(f"{_count(number, noun)} {verb}" for number, noun, verb in counts if number)
    return "\n".join(
        [
            f"coaddflow: {what}; all independent steps finished:",
            *([joblog.failure_table(failed)] if failed else []),
            *(f"  {job.unit}  {job.explanation}" for job in killed),
            *refused,
            "coaddflow: `coaddflow status` shows every exposure, docs/failures.md what to do; "
            "the same command again goes on from here",
        ]
    )


def refused_jobs(since: float, folder: str | Path = ".") -> list[str]:
    """Return a line for each job that a cluster has not accepted since a time, and does not have.

    Such a job has neither a log nor a number.
    """
    begin = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since))
    last = {key: found[-1] for key, found in attempts.histories(folder).items()}
    return [
        f"  {key}  {attempts.told(one)}"
        for key, one in last.items()
        if one.outcome == "refused" and one.next is None and one.when >= begin
    ]


def _went_well(job: ClusterJob) -> bool:
    """Return whether a job is done: where Slurm says nothing, if its log has been removed."""
    silent = job.system == "Slurm" and job.outcome == "unknown"
    return job.outcome == "done" or (silent and not Path(job.log).exists())


def _ccd_summary(plan: Plan) -> str:
    """Return how many CCDs are done, and why the others are not."""
    reasons: Counter[str] = Counter()
    flags: Counter[str] = Counter()
    n_done = 0
    for exposure in plan.exposures:
        for ccd in (ccd_states(paths.MANIFEST.format(exposure=exposure)) or {}).values():
            n_done += ccd.state == "done"
            reasons.update([ccd.reason] if ccd.state == "failed" else [])
            flags.update(flag for flag in ccd.flags.split(",") if flag)
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    failed = f"; {reasons.total()} failed ({why})" if reasons else ""
    doubtful = ", ".join(f"{count} {flag}" for flag, count in flags.most_common())
    flagged = f"; flags: {doubtful}" if flags else ""
    exposures, ccds = _count(len(plan.exposures), "exposure"), _count(n_done, "CCD")
    return f"coaddflow: {exposures}, {ccds} calibrated{failed}{flagged}"


def _left_out_lines(plan: Plan) -> list[str]:
    """Return which exposures are left out of all coadds, and why."""
    verdicts = {e: read_verdict(paths.MANIFEST.format(exposure=e)) for e in plan.exposures}
    messages = [verdict.message for verdict in verdicts.values() if verdict.cause]
    if not messages:
        return []
    lines = [f"coaddflow: {_count(len(messages), 'exposure')} left out of all coadds:"]
    lines += [f"  {message}" for message in messages[:_LISTED]]
    lines += [f"  ... and {len(messages) - _LISTED} more"] if len(messages) > _LISTED else []
    moved = {e for e, v in verdicts.items() if v.cause == Reason.OUTSIDE_PREDICTION}
    if any(pointings.has_new(exposure) for exposure in moved):
        lines.append("  run again: those that lie elsewhere then have the pointing that was fitted")
    lines.append("  `coaddflow status` shows each; one that is mended comes in with the next run")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
