"""One exposure as one job: scatter, gather, scatter.

Every CCD is detrended and measured by a worker of the pool, which keeps its pixels; its tables
come to the master, which solves for the whole exposure (`exposure.solution`); each CCD's part of
the solution goes back to the worker that holds the pixels, which finishes and writes them once.
Parts of the solution are switched on in the section `exposure` of the settings. With none of them
every CCD is done in one piece, as a job of its own does it, and with the same bits.

Failures are of three kinds. A CCD that fails for reasons of its own is a row of the manifest. What
is not the fault of a CCD (a setting, a full disk, a mistake in the program) ends the job, after the
other CCDs of its round have ended. A worker that dies costs only time: its CCDs are begun
again, once; if that ends a worker again the job ends, and the scheduler tries it with more memory.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coaddflow.astrometry.ccd import CcdStars, solve_ccd
from coaddflow.astrometry.prediction import predicted_wcs, reference_stars
from coaddflow.calexp.ccd import (
    begin_detrending,
    finish_detrending,
    measure_ccd,
    remove_cosmic_rays,
)
from coaddflow.calexp.job import (
    CcdFiles,
    calexp_row,
    remove_partial_products,
    remove_products,
    result_or_failed_row,
    row_of_failure,
    write_products,
)
from coaddflow.calexp.model import CcdId, MeasuredCcd
from coaddflow.calib.frames import read_calibs
from coaddflow.errors import TooLittleMemory, working_on
from coaddflow.exposure.gather import Planned, make_manifest
from coaddflow.exposure.solution import (
    CcdAstrometry,
    CcdSolution,
    CcdSummary,
    apply_solution,
    solve_ccds,
)
from coaddflow.image.fits_hdus import KeptOpen
from coaddflow.instrument.camera import Camera, load_camera
from coaddflow.instrument.raw import byte_ranges, read_raw_ccd
from coaddflow.isr.crosstalk import Aggressor, collect_aggressors
from coaddflow.isr.detrend import PartlyDetrendedCcd
from coaddflow.pool import FilePart, Pool, Rounds, Worker
from coaddflow.pool.launch import run_job
from coaddflow.runtime import resources
from coaddflow.settings import Settings, load_settings
from coaddflow.settings.parallel import ParallelSettings
from coaddflow.tables.exposures import ExposureRow, ImageRow
from coaddflow.tables.manifest import CcdRow
from coaddflow.tables.paths import ROW
from coaddflow.tables.verdict import PASSES

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExposureTask:
    """What all workers must know of an exposure.

    Images calibrated elsewhere have neither row of an exposure nor camera; a raw exposure has no
    ``images``. These and ``files`` are by CCD; ``settings`` has the sections that make a calexp.
    ``threads`` share the work on a CCD.
    """

    exposure: ExposureRow | None
    images: Mapping[int, ImageRow]
    files: Mapping[int, CcdFiles]
    camera: Camera | None
    settings: Settings
    threads: int = 1

    @property
    def is_solved_as_a_whole(self) -> bool:
        """Whether the CCDs wait for a solution of the exposure."""
        return self.exposure is not None and bool(self.settings.exposure.enabled)

    @property
    def corrects_crosstalk(self) -> bool:
        """Whether crosstalk from aggressor amplifiers of other CCDs is subtracted."""
        enabled = self.exposure is not None and self.settings.exposure.crosstalk.enabled
        return enabled and bool(self.camera.crosstalk)

    def pixels(self, ccd: int) -> int:
        """Return the number of pixels of a CCD."""
        if self.exposure is None:
            return self.images[ccd].nx * self.images[ccd].ny
        nx, ny = self.camera.detector(ccd).size
        return nx * ny


def make_exposure(spec: Mapping[str, Any], *, workers: int, memory_mb: float) -> None:
    """Make the calexps of an exposure and its manifest: the whole job.

    Parameters
    ----------
    spec : mapping
        What to do; see `run`.
    workers : int
        Cores for workers. Where there are more of them than CCDs, each CCD gets several.
    memory_mb : float
        Memory of the job, MB. With little memory fewer CCDs are processed at the same time.

    Raises
    ------
    InputError
        As `run`.
    TooLittleMemory
        If the CCDs that wait for the solution of the exposure need all the memory.
    PoolError
        As `run`.
    """
    settings = load_settings(spec["config"])
    task = task_of(spec, settings.only(*spec["sections"]))
    pixels = [task.pixels(ccd) for ccd in task.files]
    fixed = resources.MASTER_MB
    if task.is_solved_as_a_whole:
        fixed += resources.held_memory(pixels, task.corrects_crosstalk)
    least = fixed + resources.ccd_memory(max(pixels))
    room = memory_mb - fixed
    if room <= 0:
        raise TooLittleMemory(
            "the CCDs of an exposure",
            least,
            memory_mb,
            remedy=f"give it more: --set-resources exposure:mem_mb={least}",
        )
    at_a_time, threads = divided_cores(workers, len(pixels), settings.parallel)
    spec = {**spec, "threads": threads}
    run_job(__name__, spec, settings.parallel, workers=at_a_time, memory_mb=room)


def divided_cores(cores: int, n_ccds: int, parallel: ParallelSettings) -> tuple[int, int]:
    """Return how many CCDs are processed at a time, and how many threads share each of them.

    Workers that may be on other machines have one core each.
    """
    if not parallel.has_workers_here:
        return cores, 1
    at_a_time = 1 if parallel.backend == "serial" else min(cores, parallel.workers, n_ccds)
    if parallel.ccd_threads is None:
        return at_a_time, cores // at_a_time
    threads = min(parallel.ccd_threads, cores)
    return min(at_a_time, cores // threads), threads


def run(pool: Pool, spec: Mapping[str, Any]) -> None:
    """Make the calexps of an exposure and its manifest: the whole job (`pool.launch.run_job`).

    Parameters
    ----------
    pool : Pool
        The pool.
    spec : mapping
        Plain values: ``manifest``; ``exposure`` (row of the table of raw exposures) or ``images``
        (rows of images calibrated elsewhere); ``ccds``: number, raw file and calibration frames
        of each; ``config``: the settings, and ``sections``: those that make a calexp;
        ``verdict``: see `gather.make_manifest`; ``threads``: how many share the work on a CCD.

    Raises
    ------
    InputError
        If the exposure fails as a whole (`gather.make_manifest`), or a setting, a calibration
        frame or the reference catalogue is not usable, or a product cannot be written.
    PoolError
        If a CCD has ended two workers.
    """
    settings = load_settings(spec["config"])
    task = task_of(spec, settings.only(*spec["sections"]))
    begin = time.monotonic()
    rows = make_calexps(pool, task)
    seconds = time.monotonic() - begin
    workers = len(pool.processes)
    _LOG.info(
        "%d CCDs in %.1f s; %d workers busy %.0f %% of it",
        *(len(rows), seconds, workers, 100 * pool.busy / seconds / max(workers, 1)),
    )
    planned = None
    if task.exposure is not None:
        planned = Planned(task.exposure, task.camera, settings.prediction.margin)
    make_manifest(spec["manifest"], rows, settings.calexp, planned, spec.get("verdict", PASSES))


def task_of(spec: Mapping[str, Any], settings: Settings) -> ExposureTask:
    """Return the task that plain values describe (see `run`)."""
    exposure = ExposureRow(**spec["exposure"]) if spec.get("exposure") else None
    images = {row["ccd"]: ImageRow(**row) for row in spec.get("images", ())}
    name = exposure.exposure if exposure else next(iter(images.values())).exposure
    files = {
        item["ccd"]: CcdFiles(
            raw=item["raw"],
            calibs=item.get("calibs", {}),
            row=ROW.format(exposure=name, ccd=item["ccd"]),
            manifest=spec["manifest"],
        )
        for item in spec["ccds"]
    }
    camera = load_camera(spec["config"]["camera"]) if exposure else None
    threads = spec.get("threads", 1)
    return ExposureTask(exposure, images, files, camera, settings, threads)


def make_calexps(pool: Pool, task: ExposureTask) -> list[CcdRow]:
    """Make the calexps of an exposure, and return a row for each CCD; errors are those of `run`.

    The manifest and the products of an earlier run are removed first. No rows are written.
    """
    remove_products(*task.files.values())
    pool.broadcast(task=task)
    rounds = Rounds(
        pool,
        task.files,
        cost=task.pixels,
        memory=lambda ccd: 1e6 * resources.ccd_memory(task.pixels(ccd)),
        label="CCD {}".format,
        is_end=_is_row,
    )
    ended: dict[int, CcdRow] = {}
    if task.is_solved_as_a_whole:
        _solve_and_finish(pool, task, rounds, ended)
    else:
        _round(rounds, _whole_ccd, ended, files=_FilesRead(task))
    remove_partial_products(*task.files.values())
    return [ended[ccd] for ccd in task.files]


def _solve_and_finish(
    pool: Pool, task: ExposureTask, rounds: Rounds, ended: dict[int, CcdRow]
) -> None:
    """Measure the CCDs on the workers, solve for all of them here, finish them on the workers."""
    files = _FilesRead(task)
    if task.corrects_crosstalk:
        found = _round(rounds, _begin_ccd, ended, files=files.raw)
        for ccd in list(found):
            pool.broadcast(**{f"signals_{ccd}": found.pop(ccd)})
    summaries = _round(
        rounds, _measure_ccd, ended, files=files.calibs if task.corrects_crosstalk else files
    )
    if not summaries:
        return
    with working_on(f"exposure {task.exposure.exposure}"):
        solutions = solve_ccds(task.exposure, task.camera, summaries, task.settings)
    for ccd, failure in solutions.failures.items():
        ended[ccd] = row_of_failure(task.exposure, ccd, task.files[ccd], task.camera, failure)
        rounds.leave(ccd)
    pool.broadcast(sky=solutions.sky)
    _round(rounds, _finish_ccd, ended, {ccd: (ccd, solutions.ccds[ccd]) for ccd in rounds.keys})


def _round(
    rounds: Rounds,
    function: Callable[[Any, Worker], Any],
    ended: dict[int, CcdRow],
    arguments: Mapping[int, Any] | None = None,
    files: Callable[[int], Iterable[FilePart]] | None = None,
) -> dict[int, Any]:
    """Do a round (arguments: the CCDs); add the rows of CCDs that ended, return other results."""
    results = rounds.do(function, arguments or {ccd: ccd for ccd in rounds.keys}, files)
    ended |= {ccd: row for ccd, row in results.items() if _is_row(row)}
    return {ccd: result for ccd, result in results.items() if not _is_row(result)}


class _FilesRead:
    """What the workers read for a CCD, so that it can be read ahead (`Pool.map`)."""

    def __init__(self, task: ExposureTask):
        self._task = task
        self._raw_file = KeptOpen()

    def __call__(self, ccd: int) -> Iterator[FilePart]:
        """Yield all parts of files."""
        yield from self.raw(ccd)
        yield from self.calibs(ccd)

    def calibs(self, ccd: int) -> Iterator[FilePart]:
        """Yield the calibration frames."""
        yield from map(FilePart, self._task.files[ccd].calibs.values())

    def raw(self, ccd: int) -> Iterator[FilePart]:
        """Yield the raw pixels, or those of an image calibrated elsewhere."""
        task, files = self._task, self._task.files[ccd]
        if task.exposure is None:
            row = task.images[ccd]
            yield from map(FilePart, filter(None, (row.path, row.weight_path, row.mask_path)))
            return
        yield from self._raw_parts.get(ccd, [FilePart(files.raw)])

    @functools.cached_property
    def _raw_parts(self) -> Mapping[int, list[FilePart]]:
        """Parts of a file that the CCDs share; it stays open."""
        raw = {files.raw for files in self._task.files.values()}
        if len(raw) > 1 or len(self._task.files) == 1:
            return {}
        camera = self._task.camera
        with self._raw_file(Path(raw.pop())) as stream:
            parts = byte_ranges(stream, camera, map(camera.detector, self._task.files))
            return {
                ccd: [FilePart(stream.fileno(), *of_ccd) for of_ccd in several]
                for ccd, several in parts.items()
            }


def _is_row(result: Any) -> bool:
    return isinstance(result, CcdRow)


# On the workers -------------------------------------------------------------------------------


def _step_of(worker: Worker, ccd: int, step: Callable[[ExposureTask], Any]) -> Any:
    """Do a step of a CCD; of one that fails nothing is kept."""
    task: ExposureTask = worker.constants["task"]
    row = task.exposure or task.images[ccd]
    result = result_or_failed_row(row, ccd, task.files[ccd], task.camera, lambda: step(task))
    if _is_row(result):
        worker.state.clear()
    return result


def _raw_files(worker: Worker) -> KeptOpen:
    """Return what opens raw files for a worker: the CCDs of an exposure may share one."""
    return worker.cache.setdefault("raw files", KeptOpen())


def _whole_ccd(ccd: int, worker: Worker) -> CcdRow:
    """Do the whole job of a CCD."""

    def step(task: ExposureTask) -> CcdRow:
        row = task.exposure or task.images[ccd]
        files, raw_files = task.files[ccd], _raw_files(worker)
        return calexp_row(row, ccd, files, task.camera, task.settings, task.threads, raw_files)

    return _step_of(worker, ccd, step)


def _begin_ccd(ccd: int, worker: Worker) -> dict | CcdRow:
    """Begin a CCD and return the signals of its amplifiers that are aggressors on other CCDs."""

    def step(task: ExposureTask) -> dict:
        worker.state["begun"] = _begun(ccd, task, worker)
        return worker.state["begun"].signals(task.camera.crosstalk_aggressors(ccd))

    return _step_of(worker, ccd, step)


def _begun(ccd: int, task: ExposureTask, worker: Worker) -> PartlyDetrendedCcd:
    """Read a CCD and make the steps that come before crosstalk between CCDs."""
    detector, check = task.camera.detector(ccd), task.settings.detrend.check_raw
    raw = read_raw_ccd(task.files[ccd].raw, task.camera, detector, check, _raw_files(worker))
    return begin_detrending(raw, task.settings, task.threads)


def _measure_ccd(ccd: int, worker: Worker) -> CcdSummary | CcdRow:
    """Detrend and measure a CCD, keep its pixels, and return what the master needs."""

    def step(task: ExposureTask) -> CcdSummary:
        detrended = finish_detrending(
            worker.state.pop("begun") if task.corrects_crosstalk else _begun(ccd, task, worker),
            read_calibs(task.files[ccd].calibs, task.threads),
            task.exposure.exposure_time,
            task.settings,
            _aggressors(ccd, task, worker) if task.corrects_crosstalk else (),
        )
        remove_cosmic_rays(detrended.masked_image, task.settings, task.threads)
        measured = measure_ccd(detrended.masked_image, task.settings, task.threads)
        worker.state.update(measured=measured, cards=detrended.header)
        astrometry = None
        if not task.settings.exposure.astrometry.enabled:
            astrometry = _own_astrometry(ccd, task, measured)
        return CcdSummary(
            measured.masked_image.shape,
            measured.sources,
            measured.background,
            measured.aperture_correction,
            astrometry,
        )

    return _step_of(worker, ccd, step)


def _aggressors(ccd: int, task: ExposureTask, worker: Worker) -> tuple[Aggressor, ...]:
    """Return the amplifiers of other CCDs that leave ghosts on this one."""
    links = task.camera.crosstalk_into(ccd)
    signals = {}
    for other in sorted({link.aggressor[0] for link in links}):
        of_ccd = worker.constants.get(f"signals_{other}", {})
        signals |= {(other, amplifier): signal for amplifier, signal in of_ccd.items()}
    return collect_aggressors(links, signals)


def _own_astrometry(ccd: int, task: ExposureTask, measured: MeasuredCcd) -> CcdAstrometry:
    """Solve a CCD by itself; return only those catalogue stars that are in the solution."""
    exposure, detector = task.exposure, task.camera.detector(ccd)
    refcat = reference_stars(exposure, task.camera, detector, task.settings)
    initial = predicted_wcs(task.camera, detector, exposure.ra, exposure.dec, exposure.rotation)
    stars = CcdStars.of(measured.sources, measured.masked_image.shape)
    solution = solve_ccd(stars, refcat, initial, task.settings.astrometry)
    matched = refcat[solution.reference_index]
    return CcdAstrometry(replace(solution, reference_index=np.arange(len(matched))), matched)


def _finish_ccd(item: tuple[int, CcdSolution], worker: Worker) -> CcdRow:
    """Apply the solution to a CCD and write it."""
    ccd, solution = item

    def step(task: ExposureTask) -> CcdRow:
        calexp = apply_solution(
            worker.state["measured"],
            CcdId.of(task.exposure, ccd),
            solution,
            worker.constants["sky"],
            task.camera,
            task.settings.exposure,
        )
        calexp.header.update(worker.state["cards"])
        files = task.files[ccd]
        inputs = [files.raw, *files.calibs.values()]
        return write_products(calexp, files, task.settings, inputs, task.threads)

    return _step_of(worker, ccd, step)
