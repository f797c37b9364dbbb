"""The camera: where its detectors are, how they are read out, how its files look.

A camera is a YAML file (see ``cameras/`` for those that come with coaddflow, and
``docs/cameras.md`` for how to write one); nothing about an instrument stands in the code.

Focal plane coordinates are millimetres. With the camera at rotation 0 the focal plane's +y points
north and its +x west, as on the sky seen from inside (or east, for a camera with ``flip_x``).
The rotation of an exposure is the position angle of +y, from north through east.

References
----------
.. [1] Calabretta & Greisen 2002, A&A 395, 1077 (gnomonic projection).
.. [2] Shupe et al. 2005, ASP Conf. Ser. 347, 491 (SIP).
"""

import functools
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, ValidationError, model_validator

from coaddflow.errors import InputError, did_you_mean
from coaddflow.files import atomic_path
from coaddflow.geometry import sphere
from coaddflow.geometry.box import Box
from coaddflow.instrument.file_layout import FileLayout, HeaderMap
from coaddflow.settings.base import Section

FloatArray = NDArray[np.float64]

AmplifierId = tuple[int, str]
"""CCD and amplifier."""


class Amplifier(Section):
    """One readout channel of a detector."""

    name: str = Field(description="Name of the amplifier, unique on its detector.")
    data: Box = Field(description="Light-sensitive pixels in the raw array.")
    target: Box = Field(description="Position of these pixels on the assembled CCD.")
    overscan: Box | None = Field(
        None, description="Overscan pixels in the raw array, which give the bias level."
    )
    prescan: Box | None = Field(None, description="Prescan pixels in the raw array; not used.")
    flip_x: bool = Field(False, description="Raw columns run opposite to those of the CCD.")
    flip_y: bool = Field(False, description="Raw rows run opposite to those of the CCD.")
    read_from: Literal["ll", "lr", "ul", "ur"] | None = Field(
        None,
        description="Corner of `target` that is read first (lower/upper, left/right); null: the "
        "one that comes first in the raw array.",
    )
    extension: str | int | None = Field(
        None, description="HDU of this amplifier, if each has its own."
    )
    gain: float = Field(gt=0, description="Gain, electrons per count (ADU).")
    read_noise: float = Field(ge=0, description="Read noise, electrons.")
    saturation: float = Field(gt=0, description="Saturation level, raw counts (ADU).")
    linearity: tuple[float, ...] = Field(
        (), description="c2, c3, ...: true = z + c2 z^2 + c3 z^3 ... for z counts above the bias."
    )
    gain_keyword: str | None = Field(None, description="Header keyword that overrides `gain`.")
    read_noise_keyword: str | None = Field(
        None, description="Header keyword that overrides `read_noise`."
    )
    saturation_keyword: str | None = Field(
        None, description="Header keyword that overrides `saturation`."
    )

    @property
    def read_reversed(self) -> tuple[bool, bool]:
        """Whether the amplifier is read against the columns (x) and the rows (y) of the CCD."""
        if self.read_from is None:
            return self.flip_x, self.flip_y
        return self.read_from[1] == "r", self.read_from[0] == "u"


class Detector(Section):
    """One CCD: its position in the focal plane and its amplifiers."""

    id: int = Field(ge=0, description="Number of the CCD, unique in the camera.")
    name: str = Field(description="Name of the CCD, such as S29.")
    extension: str | int = Field(
        description="HDU name or number in the file of the exposure; with one file per CCD, the "
        "text that replaces {ccd} in the file name."
    )
    center: tuple[float, float] = Field(description="Focal-plane position of the centre, mm.")
    rotation: float = Field(
        0.0, description="Rotation of the pixel axes in the focal plane, degrees, from +x to +y."
    )
    size: tuple[int, int] = Field(description="Pixels (nx, ny) of the assembled CCD.")
    raw_size: tuple[int, int] | None = Field(
        None,
        description="Columns and rows of the raw array, which files must have; null: at least the "
        "extent of the amplifiers' sections, and less than twice of it.",
    )
    amplifiers: tuple[Amplifier, ...] = Field(min_length=1, description="The readout channels.")
    defects: tuple[Box, ...] = Field((), description="Boxes of bad pixels on the assembled CCD.")
    crosstalk: tuple[tuple[float, ...], ...] | None = Field(
        None,
        description="Crosstalk matrix of the CCD, as fractions of the aggressor's counts: rows are "
        "victims, columns aggressors, in the order of `amplifiers`.",
    )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (ny, nx) of the assembled CCD."""
        return self.size[1], self.size[0]

    @model_validator(mode="after")
    def _check(self) -> "Detector":
        nx, ny = self.size
        for amplifier in self.amplifiers:
            x0, y0, x1, y1 = amplifier.target
            if not (0 <= x0 < x1 <= nx and 0 <= y0 < y1 <= ny):
                raise ValueError(
                    f"amplifier {amplifier.name}: target {amplifier.target} is not inside "
                    f"the CCD of {nx} x {ny} pixels"
                )
            if _box_size(amplifier.data) != _box_size(amplifier.target):
                raise ValueError(
                    f"amplifier {amplifier.name}: data {amplifier.data} and target "
                    f"{amplifier.target} differ in size"
                )
        n = len(self.amplifiers)
        if self.crosstalk is not None and [len(row) for row in self.crosstalk] != [n] * n:
            raise ValueError(f"detector {self.id}: crosstalk is not a {n} x {n} matrix")
        return self


class Crosstalk(Section):
    """Crosstalk from one amplifier of the camera to one of another CCD."""

    aggressor: tuple[int, str] = Field(description="CCD and amplifier that cause the ghost.")
    victim: tuple[int, str] = Field(description="CCD and amplifier in which the ghost appears.")
    coefficient: float = Field(description="Fraction of the aggressor's counts.")


class Camera(Section):
    """A mosaic camera. Angles in degrees, focal plane in millimetres."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="Name of the camera.")
    description: str = Field(description="Description in one line.")
    pixel_scale: float = Field(
        gt=0, description="Pixel scale at the centre of the field, arcsec per pixel."
    )
    pixel_size: float = Field(gt=0, description="Pixel size, mm.")
    flip_x: bool = Field(False, description="+x points east (not west) at rotation 0.")
    rotation_offset: float = Field(0.0, description="Added to the rotation in the header, degrees.")
    distortion: tuple[float, ...] = Field(
        (),
        description="Radial distortion a1, a2, ...: radius on the tangent plane = t (1 + a1 t^2 + "
        "a2 t^4 + ...), t = undistorted radius, degrees.",
    )
    layout: FileLayout
    header: HeaderMap
    detectors: tuple[Detector, ...] = Field(min_length=1)
    crosstalk: tuple[Crosstalk, ...] = Field((), description="Crosstalk between CCDs.")

    @model_validator(mode="after")
    def _check(self) -> "Camera":
        ids = [detector.id for detector in self.detectors]
        if len(set(ids)) != len(ids):
            raise ValueError("two detectors have the same id")
        return self

    @model_validator(mode="after")
    def _check_crosstalk(self) -> "Camera":
        ends = {(one.id, amplifier.name) for one in self.detectors for amplifier in one.amplifiers}
        for link in self.crosstalk:
            for ccd, amplifier in (link.aggressor, link.victim):
                if (ccd, amplifier) not in ends:
                    raise ValueError(f"crosstalk: CCD {ccd} has no amplifier {amplifier!r}")
            if link.aggressor[0] == link.victim[0]:
                raise ValueError(
                    f"crosstalk within CCD {link.victim[0]} belongs into the matrix of the detector"
                )
        pairs = [(link.aggressor, link.victim) for link in self.crosstalk]
        if len(set(pairs)) != len(pairs):
            raise ValueError("crosstalk: two coefficients for the same pair of amplifiers")
        return self

    @property
    def degrees_per_mm(self) -> float:
        """Plate scale at the centre of the field."""
        return self.pixel_scale / self.pixel_size / 3600.0

    @functools.cached_property
    def _by_id(self) -> dict[int, Detector]:
        return {detector.id: detector for detector in self.detectors}

    def detector(self, ccd: int) -> Detector:
        """Return the detector with this id, or raise InputError."""
        try:
            return self._by_id[ccd]
        except KeyError:
            known = sorted(self._by_id)
            raise InputError(
                f"camera {self.name!r} has no CCD {ccd}",
                remedy=f"its CCDs are {', '.join(map(str, known[:12]))}"
                + (f", ..., {known[-1]}" if len(known) > 12 else ""),
            ) from None

    def crosstalk_into(self, ccd: int) -> tuple[Crosstalk, ...]:
        """Return the crosstalk links from other CCDs into this one."""
        return tuple(link for link in self.crosstalk if link.victim[0] == ccd and link.coefficient)

    def crosstalk_aggressors(self, ccd: int) -> tuple[str, ...]:
        """Return the aggressor amplifiers of this CCD for other CCDs, in their order."""
        shining = {link.aggressor for link in self.crosstalk if link.coefficient}
        names = (amplifier.name for amplifier in self.detector(ccd).amplifiers)
        return tuple(name for name in names if (ccd, name) in shining)

    def pixel_to_focal(
        self, detector: Detector, x: ArrayLike, y: ArrayLike
    ) -> tuple[FloatArray, FloatArray]:
        """Return focal-plane positions in mm for pixels (0-based) of a CCD."""
        nx, ny = detector.size
        dx = (np.asarray(x, dtype=float) - (nx - 1) / 2.0) * self.pixel_size
        dy = (np.asarray(y, dtype=float) - (ny - 1) / 2.0) * self.pixel_size
        cos, sin = _cos_sin(detector.rotation)
        return detector.center[0] + cos * dx - sin * dy, detector.center[1] + sin * dx + cos * dy

    def focal_to_pixel(
        self, detector: Detector, x_mm: ArrayLike, y_mm: ArrayLike
    ) -> tuple[FloatArray, FloatArray]:
        """Invert `pixel_to_focal`."""
        nx, ny = detector.size
        dx = (np.asarray(x_mm, dtype=float) - detector.center[0]) / self.pixel_size
        dy = (np.asarray(y_mm, dtype=float) - detector.center[1]) / self.pixel_size
        cos, sin = _cos_sin(detector.rotation)
        return cos * dx + sin * dy + (nx - 1) / 2.0, -sin * dx + cos * dy + (ny - 1) / 2.0

    def focal_to_tangent(
        self, x_mm: ArrayLike, y_mm: ArrayLike, rotation: float
    ) -> tuple[FloatArray, FloatArray]:
        """Return tangent-plane coordinates (xi east, eta north; degrees) for positions in mm."""
        x = np.asarray(x_mm, dtype=float) * self.degrees_per_mm
        y = np.asarray(y_mm, dtype=float) * self.degrees_per_mm
        stretch = self._stretch(np.hypot(x, y))
        x, y = x * stretch * self._x_sign, y * stretch
        cos, sin = _cos_sin(rotation + self.rotation_offset)
        # +y stands at position angle `rotation`; +x (before a flip) 90 degrees behind it
        return -cos * x + sin * y, sin * x + cos * y

    def tangent_to_focal(
        self, xi: ArrayLike, eta: ArrayLike, rotation: float
    ) -> tuple[FloatArray, FloatArray]:
        """Invert `focal_to_tangent` (Newton's method on the radius).

        NaN far outside the field, where the polynomial of the distortion has lost its meaning.
        """
        xi, eta = np.asarray(xi, dtype=float), np.asarray(eta, dtype=float)
        cos, sin = _cos_sin(rotation + self.rotation_offset)
        x, y = (-cos * xi + sin * eta) * self._x_sign, sin * xi + cos * eta
        distorted = np.hypot(x, y)
        radius = distorted.copy()
        for _ in range(20):
            slope = self._stretch(radius, derivative=True)
            radius = radius - (radius * self._stretch(radius) - distorted) / slope
        stretch = self._stretch(radius)
        # compared this way round, NaN fails as well
        found = (radius >= 0) & (np.abs(radius * stretch - distorted) < 1e-9)
        shrink = 1.0 / np.where(found, stretch * self.degrees_per_mm, np.nan)
        return x * shrink, y * shrink

    def pixel_to_sky(
        self, detector: Detector, x: ArrayLike, y: ArrayLike, ra: float, dec: float, rotation: float
    ) -> tuple[FloatArray, FloatArray]:
        """Return ICRS positions in degrees for pixels of a CCD, as the header predicts them.

        Parameters
        ----------
        x, y : array_like
            Pixel positions, 0-based.
        ra, dec, rotation : float
            Pointing and rotation of the exposure, degrees.
        """
        x_mm, y_mm = self.pixel_to_focal(detector, x, y)
        return sphere.tan_deproject(*self.focal_to_tangent(x_mm, y_mm, rotation), ra, dec)

    def sky_to_pixel(
        self,
        detector: Detector,
        ra_star: ArrayLike,
        dec_star: ArrayLike,
        ra: float,
        dec: float,
        rotation: float,
    ) -> tuple[FloatArray, FloatArray]:
        """Invert `pixel_to_sky`; NaN for directions far outside the field."""
        xi, eta = sphere.tan_project(ra_star, dec_star, ra, dec)
        return self.focal_to_pixel(detector, *self.tangent_to_focal(xi, eta, rotation))

    def footprint(
        self, detector: Detector, ra: float, dec: float, rotation: float, n_per_edge: int = 1
    ) -> tuple[FloatArray, FloatArray]:
        """Return the outline of a CCD on the sky, for a pointing and rotation in degrees.

        Returns
        -------
        ra, dec : ndarray of float64, shape (4 * n_per_edge,)
            Vertices in order around the CCD, beginning at pixel (-0.5, -0.5).
        """
        x, y = outline(detector.size, n_per_edge)
        return self.pixel_to_sky(detector, x, y, ra, dec, rotation)

    @property
    def _x_sign(self) -> float:
        return -1.0 if self.flip_x else 1.0

    def _stretch(self, t: FloatArray, derivative: bool = False) -> FloatArray:
        """Return 1 + a1 t^2 + ..., or the derivative of t (1 + a1 t^2 + ...)."""
        total = np.ones_like(t)
        for i, a in enumerate(self.distortion, start=1):
            total = total + a * t ** (2 * i) * ((2 * i + 1) if derivative else 1)
        return total


def outline(size: tuple[int, int], n_per_edge: int) -> tuple[FloatArray, FloatArray]:
    """Return pixel positions along the outer edge of an image of (nx, ny) pixels.

    Returns
    -------
    x, y : ndarray of float64, shape (4 * n_per_edge,)
        Beginning at (-0.5, -0.5), along the rows first.
    """
    nx, ny = size
    t = np.arange(n_per_edge) / n_per_edge
    zero, one = np.zeros(n_per_edge), np.ones(n_per_edge)
    x = np.concatenate([t, one, 1 - t, zero]) * nx - 0.5
    y = np.concatenate([zero, t, one, 1 - t]) * ny - 0.5
    return x, y


def shipped_cameras() -> list[str]:
    """Return the names of the cameras that come with coaddflow."""
    folder = resources.files("coaddflow.instrument") / "cameras"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml"))


def camera_file(name: str | Path) -> Path:
    """Return the YAML file of a camera given by name or path; raise InputError if none is there."""
    path = Path(name)
    if str(name) in shipped_cameras():
        return Path(str(resources.files("coaddflow.instrument") / "cameras" / f"{name}.yaml"))
    if not path.is_file():
        raise InputError(
            f"there is no camera {str(name)!r}{did_you_mean(name, shipped_cameras())}",
            remedy=f"set camera to one of {', '.join(shipped_cameras())}, or to the path of a "
            "camera file",
        )
    return path


def load_camera(name: str | Path) -> Camera:
    """Return a shipped camera by name, or one from a YAML file by path.

    Raises
    ------
    InputError
        If there is no such camera, or its file does not describe one; names the key at fault.
    """
    path = camera_file(name)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506 - a SafeLoader
        return Camera.model_validate(_with_defaults(content))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"is not YAML ({error})", path=path) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"camera key {key!r}: {first['msg']}", path=path) from error


def write_camera(path: str | Path, camera: Camera, origin: str) -> None:
    """Write a camera file that `load_camera` reads as the same camera.

    Parameters
    ----------
    path : str or Path
        The new file.
    camera : Camera
        The camera.
    origin : str
        Where its values come from, for a comment.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    content = camera.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None)
    with atomic_path(path) as temporary:
        temporary.write_text(f"# {origin}\n{text}", encoding="utf-8")


def _with_defaults(content: object) -> object:
    """Fill what all detectors share (``detector_defaults``) into every detector."""
    if not isinstance(content, dict) or not isinstance(content.get("detectors"), list):
        return content
    content = dict(content)
    defaults = content.pop("detector_defaults", None) or {}
    content["detectors"] = [
        {**defaults, **detector} if isinstance(detector, dict) else detector
        for detector in content["detectors"]
    ]
    return content


def _cos_sin(angle: Annotated[float, "degrees"]) -> tuple[float, float]:
    return float(np.cos(np.radians(angle))), float(np.sin(np.radians(angle)))


def _box_size(box: Box) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]
