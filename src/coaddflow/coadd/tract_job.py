"""One tract in one band, as one job: every calexp is read once, the coadds are written once.

Three rounds on the pool. (1) Each CCD is read, warped to all pixels of the tract that it reaches,
and put into the spool. (2) What the master gathers is small: where the warps are, and the sky in
cells, from which it solves for the differences between the skies of the exposures, if they are
to be matched. (3) Each patch takes the pixels of its exposures from the spool, block by block, and
is coadded and written. Without matched skies the pixels are those of the rules `warp` and `coadd`,
to the bit.
"""

import logging
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coaddflow.coadd.background_matching import (
    SkyBins,
    SkyCorrection,
    bin_sky,
    match_backgrounds,
    merge_bins,
)
from coaddflow.coadd.patch import SECTIONS, PatchWork, TractInputs, write_patch
from coaddflow.coadd.readers import LayeredWarp
from coaddflow.coadd.spool import Spool, SpooledWarp, SpoolSlot, write_warp
from coaddflow.corners.database import CornerDatabase, Selection
from coaddflow.errors import CoaddflowError, is_lasting
from coaddflow.files import remove, remove_partial
from coaddflow.geometry.box import Box, common_box
from coaddflow.image.masked_image import MaskedImage
from coaddflow.image.provenance import provenance_header
from coaddflow.pool import Failure, FilePart, Pool, PoolError, Results, Worker
from coaddflow.pool.launch import run_job
from coaddflow.pool.pool import Function
from coaddflow.runtime import resources
from coaddflow.settings import Settings, load_settings
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.maps import make_skymap
from coaddflow.skymap.tract import Tract
from coaddflow.tables import paths
from coaddflow.tables.coadds import CoaddRow, write_coadd_table
from coaddflow.tables.manifest import CcdRow
from coaddflow.warp.ccds import trim, warp_whole_ccd
from coaddflow.warp.files import Warp, kept_table, remove_warps, write_warps
from coaddflow.warp.job import SECTIONS as WARP_SECTIONS
from coaddflow.warp.job import ccds_of_patches, read_ccd

_LOG = logging.getLogger(__name__)

_MARGIN = 32
"""Pixels around the outline of a CCD in the manifest, between whose vertices it may be bowed."""

_TOLD = 5
"""Failures that the last line of a job names; the log has all."""

Ccd = tuple[str, int]
"""Exposure and CCD number."""


# The job ----------------------------------------------------------------------------------------


def make_tract_coadds(
    table: str | Path,
    database: str | Path,
    skymap: Mapping[str, Any],
    tract: int,
    band: str,
    patches: Sequence[str],
    settings: Settings,
    *,
    workers: int,
    memory_mb: float | None = None,
) -> None:
    """Warp and coadd a band on a tract: the whole job.

    Parameters
    ----------
    table : str or Path
        The list of the coadds, ``.../coadd/{band}/{tract}.ecsv``, written last. The coadds go
        into the folder beside it that has the tract's number. What an earlier run made of them,
        and its warps in ``.../warp/{tract}``, is removed first.
    database : str or Path
        The corner database of the band on the tract.
    skymap : mapping
        Settings of the sky map.
    tract, band, patches : int, str, sequence of str
        Which coadds. One is written for each patch, also if nothing covers it.
    settings : Settings
        Sections coadd, selection, warp, products and parallel.
    workers : int
        CCDs and patches that are in work at a time.
    memory_mb : float, optional
        What the job has, MB. With less than `workflow.needs` asks for, more warps wait in the
        scratch folder, and then fewer CCDs and patches are in work at a time.

    Raises
    ------
    CoaddflowError
        If a CCD could not be warped or a patch not coadded; the message names it. All others
        have been done, but there is no list.
    """
    spec = {
        "table": os.fspath(table),
        "database": os.fspath(database),
        "skymap": dict(skymap),
        "tract": tract,
        "band": band,
        "patches": list(patches),
        "settings": {
            name: getattr(settings, name).model_dump(mode="json")
            for name in (*SECTIONS, "parallel")
        },
        "spool_mb": settings.coadd.spool_mb,
    }
    in_work = None
    if memory_mb is not None:
        spec["spool_mb"], in_work = _divided_memory(memory_mb, spec, settings, workers)
    _remove_earlier(Path(table), database, patches)
    run_job(__name__, spec, settings.parallel, workers=workers, memory_mb=in_work)


def _divided_memory(
    memory_mb: float, spec: Mapping[str, Any], settings: Settings, workers: int
) -> tuple[float, float]:
    """Return what the spool and the items in work have of the job's memory, MB.

    The workers come first: warps that find no room in memory wait in the scratch folder.
    """
    tract = make_skymap(SkymapSettings.model_validate(spec["skymap"])).tract(spec["tract"])
    patch = _largest_patch(tract, spec["patches"])
    with CornerDatabase(spec["database"]) as corners:
        n_exposures = len(corners.manifests())
        ccds = [row.nx * row.ny for row in corners.ccds() if row.state == "done"]
    coadd, matching = settings.coadd, settings.coadd.background_matching
    work = resources.tract_work_memory(
        workers,
        len(ccds),
        resources.warped_ccd_memory(max(ccds, default=0), tract.width * tract.height),
        len(spec["patches"]),
        resources.coadd_memory(patch, n_exposures, coadd.memory_mb),
    )
    rest = memory_mb - resources.MASTER_MB
    if matching.enabled:
        n_patches = len(spec["patches"])
        rest -= resources.matching_memory(n_exposures, patch, n_patches, matching.bin_size)
    rest = max(rest, 0.0)
    spool = min(max(rest - work, 0.0), coadd.spool_mb)
    return spool, rest - spool


def _remove_earlier(table: Path, database: str | Path, patches: Sequence[str]) -> None:
    """Remove what an earlier run made, the list first: it may be of other settings."""
    coadds = [_coadd_path(table, patch) for patch in patches]
    remove(table, *coadds)
    remove_partial(*coadds)
    with CornerDatabase(database) as corners:
        folders = [_warp_folder(table, exposure) for exposure in corners.manifests()]
    # what a network disk says of files that are not there may be old: tables are removed unasked
    remove(
        *(one for folder in folders for one in (folder.with_suffix(".ecsv"), kept_table(folder)))
    )
    for folder in folders:
        if folder.exists():
            remove_warps(folder)


@dataclass(frozen=True)
class _Job:
    """What all rounds of a job share; sent to the workers once."""

    table: Path
    database: str
    tract: Tract
    band: str
    settings: Settings


def _coadd_path(table: Path, patch: str) -> Path:
    return table.with_suffix("") / f"{patch}.fits"


def _warp_folder(table: Path, exposure: str) -> Path:
    """Return the folder of the warps of an exposure on the tract, if they are on disk."""
    return table.parents[2] / "warp" / table.stem / exposure


def run(pool: Pool, spec: Mapping[str, Any]) -> None:
    """Do what `make_tract_coadds` describes, on an open pool."""
    settings = load_settings(spec["settings"])
    skymap = make_skymap(SkymapSettings.model_validate(spec["skymap"]))
    table, tract = Path(spec["table"]), skymap.tract(spec["tract"])
    job = _Job(table, spec["database"], tract, spec["band"], settings.only(*SECTIONS))
    pool.broadcast(job=job)
    with CornerDatabase(job.database) as corners, _open_spool(settings, spec["spool_mb"]) as spool:
        inputs = TractInputs(corners, tract, job.band, settings)
        selections = {patch: inputs.select(patch) for patch in spec["patches"]}
        works = _plan_ccds(job, corners, selections, spool)
        warped = _warp(pool, works)
        _write_all_warps(pool, job, corners, warped)
        corrections = _match(job, selections, warped)
        rows = _coadd(pool, job, inputs, selections, warped, corrections)
    write_coadd_table(table, rows, job.band, tract.id)


def _open_spool(settings: Settings, memory_mb: float) -> Spool:
    """Return the spool that the settings want, with so much memory at most."""
    parallel, coadd = settings.parallel, settings.coadd
    elsewhere = parallel.backend == "mpi" or (
        parallel.backend == "dask" and parallel.dask_address is not None
    )
    scratch = f"{paths.RESULTS}/scratch" if elsewhere else tempfile.gettempdir()
    return Spool(int(1e6 * memory_mb), coadd.scratch or scratch, not elsewhere)


# Round 1: every CCD is warped -------------------------------------------------------------------


@dataclass(frozen=True)
class CcdWork:
    """A CCD that is to be warped."""

    row: CcdRow
    """Its row in the manifest."""
    box: Box
    """The pixels of the tract that it may reach."""
    slot: SpoolSlot
    """Where its warp is kept until the patches are made."""
    thin: int
    """Of the cells in which skies are compared, one in so many is measured."""


@dataclass(frozen=True)
class WarpedCcd:
    """What a worker returns for a CCD."""

    warp: SpooledWarp
    """Its warp; it may have no pixel on the tract."""
    sky: SkyBins | None
    """If skies are matched and it has pixels on the tract."""


Selections = Mapping[str, Selection]
"""What goes into each patch."""

Warped = Mapping[Ccd, WarpedCcd | Failure]


def _wanted(selections: Selections) -> dict[Ccd, CcdRow]:
    """Return the CCDs that some patch wants."""
    ccds = [overlap.ccd for one in selections.values() for overlap in one.selected]
    return {(row.exposure, row.ccd): row for row in ccds}


def _plan_ccds(
    job: _Job, corners: CornerDatabase, selections: Selections, spool: Spool
) -> list[CcdWork]:
    """Find the CCDs that some patch wants, and the pixels of the tract that they reach."""
    wanted = _wanted(selections)
    if job.settings.coadd.keep_warps:
        rows = [row for row in corners.ccds() if ccds_of_patches([row], job.tract)]
        wanted |= {(row.exposure, row.ccd): row for row in rows}
    boxes = {ccd: _predicted_box(wanted[ccd], job.tract) for ccd in sorted(wanted)}
    n_cells = sum(map(_area, boxes.values())) / job.settings.coadd.background_matching.bin_size**2
    thin = max(math.ceil(n_cells / resources.MATCHING_CELLS), 1)
    works = []
    for (exposure, ccd), box in boxes.items():
        slot = spool.reserve(_area(box), f"{exposure}-{ccd}")
        works.append(CcdWork(wanted[exposure, ccd], box, slot, thin))
    _LOG.info(
        "%d CCDs for %d patches; room for their warps: %d MB of memory, %d MB of scratch",
        len(works),
        len(selections),
        spool.in_memory / 1e6,
        spool.on_disk / 1e6,
    )
    return works


def _predicted_box(row: CcdRow, tract: Tract) -> Box:
    """Return a box around the pixels that a CCD may have on a tract."""
    points = tract.footprint_pixels(row.footprint_ra, row.footprint_dec)
    x0, y0 = (int(edge) - _MARGIN for edge in np.floor(points.min(axis=0)))
    x1, y1 = (int(edge) + _MARGIN for edge in np.ceil(points.max(axis=0)))
    return common_box((x0, y0, x1, y1), (0, 0, tract.width, tract.height))


def warp_one(work: CcdWork, worker: Worker) -> WarpedCcd:
    """Read and warp a CCD, and put it into the spool."""
    job: _Job = worker.constants["job"]
    ccd = read_ccd(work.row, job.settings.products.verify_on_read)
    warp = warp_whole_ccd(work.row.ccd, ccd, job.tract, work.box, job.settings.warp)
    spooled, sky = write_warp(work.slot, warp.box, warp.masked_image, warp.ccd_psfs), None
    coadd = job.settings.coadd
    if coadd.background_matching.enabled and warp.n_covered:
        sky = bin_sky(warp, coadd.bad_planes, coadd.background_matching, work.thin)
    return WarpedCcd(spooled, sky)


def _warp(pool: Pool, works: Sequence[CcdWork]) -> Warped:
    """Warp all CCDs, those with the most pixels first."""
    results = _timed_map(
        pool,
        "CCDs warped",
        warp_one,
        works,
        cost=lambda one: _area(one.box),
        memory=lambda one: 1e6 * resources.warped_ccd_memory(one.row.nx * one.row.ny),
        label=lambda one: f"exposure {one.row.exposure} CCD {one.row.ccd}",
        files=lambda one: [FilePart(one.row.path)],
    )
    rows = [work.row for work in works]
    return {(row.exposure, row.ccd): one for row, one in zip(rows, results, strict=True)}


# Warps on disk, if they are wanted --------------------------------------------------------------


@dataclass(frozen=True)
class ExposureWork:
    """The warps of an exposure that are to be written: its CCDs, and those of each patch."""

    exposure: str
    manifest: str
    ccds: dict[int, SpooledWarp]
    patch_ccds: dict[str, list[int]]


def _write_all_warps(pool: Pool, job: _Job, corners: CornerDatabase, warped: Warped) -> None:
    """Write the warps of all exposures of which all CCDs are warped, if they are wanted."""
    if not job.settings.coadd.keep_warps:
        return
    works = []
    for exposure, manifest in corners.manifests().items():
        rows = [row for row in corners.ccds(exposure) if row.state == "done"]
        results = {row.ccd: warped.get((exposure, row.ccd)) for row in rows}
        if any(isinstance(one, Failure) for one in results.values()):
            continue
        ccds = {ccd: one.warp for ccd, one in results.items() if one is not None}
        works.append(ExposureWork(exposure, manifest, ccds, ccds_of_patches(rows, job.tract)))
    results = pool.map(
        write_warps_of,
        works,
        memory=lambda one: (
            1e6 * resources.warp_memory(0, _largest_patch(job.tract, one.patch_ccds))
        ),
        label=lambda one: f"exposure {one.exposure}",
    )
    _raise_if_any(results.failures, len(results), "exposures, their warps on disk")


def write_warps_of(work: ExposureWork, worker: Worker) -> None:
    """Write the warps of an exposure from the spool, as the rule `warp` would."""
    job: _Job = worker.constants["job"]
    cards = provenance_header(job.settings.only(*WARP_SECTIONS).provenance(), [work.manifest])
    compression = job.settings.products.compression
    table = kept_table(_warp_folder(job.table, work.exposure))
    warps = _warps_of(work, job.tract)
    write_warps(table, work.exposure, job.tract, warps, job.settings.warp, cards, compression)


def _warps_of(work: ExposureWork, tract: Tract) -> Iterator[tuple[str, Warp | None]]:
    """Yield the warp of each patch, put together from its CCDs."""
    for patch, numbers in work.patch_ccds.items():
        ccds = {n: work.ccds[n] for n in sorted(numbers)}
        layers = LayeredWarp(list(ccds.values()), tract.patch(patch).outer_box)
        x0, y0, x1, y1 = layers.box
        pixels = MaskedImage.empty((y1 - y0, x1 - x0))
        counts = layers.lay(layers.box, pixels, (0, 0))
        sums = dict(zip(ccds, counts, strict=True))
        yield patch, trim(pixels, layers.box, sums, layers.read_psfs())


# Round 2: skies are matched ---------------------------------------------------------------------


def _match(job: _Job, selections: Selections, warped: Warped) -> dict[str, SkyCorrection] | None:
    """Solve for the corrections of all exposures that some patch wants; None if not wanted."""
    settings = job.settings.coadd.background_matching
    if not settings.enabled:
        return None
    failures = [one for one in warped.values() if isinstance(one, Failure)]
    # without all CCDs the solution would be another one
    _raise_if_any(failures, len(warped), "CCDs, which background matching needs,")
    parts: dict[str, list[SkyBins]] = {}
    for exposure, ccd in sorted(_wanted(selections)):
        sky = warped[exposure, ccd].sky
        parts.setdefault(exposure, []).extend([] if sky is None else [sky])
    skies = {e: merge_bins(ccds) for e, ccds in parts.items() if ccds}
    corrections = match_backgrounds(skies, settings) if skies else {}
    return {exposure: corrections.get(exposure, SkyCorrection((0.0,))) for exposure in parts}


# Round 3: every patch is coadded ----------------------------------------------------------------


def _coadd(
    pool: Pool,
    job: _Job,
    inputs: TractInputs,
    selections: Selections,
    warped: Warped,
    corrections: Mapping[str, SkyCorrection] | None,
) -> list[CoaddRow]:
    """Coadd all patches whose CCDs have been warped, those with the most pixels first."""
    works = [
        _patch_work(job, inputs, patch, number, selection, warped, corrections)
        for number, (patch, selection) in enumerate(selections.items())
    ]
    results = _timed_map(
        pool,
        "patches coadded",
        coadd_one,
        works,
        cost=lambda work: sum(_area(one.reader.box) for one in work.inputs),
        memory=lambda work: 1e6 * _coadd_memory(job, work),
        label=lambda work: work.label if isinstance(work, Failure) else f"patch {work.patch}",
    )
    remove_partial(*(_coadd_path(job.table, patch) for patch in selections))  # of dead workers
    _raise_if_any(results.failures, len(results), "patches")
    return list(results)


def _coadd_memory(job: _Job, work: PatchWork) -> int:
    n_pixels = _largest_patch(job.tract, [work.patch])
    return resources.coadd_memory(n_pixels, len(work.inputs), job.settings.coadd.memory_mb)


def _patch_work(
    job: _Job,
    inputs: TractInputs,
    patch: str,
    number: int,
    selection: Selection,
    warped: Warped,
    corrections: Mapping[str, SkyCorrection] | None,
) -> PatchWork | Failure:
    """Return what is to be done for a patch, or why it cannot be done."""
    results: dict[str, list[WarpedCcd]] = {}
    for overlap in selection.selected:
        result = warped[overlap.ccd.exposure, overlap.ccd.ccd]
        if isinstance(result, Failure):
            return replace(result, index=number, label=f"patch {patch}: {result.label}")
        results.setdefault(overlap.ccd.exposure, []).append(result)
    outer = job.tract.patch(patch).outer_box

    def reader_of(exposure: str) -> LayeredWarp:
        return LayeredWarp([one.warp for one in results[exposure]], outer)

    return inputs.work(patch, selection, reader_of, corrections)


def coadd_one(work: PatchWork, worker: Worker) -> CoaddRow:
    """Coadd a patch from the spool and write it; return its row in the list."""
    job: _Job = worker.constants["job"]
    path = _coadd_path(job.table, work.patch)
    coadd, checksum = write_patch(path, work, job.database, job.tract, job.band, job.settings)
    return CoaddRow(
        patch=work.patch,
        path=path.relative_to(job.table.parent).as_posix(),
        sha256=checksum,
        n_exposures=int(np.count_nonzero(coadd.inputs["n_used"])),
        n_left_out=len(work.rejected),
        covered=round(float(np.mean(coadd.n_inputs > 0)), 6),
        most_inputs=int(coadd.n_inputs.max(initial=0)),
    )


# Both rounds ------------------------------------------------------------------------------------


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _largest_patch(tract: Tract, patches: Iterable[str]) -> int:
    """Return the pixels of the largest of some patches, with their borders; 0 of none."""
    return max((_area(tract.patch(patch).outer_box) for patch in patches), default=0)


def _timed_map(
    pool: Pool, what: str, function: Function, works: Sequence[Any], **options: Any
) -> Results:
    """Scatter, and log how long it took and which part of that the workers had work."""
    started, busy = time.monotonic(), pool.busy
    results = pool.map(function, works, **options)
    wall, busy = time.monotonic() - started, pool.busy - busy
    _LOG.info(
        "%d of %d %s in %.1f s; workers idle for %.0f %% of it",
        len(results) - len(results.failures),
        len(results),
        what,
        wall,
        100.0 * max(1.0 - busy / max(wall * len(pool.processes), 1e-9), 0.0),
    )
    return results


def _raise_if_any(failures: Sequence[Failure], n_items: int, what: str) -> None:
    """End the job if some items have failed, with a message that names them.

    Raises
    ------
    CoaddflowError
        If all of them have to do with the data: another attempt would fail in the same way.
    PoolError
        If a worker died, or something else happened that was not expected.
    """
    if not failures:
        return
    for failure in failures:
        _LOG.error("%s\n%s", failure, failure.traceback)
    examples = "; ".join(f"{one.label}: {_reason(one)}" for one in failures[:_TOLD])
    more = f"; and {len(failures) - _TOLD} more" if len(failures) > _TOLD else ""
    text = f"{len(failures)} of {n_items} {what} failed, the others are done: {examples}{more}"
    if all(is_lasting(one.error) for one in failures):
        raise CoaddflowError(text)
    raise PoolError(text)


def _reason(failure: Failure) -> str:
    return failure.message if failure.error is not None else f"{failure.type}: {failure.message}"
