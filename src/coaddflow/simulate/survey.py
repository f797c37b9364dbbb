"""The whole simulated survey: raw files, reference catalogue and truth, in one folder.

raw/                         raw files, as the camera writes them
refcat.fits                  reference catalogue
truth/sources.fits           all stars and galaxies
truth/exposures.ecsv         pointing, PSF, clouds, trail of every exposure
truth/camera.yaml            where the CCDs really are
truth/cosmic_rays/{id}.fits  pixels of cosmic rays, if asked for
simulation.yaml              the settings; written last
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from astropy.io import fits
from astropy.table import Table
from numpy.typing import NDArray

from coaddflow.errors import InputError
from coaddflow.files import atomic_path
from coaddflow.geometry import sphere
from coaddflow.instrument.camera import Camera, load_camera
from coaddflow.pool import Pool, Worker
from coaddflow.simulate.drawing import load_galsim
from coaddflow.simulate.frames import ExposedCcd, Exposing, expose_ccd, read_out
from coaddflow.simulate.observations import Observation, exposure_table, plan_observations
from coaddflow.simulate.optics import field_radius, true_camera
from coaddflow.simulate.settings import SimulationSettings, load_simulation_settings
from coaddflow.simulate.sky import SkyCatalogue, join, reference_catalogue, sky_around, truth_table
from coaddflow.simulate.writer import Arrays, raw_name, write_ccd, write_exposure

Progress = Callable[[int, int, str], None]
"""Called with the number of pieces done, their total, and the name of the last."""

_PIECES_AT_ONCE = 8  # for each worker


@dataclass(frozen=True)
class Simulated:
    """A simulated survey; ``n_files`` is 0 if it was there already."""

    folder: Path
    observations: tuple[Observation, ...]
    n_files: int


@dataclass(frozen=True)
class _Piece:
    """What one process does at a time: CCDs of an exposure that belong together."""

    observation: Observation
    ccds: tuple[int, ...]


def run_simulation(
    settings: SimulationSettings,
    folder: str | Path,
    processes: int = 1,
    progress: Progress | None = None,
) -> Simulated:
    """Simulate a survey.

    The pixels follow from the settings alone, whatever the number of processes. A folder that holds
    the survey of just these settings already is left as it is.

    Parameters
    ----------
    folder : str or Path
        Where it goes; made if it is not there.
    processes : int
        Processes that work side by side.
    progress : callable, optional
        Told after each piece of work.

    Raises
    ------
    InputError
        If GalSim is missing, the camera is unknown, the folder holds something else, or the disk
        is full.
    """
    folder = Path(folder)
    camera = load_camera(settings.camera)
    observations = tuple(plan_observations(settings, camera, field_radius(camera)))
    _check_ids(observations)
    if _is_done(folder, settings):
        return Simulated(folder, observations, 0)
    load_galsim()
    pieces = [
        _Piece(observation, ccds)
        for observation in observations
        for ccds in _groups(settings, camera)
    ]
    n_files = _simulate_all(settings, folder, pieces, processes, progress)
    _write_truth(settings, camera, folder, observations)
    with atomic_path(folder / "simulation.yaml") as temporary:
        temporary.write_text(_settings_text(settings), encoding="utf-8")
    return Simulated(folder, observations, n_files)


def _settings_text(settings: SimulationSettings) -> str:
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def _is_done(folder: Path, settings: SimulationSettings) -> bool:
    """Tell whether the survey is there; raise InputError if the folder holds another one."""
    record = folder / "simulation.yaml"
    if record.is_file():
        # compared as settings: a survey made before there was some effect is still the same
        if load_simulation_settings(record) == settings:
            return True
        raise InputError(
            "holds a survey that was simulated with other settings",
            path=folder,
            remedy="remove the folder, or give another one",
        )
    known = {"raw", "truth", "refcat.fits"}
    if folder.exists() and not folder.is_dir():
        raise InputError("is not a folder", path=folder, remedy="give the name of a new folder")
    strangers = [path.name for path in folder.glob("*") if path.name not in known]
    if strangers:
        raise InputError(
            f"holds other things ({', '.join(sorted(strangers)[:3])})",
            path=folder,
            remedy="give a folder that is empty or new",
        )
    return False


def _check_ids(observations: tuple[Observation, ...]) -> None:
    ids = [observation.exposure for observation in observations]
    twice = sorted({one for one in ids if ids.count(one) > 1})
    if twice:
        raise InputError(
            f"exposure id {twice[0]!r} would occur twice",
            remedy="set the first numbers of each kind farther apart (numbers)",
        )


def _groups(settings: SimulationSettings, camera: Camera) -> list[tuple[int, ...]]:
    """Return the CCDs that one piece of work simulates together."""
    ccds = tuple(
        detector.id
        for detector in camera.detectors
        if settings.ccds is None or detector.id in settings.ccds
    )
    for ccd in settings.ccds or ():
        camera.detector(ccd)
    if camera.layout.files == "ccd" and not camera.crosstalk:
        return [(ccd,) for ccd in ccds]
    return [ccds]


def _simulate_all(
    settings: SimulationSettings,
    folder: Path,
    pieces: list[_Piece],
    processes: int,
    progress: Progress | None,
) -> int:
    """Simulate all pieces and return the number of raw files written."""
    n_files = 0
    workers = max(min(processes, len(pieces)), 1)
    with Pool("processes" if workers > 1 else "serial", workers) as pool:
        pool.broadcast(settings=settings, folder=folder)
        # in parts: a full disk is noticed before the rest of a large survey is simulated
        for start in range(0, len(pieces), _PIECES_AT_ONCE * workers):
            results = pool.map(
                _simulate,
                pieces[start : start + _PIECES_AT_ONCE * workers],
                label=lambda piece: f"exposure {piece.observation.exposure}",
                progress=progress and _from(start, len(pieces), progress),
            )
            for failure in results.failures:
                failure.raise_again()
            n_files += sum(results)
    return n_files


def _from(start: int, total: int, progress: Progress) -> Progress:
    """Return a progress of the pieces after the first ``start`` that counts all pieces."""
    return lambda done, _, label: progress(start + done, total, label)


def _simulate(piece: _Piece, worker: Worker) -> int:
    """Simulate some CCDs of an exposure, write their files, and return the number of these."""
    settings, folder = worker.constants["settings"], worker.constants["folder"]
    observation = piece.observation
    camera = load_camera(settings.camera)
    exposing = Exposing.prepare(settings, camera, observation)
    raw = folder / "raw"
    name = raw_name(camera, observation, settings.compression)
    exposure: dict[int, Arrays] = {}
    hits: list[tuple[int, tuple[NDArray, ...]]] = []
    for exposed, arrays in _read_in_turn(exposing, piece.ccds):
        hits.append((exposed.detector.id, exposed.cosmic_rays))
        if camera.layout.files == "ccd":
            write_ccd(raw, name, camera, observation, exposed.detector, arrays)
        else:
            exposure[exposed.detector.id] = arrays
    if settings.truth_pixels and observation.kind == "science":
        _write_cosmic_rays(folder, piece, hits)
    if camera.layout.files == "ccd":
        return len(piece.ccds)
    in_order = {ccd: exposure[ccd] for ccd in piece.ccds}
    write_exposure(raw, name, camera, observation, in_order)
    return 1


def _read_in_turn(exposing: Exposing, ccds: tuple[int, ...]) -> Iterator[tuple[ExposedCcd, Arrays]]:
    """Expose and read CCDs one by one; aggressors of crosstalk are kept until all are read.

    A camera without crosstalk between CCDs needs the memory of one CCD.
    """
    links = exposing.optics.camera.crosstalk if exposing.settings.detector.crosstalk else ()
    links = [one for one in links if one.aggressor[0] in ccds and one.victim[0] in ccds]
    kept = {ccd: expose_ccd(exposing, ccd) for ccd in sorted({one.aggressor[0] for one in links})}
    for ccd in ccds:
        exposed = kept.get(ccd) or expose_ccd(exposing, ccd)
        others = [
            (
                _position(exposed, one.victim[1]),
                one.coefficient,
                kept[one.aggressor[0]].counts[_position(kept[one.aggressor[0]], one.aggressor[1])],
            )
            for one in links
            if one.victim[0] == ccd
        ]
        yield exposed, read_out(exposing, exposed, others)


def _position(exposed: ExposedCcd, amplifier: str) -> int:
    names = [one.name for one in exposed.detector.amplifiers]
    if amplifier not in names:
        raise InputError(f"CCD {exposed.detector.id} has no amplifier {amplifier!r} (crosstalk)")
    return names.index(amplifier)


def _write_truth(
    settings: SimulationSettings,
    camera: Camera,
    folder: Path,
    observations: tuple[Observation, ...],
) -> None:
    sky = _whole_sky(settings, camera, observations)
    _write_table(truth_table(settings, sky), folder / "truth" / "sources.fits", "SOURCES")
    _write_table(reference_catalogue(settings, sky), folder / "refcat.fits", "REFCAT")
    with atomic_path(folder / "truth" / "exposures.ecsv") as temporary:
        exposure_table(list(observations)).write(temporary, format="ascii.ecsv", overwrite=True)
    with atomic_path(folder / "truth" / "camera.yaml") as temporary:
        content = true_camera(camera, settings).model_dump(mode="json")
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _whole_sky(
    settings: SimulationSettings, camera: Camera, observations: tuple[Observation, ...]
) -> SkyCatalogue:
    """Return all sources that any exposure can see, each once."""
    radius = 1.1 * field_radius(camera) * camera.degrees_per_mm
    pointings = {(seen.ra, seen.dec) for seen in observations if seen.kind == "science"}
    pointings = pointings or {(settings.ra, settings.dec)}
    parts = [sky_around(settings, ra, dec, radius) for ra, dec in sorted(pointings)]
    sky = join(parts)
    sky = sky.select(np.unique(sky.id, return_index=True)[1])
    near = np.zeros(len(sky), dtype=bool)
    for ra, dec in pointings:
        near |= sphere.separation(sky.ra, sky.dec, ra, dec) < radius
    return sky.select(near | (sky.id < len(settings.sources)))


def _write_table(table: Table, path: Path, name: str) -> None:
    hdu = fits.table_to_hdu(table)
    hdu.name = name
    with atomic_path(path) as temporary:
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(temporary, overwrite=True)


def _write_cosmic_rays(
    folder: Path, piece: _Piece, hits: list[tuple[int, tuple[NDArray, ...]]]
) -> None:
    table = Table()
    table["ccd"] = np.concatenate([np.full(len(hit[0]), ccd, np.int32) for ccd, hit in hits])
    for column, name in enumerate(("x", "y", "electrons")):
        kind = np.float32 if name == "electrons" else np.int32
        table[name] = np.concatenate([hit[column] for _, hit in hits]).astype(kind)
    name = piece.observation.exposure
    if len(piece.ccds) == 1:
        name = f"{name}-{piece.ccds[0]:03d}"
    _write_table(table, folder / "truth" / "cosmic_rays" / f"{name}.fits", "CRPIXELS")
