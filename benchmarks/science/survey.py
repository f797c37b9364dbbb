"""The survey of the yardstick: simulated, processed by the workflow, and coadded by SWarp."""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml
from astropy.io import fits
from astropy.table import Table
from truth import saturation_magnitude

from coaddflow.errors import InputError
from coaddflow.geometry import sphere
from coaddflow.image.masked_image import MaskedImage
from coaddflow.instrument.camera import Camera, load_camera
from coaddflow.qa.swarp import find_swarp, run_swarp, write_weights
from coaddflow.settings import load_settings
from coaddflow.simulate.frames import Exposing
from coaddflow.simulate.observations import plan_observations
from coaddflow.simulate.optics import field_radius
from coaddflow.simulate.settings import SimulationSettings, load_simulation_settings
from coaddflow.simulate.streams import stream
from coaddflow.skymap.tangent import TangentSkyMap
from coaddflow.skymap.tract import Tract
from coaddflow.tables.manifest import CcdRow, read_manifest

REPOSITORY = Path(__file__).resolve().parents[2]
CENTRE = (150.1, 2.2)
SWARP_KINDS = ("WEIGHTED", "CLIPPED")


@dataclass
class Survey:
    """A survey that is complete in its folder."""

    folder: Path
    settings: SimulationSettings
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Wall and CPU time of each step, s."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the figures must know."""

    @property
    def results(self) -> Path:
        """Products of the workflow."""
        return self.folder / "results"

    @cached_property
    def camera(self) -> Camera:
        """The camera of the file."""
        return load_camera(self.settings.camera)

    @cached_property
    def exposing(self) -> dict[str, Exposing]:
        """The true optics of each science exposure."""
        plan = plan_observations(self.settings, self.camera, field_radius(self.camera))
        science = [one for one in plan if one.kind == "science"]
        return {one.exposure: Exposing.prepare(self.settings, self.camera, one) for one in science}

    @cached_property
    def rows(self) -> list[CcdRow]:
        """The CCDs of all exposures, from the manifests."""
        paths = sorted((self.results / "summary").glob("*.ecsv"))
        return [row for path in paths for row in read_manifest(path)]

    @cached_property
    def truth(self) -> Table:
        """All true sources."""
        return Table.read(self.folder / "data/truth/sources.fits")

    @cached_property
    def tract(self) -> Tract:
        """The pixels of the coadds."""
        config = yaml.safe_load((self.folder / "config.yaml").read_text("utf-8"))
        return TangentSkyMap(load_settings(config).skymap).tract(0)

    def done(self, band: str) -> list[CcdRow]:
        """Return the CCDs of a band that have a calexp."""
        return [row for row in self.rows if row.state == "done" and row.band == band]

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Note the wall and CPU time of a step, children included."""
        wall, cpu = time.monotonic(), _cpu_seconds()
        yield
        self.seconds[step] = (time.monotonic() - wall, _cpu_seconds() - cpu)
        record = json.dumps(self.seconds)
        (self.folder / "seconds.json").write_text(record, encoding="utf-8")
        print(
            f"{step}: {self.seconds[step][0]:.0f} s, CPU {self.seconds[step][1]:.0f} s", flush=True
        )

    def read_seconds(self) -> None:
        """Read the times of steps that were done before."""
        path = self.folder / "seconds.json"
        if path.is_file():
            self.seconds = {k: tuple(v) for k, v in json.loads(path.read_text("utf-8")).items()}


def _cpu_seconds() -> float:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(one.ru_utime + one.ru_stime for one in map(resource.getrusage, kinds))


def make_survey(arguments: argparse.Namespace) -> Survey:
    """Simulate the survey and run the workflow on it, as far as this is not done."""
    folder = arguments.folder.resolve()
    if arguments.measure_only:
        record = folder / "data/simulation.yaml"
        if not record.is_file():
            raise InputError("holds no finished survey", folder, "leave out --measure-only")
        survey = Survey(folder, load_simulation_settings(record))
        survey.read_seconds()
    else:
        folder.mkdir(parents=True, exist_ok=True)
        survey = Survey(folder, simulation(arguments))
        survey.read_seconds()
        _write_config(survey, arguments)
        _simulate(survey, arguments)
        _process(survey, arguments)
    return survey


def simulation(arguments: argparse.Namespace) -> SimulationSettings:
    """Return the settings of the simulated survey."""
    air = arguments.atmosphere
    bands = {
        "g": {"zero_point": 25.6, "sky": 21.8, "color": 1.0},
        "r": {"zero_point": 25.6, "sky": 21.0, "color": 0.0},
    }
    exposing = {"exposures": arguments.exposures, "exposure_time": arguments.exposure_time}
    content = {
        "seed": arguments.seed,
        "camera": arguments.camera,
        "ra": CENTRE[0],
        "dec": CENTRE[1],
        "ccds": arguments.ccds,
        "bands": {band: bands[band] | exposing for band in arguments.bands},
        "survey": {"dither": 40.0, "rotation_step": 3.0},
        "stars": {"density": arguments.density, "brightest": 15.0},
        "galaxies": {"density": arguments.galaxies},
        "psf": {
            "profile": arguments.psf,
            "seeing": arguments.seeing,
            "seeing_scatter": arguments.seeing_scatter,
        },
        "optics": {"distortion": not arguments.no_distortion},
        "atmosphere": {
            "turbulence": 10.0 * air,
            "zenith_distance": min(45.0 * air, 70.0),
            "dispersion": 8.0 * air,
            "seeing_structure": 0.01 * air,
            "shear_structure": 0.005 * air,
        },
        "cosmic_rays": {"rate": arguments.cosmic_rays},
        "truth_pixels": True,
    }
    settings = SimulationSettings.model_validate(content)
    return settings.model_copy(update={"sources": _saturated(settings, arguments.saturated)})


def _saturated(settings: SimulationSettings, density: float) -> tuple:
    """Return stars of up to 3.5 magnitudes above saturation, at random places of the field."""
    camera = load_camera(settings.camera)
    limit = min(saturation_magnitude(settings, camera, band) for band in settings.bands)
    rng = stream(settings.seed, "saturated stars")
    ids = settings.ccds or [one.id for one in camera.detectors]
    pixels = sum(np.prod(camera.detector(one).size) for one in ids)
    n = round(density * pixels * (camera.pixel_scale / 60.0) ** 2)
    sources = []
    for index in range(n):
        detector = camera.detector(ids[index % len(ids)])
        x, y = rng.uniform(0.1, 0.9, 2) * detector.size
        ra, dec = camera.pixel_to_sky(detector, x, y, settings.ra, settings.dec, 0.0)
        magnitude = limit - 3.5 * (index + 0.5) / n
        sources.append(
            {"ra": float(ra), "dec": float(dec), "magnitude": float(magnitude), "color": 0.0}
        )
    return SimulationSettings.model_validate({"sources": sources}).sources


def _write_config(survey: Survey, arguments: argparse.Namespace) -> None:
    camera, settings = survey.camera, survey.settings
    config = {
        "camera": str(Path(arguments.camera).resolve())
        if Path(arguments.camera).is_file()
        else arguments.camera,
        "exposures": "data/exposures.ecsv",
        "refcat": {
            "path": "data/refcat.fits",
            "bands": {
                band: {"magnitude": f"mag_{band}", "error": f"mag_{band}_err"}
                for band in settings.bands
            },
        },
        "skymap": _skymap(survey),
        "coadd": {"keep_warps": False},
        "parallel": {"calexp": "exposure", "coadd": "tract", "workers": arguments.jobs},
    }
    if settings.ccds is not None:
        absent = [one.id for one in camera.detectors if one.id not in settings.ccds]
        config["exclude_ccds"] = absent
    if arguments.config is not None:
        config = _merged(config, yaml.safe_load(arguments.config.read_text("utf-8")) or {})
    text = yaml.safe_dump(config, sort_keys=False)
    (survey.folder / "config.yaml").write_text(text, encoding="utf-8")


def _skymap(survey: Survey) -> dict:
    """Return a tangent tract that holds all CCDs of all exposures."""
    ra, dec = (np.concatenate(one) for one in zip(*_outlines(survey), strict=True))
    xi, eta = sphere.tan_project(ra, dec, *CENTRE)
    size = {"width": 2.0 * np.abs(xi).max(), "height": 2.0 * np.abs(eta).max()}
    tangent = {"ra": CENTRE[0], "dec": CENTRE[1], **{k: float(v) for k, v in size.items()}}
    return {"kind": "tangent", "pixel_scale": survey.camera.pixel_scale, "tangent": tangent}


def _outlines(survey: Survey) -> Iterator[tuple]:
    for exposing in survey.exposing.values():
        seen, camera = exposing.observation, exposing.optics.camera
        for detector in camera.detectors:
            if survey.settings.ccds is None or detector.id in survey.settings.ccds:
                x, y = (np.array([0, 0, n - 1, n - 1]) for n in detector.size)
                y = np.roll(y, 1)
                yield camera.pixel_to_sky(detector, x, y, seen.ra, seen.dec, seen.rotation)


def _merged(config: dict, changes: dict) -> dict:
    merged = dict(config)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _simulate(survey: Survey, arguments: argparse.Namespace) -> None:
    data = survey.folder / "data"
    if (data / "exposures.ecsv").is_file() and (data / "simulation.yaml").is_file():
        if load_simulation_settings(data / "simulation.yaml") != survey.settings:
            raise InputError(
                "holds a survey with other arguments", survey.folder, "remove it, or give another"
            )
        return
    content = survey.settings.model_dump(mode="json")
    record = survey.folder / "survey.yaml"
    record.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    with survey.timed("simulate"):
        processes = ("--processes", str(arguments.jobs))
        _coaddflow(survey, "simulate", "survey.yaml", "data", *processes)
    with survey.timed("ingest"):
        _coaddflow(survey, "ingest", "data/raw")


def _coaddflow(survey: Survey, *arguments: str) -> None:
    _run(survey, [sys.executable, "-m", "coaddflow", *arguments])


def _process(survey: Survey, arguments: argparse.Namespace) -> None:
    """Run the workflow; a second time it finds nothing to do."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile")]
    command += ["--cores", str(arguments.jobs), "--quiet", "rules", "host", "reason"]
    complete = survey.folder / "complete"
    with survey.timed("workflow" if not complete.is_file() else "workflow again"):
        _run(survey, command)
    complete.touch()


def _run(survey: Survey, command: list[str]) -> None:
    log = survey.folder / "science.log"
    source = str(REPOSITORY / "src")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    }
    with log.open("ab") as stream_:
        ended = subprocess.run(
            command, check=False, cwd=survey.folder, stdout=stream_, stderr=stream_, env=environment
        )
    if ended.returncode != 0:
        tail = log.read_text("utf-8", errors="replace").strip().splitlines()[-3:]
        raise InputError(f"{' '.join(command[2:5])} failed: {' '.join(tail)}", log, "read it")


def swarp_coadds(survey: Survey, band: str) -> dict[str, MaskedImage]:
    """Return SWarp's coadds of a band on the pixels of the tract; none if it is not installed."""
    if find_swarp() is None:
        note = "SWarp is not installed (Debian: package swarp): its rows are left out"
        if note not in survey.notes:
            survey.notes.append(note)
        return {}
    coadds = {}
    calexps = [survey.folder / row.path for row in survey.done(band)]
    folder = survey.folder / "swarp" / band
    folder.mkdir(parents=True, exist_ok=True)
    with survey.timed(f"SWarp weights {band}"):
        weights = write_weights(calexps, sky_weights(survey, band), folder)
    for kind in SWARP_KINDS:
        with survey.timed(f"SWarp {kind} {band}"):
            coadds[kind] = run_swarp(calexps, weights, _tract_header(survey.tract), kind, folder)
    shutil.rmtree(folder)
    return coadds


def sky_weights(survey: Survey, band: str) -> dict[str, float]:
    """Return the inverse sky variance of each exposure, nJy^-2, median over its CCDs."""
    noise: dict[str, list[float]] = {}
    for row in survey.done(band):
        noise.setdefault(row.exposure, []).append(
            row.sky_noise * 10.0 ** (0.4 * (31.4 - row.zero_point))
        )
    return {exposure: float(np.median(values)) ** -2 for exposure, values in noise.items()}


def _tract_header(tract: Tract) -> fits.Header:
    header = tract.wcs().to_header()
    header["NAXIS"], header["NAXIS1"], header["NAXIS2"] = 2, tract.width, tract.height
    return header
