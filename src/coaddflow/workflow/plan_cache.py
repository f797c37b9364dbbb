"""What of a plan takes time to work out, kept in a file under a checksum of its causes."""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coaddflow import __version__
from coaddflow.errors import InputError
from coaddflow.files import atomic_path
from coaddflow.settings import Settings
from coaddflow.tables.exposures import ExposureRow, ImageRow

if TYPE_CHECKING:
    from coaddflow.instrument.camera import Camera

PLAN_CACHE = Path(".snakemake") / "coaddflow" / "plan.json"

_FIT_MARGIN = 0.05
"""Largest margin of a fitted tract around its exposures, as a fraction of the field's radius."""

PACKAGE = Path(__file__).parents[1]

PLAN_SOURCES = (
    "errors.py",
    "fence.py",
    "files.py",
    "settings",
    "geometry",
    "tables",
    "instrument",
    "skymap",
    "workflow/names.py",
    "workflow/plan.py",
    "workflow/plan_cache.py",
    "workflow/stages.py",
)
"""Modules and packages that make the plan, below `PACKAGE`: other sources, other plans."""


def cached(
    settings: Settings,
    science: Mapping[str, ExposureRow],
    images: Mapping[str, Mapping[int, ImageRow]],
    cache: str | Path | None,
) -> dict:
    """Return camera facts, sky map and overlaps, from the cache if nothing has changed."""
    key = _checksum(settings, science, images)
    if cache is not None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(Path(cache).read_text(encoding="utf-8"))
            if kept["key"] == key:
                return kept["plan"]
    worked_out = _work_out(settings, science, images)
    if cache is not None:
        # a run that cannot keep its plan works it out again
        with contextlib.suppress(InputError, OSError), atomic_path(cache) as temporary:
            temporary.write_text(json.dumps({"key": key, "plan": worked_out}), encoding="utf-8")
    return worked_out


def plan_sources() -> list[Path]:
    """Return the source files that make the plan, in order."""
    found = (PACKAGE / name for name in PLAN_SOURCES)
    return [
        source
        for path in found
        for source in (sorted(path.rglob("*.py")) if path.is_dir() else [path])
    ]


def _checksum(
    settings: Settings,
    science: Mapping[str, ExposureRow],
    images: Mapping[str, Mapping[int, ImageRow]],
) -> str:
    """Return a checksum of everything that decides what is worked out."""
    digest = hashlib.sha256(__version__.encode())
    for source in plan_sources():
        digest.update(source.read_bytes())
    relevant = settings.model_dump_json(include={"skymap", "prediction", "exclude_ccds"})
    digest.update(relevant.encode())
    if settings.camera is not None:
        from coaddflow.instrument.camera import camera_file

        digest.update(camera_file(settings.camera).read_bytes())
    for row in science.values():
        digest.update(repr((row.exposure, row.ra, row.dec, row.rotation)).encode())
    for ccds in images.values():
        for row in ccds.values():
            digest.update(repr((*row.key, row.footprint_ra, row.footprint_dec)).encode())
    return digest.hexdigest()


def _work_out(
    settings: Settings,
    science: Mapping[str, ExposureRow],
    images: Mapping[str, Mapping[int, ImageRow]],
) -> dict:
    """Return the CCDs of the camera, the sky map, and which exposure can touch which patch."""
    from coaddflow.instrument.camera import load_camera
    from coaddflow.instrument.footprint import predicted_footprints
    from coaddflow.skymap.coverage import predicted_overlaps, predicted_overlaps_of_images
    from coaddflow.skymap.maps import make_skymap

    camera = load_camera(settings.camera) if settings.camera is not None else None
    margin = settings.prediction.margin
    rows = [row for ccds in images.values() for row in ccds.values()]
    footprints = [(row.footprint_ra, row.footprint_dec) for row in rows]
    names = [row.exposure for row in rows]
    if camera is not None:
        footprints += predicted_footprints(science.values(), camera, _fit_margin(camera, margin))
        names += [row.exposure for row in science.values()]
    scale = camera.pixel_scale if camera is not None else _scale_of_images(images)
    skymap = make_skymap(settings.skymap, footprints, scale, names)
    overlaps = predicted_overlaps_of_images(rows, skymap)
    if camera is not None:
        overlaps |= predicted_overlaps(science.values(), camera, skymap, margin)
    between_ccds = [link.changed() for link in camera.crosstalk] if camera is not None else []
    return {
        "ccds": _ccds(camera, settings.exclude_ccds) if camera is not None else {},
        "camera_ccds": [d.id for d in camera.detectors] if camera is not None else [],
        "crosstalk": _fingerprint(between_ccds) if between_ccds else "",
        "skymap": skymap.settings.model_dump(mode="json"),
        "overlaps": overlaps,
    }


def _fit_margin(camera: "Camera", margin: float) -> float:
    """Return by how much a fitted tract reaches beyond its exposures, degrees.

    With the whole margin of the prediction, which allows for pointings that are far off, most
    patches of a small camera would lie where no exposure is.
    """
    from coaddflow.instrument.footprint import field_radius

    return min(margin, _FIT_MARGIN * field_radius(camera))


def _scale_of_images(images: Mapping[str, Mapping[int, ImageRow]]) -> float:
    """Return the median pixel scale of images calibrated elsewhere, arcsec, to three digits."""
    from coaddflow.geometry.sphere import separation

    scales = sorted(
        float(
            separation(
                row.footprint_ra[0], row.footprint_dec[0], row.footprint_ra[1], row.footprint_dec[1]
            )
        )
        * 3600.0
        / row.nx
        for ccds in images.values()
        for row in ccds.values()
    )
    return float(f"{scales[len(scales) // 2]:.3g}")


def _fingerprint(values: list) -> str:
    """Return a checksum of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _ccds(camera, exclude: Sequence[int]) -> dict[int, dict]:
    """Return the planning data of each CCD, as plain values."""
    unrelated = ("detectors", "description", "header", "crosstalk")
    common = {key: value for key, value in camera.changed().items() if key not in unrelated}
    return {
        detector.id: {
            "size": detector.size,
            "extension": str(detector.extension),
            "fingerprint": _fingerprint([common, detector.changed()]),
        }
        for detector in camera.detectors
        if detector.id not in exclude
    }
