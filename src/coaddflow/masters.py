"""Master calibration frames of one CCD: from raw exposures to files.

The jobs around `calibs` and `nightsky`, which know arrays only: here frames are read, detrended
as far as each kind of master needs it, and the result is written. A frame that cannot be read is
left out, as long as enough others are there.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from astropy.io import fits

from coaddflow.calibs import combine_bias, combine_dark, combine_flat, find_defects
from coaddflow.camera import Camera
from coaddflow.errors import CcdFailure
from coaddflow.image import (
    MaskedImage,
    MaskPlane,
    masked_image_hdus,
    read_masked_image,
    write_fits,
)
from coaddflow.isr import CcdCalibs, detrend
from coaddflow.nightsky import hot_pixel_map, night_sky_dark, night_sky_flat
from coaddflow.provenance import provenance_header
from coaddflow.raw import read_raw_ccd
from coaddflow.settings import Settings

_LOG = logging.getLogger(__name__)


def read_calibs(paths: Mapping[str, str | Path]) -> CcdCalibs:
    """Read the calibration frames of a CCD: bias, dark, flat and defects, those that are given."""
    return CcdCalibs(**{kind: read_masked_image(path)[0] for kind, path in paths.items()})


def make_bias(
    path: str | Path, raw_files: Mapping[str, float], camera: Camera, ccd: int, settings: Settings
) -> None:
    """Make the master bias of a CCD from bias exposures and write it, in counts."""
    frames = _Frames(raw_files, camera, ccd, CcdCalibs(), settings, "assembly")
    bias = frames.combined(lambda: combine_bias(frames, len(frames), settings.calibs))
    _write(path, bias, "adu", [*raw_files], settings)


def make_dark(
    path: str | Path,
    raw_files: Mapping[str, float],
    calibs: Mapping[str, str],
    camera: Camera,
    ccd: int,
    settings: Settings,
) -> None:
    """Make the master dark of a CCD and write it, in electrons per second.

    Parameters
    ----------
    path : str or Path
        The master.
    raw_files : mapping of str to float
        Raw files, with their exposure times in seconds: dark exposures, or science exposures
        where the settings say ``night_sky``.
    calibs : mapping of str to str
        The master bias, if there is one.
    camera, ccd, settings
        Which CCD; sections calibs and detrend.
    """
    frames = _Frames(raw_files, camera, ccd, read_calibs(calibs), settings, "gain")
    make = night_sky_dark if settings.calibs.dark.source == "night_sky" else combine_dark
    dark = frames.combined(lambda: make(frames, frames.times, settings.calibs))
    _write(path, dark, "electron/s", [*raw_files, *calibs.values()], settings)


def make_flat(
    path: str | Path,
    raw_files: Mapping[str, float],
    calibs: Mapping[str, str],
    camera: Camera,
    ccd: int,
    settings: Settings,
) -> None:
    """Make the flat of a CCD and band and write it.

    Parameters
    ----------
    path : str or Path
        The flat.
    raw_files : mapping of str to float
        Raw files, with their exposure times in seconds: flat exposures of the band, or science
        exposures where the settings say ``night_sky``.
    calibs : mapping of str to str
        Master bias and dark, if there are any.
    camera, ccd, settings
        Which CCD; sections calibs and detrend.
    """
    frames = _Frames(raw_files, camera, ccd, read_calibs(calibs), settings, "dark")
    make = night_sky_flat if settings.calibs.flat.source == "night_sky" else combine_flat
    flat = frames.combined(lambda: make(frames, len(frames), settings.calibs))
    _write(path, flat, "", [*raw_files, *calibs.values()], settings)


def make_defects(
    path: str | Path, dark: str | None, flats: Sequence[str], settings: Settings
) -> None:
    """Make the map of bad pixels of a CCD from its master dark and flats and write it."""
    dark_image = read_masked_image(dark)[0] if dark is not None else None
    flat_images = [read_masked_image(flat)[0] for flat in flats]
    bad = find_defects(dark_image, flat_images, settings.calibs.defects)
    _write(path, defect_image(bad), "", [*([dark] if dark else []), *flats], settings)


def make_night_sky_defects(
    path: str | Path,
    raw_files: Mapping[str, float],
    calibs: Mapping[str, str],
    camera: Camera,
    ccd: int,
    settings: Settings,
) -> None:
    """Make the map of bad pixels of a CCD from dithered science exposures and write it.

    Parameters
    ----------
    path : str or Path
        The map.
    raw_files : mapping of str to float
        Raw science exposures, with their exposure times in seconds.
    calibs : mapping of str to str
        The master bias, if there is one, and a dark that was itself made from the night sky: it
        is then used as it is.
    camera, ccd, settings
        Which CCD; sections calibs and detrend.
    """
    if "dark" in calibs:
        pattern = read_masked_image(calibs["dark"])[0]
    else:
        frames = _Frames(raw_files, camera, ccd, read_calibs(calibs), settings, "gain")
        pattern = frames.combined(lambda: night_sky_dark(frames, frames.times, settings.calibs))
    bad = hot_pixel_map(pattern, settings.calibs.defects)
    _write(path, defect_image(bad), "", [*raw_files, *calibs.values()], settings)


def defect_image(bad: np.ndarray) -> MaskedImage:
    """Return bad pixels, shape (ny, nx), as an image whose mask says BAD there."""
    zero = np.zeros(bad.shape, np.float32)
    return MaskedImage(zero, zero, np.where(bad, np.int32(MaskPlane.BAD), np.int32(0)))


class _Frames:
    """The frames of one CCD, detrended one by one as they are asked for.

    Parameters
    ----------
    files : mapping of str to float
        Raw files, with their exposure times in seconds.
    camera, ccd, calibs, settings
        What they are detrended with.
    last_step : str
        The last step of detrending (see `isr.detrend`).
    """

    def __init__(
        self,
        files: Mapping[str, float],
        camera: Camera,
        ccd: int,
        calibs: CcdCalibs,
        settings: Settings,
        last_step: str,
    ):
        self._files = dict(files)
        self._camera, self._detector = camera, camera.detector(ccd)
        self._calibs, self._settings, self._last_step = calibs, settings.detrend, last_step
        self._unreadable: str | None = None

    def __len__(self) -> int:
        return len(self._files)

    @property
    def times(self) -> list[float]:
        """Exposure times, in the order of the frames."""
        return list(self._files.values())

    def __iter__(self) -> Iterator[MaskedImage]:
        for number, (path, time) in enumerate(self._files.items(), start=1):
            _LOG.info("frame %d of %d: %s", number, len(self), path)
            try:
                raw = read_raw_ccd(path, self._camera, self._detector, self._settings.check_raw)
            except CcdFailure:
                self._unreadable = path
                raise
            yield detrend(raw, self._calibs, time, self._settings, self._last_step).masked_image

    def combined(self, combine: Callable[[], MaskedImage]) -> MaskedImage:
        """Return what ``combine()`` makes of the frames, without those that cannot be read.

        How many frames there are must be known before they are combined, so an unreadable one
        is taken out and the work begins again.
        """
        while True:
            try:
                return combine()
            except CcdFailure as failure:
                if self._unreadable is None:
                    raise
                _LOG.warning("left out: %s", failure)
                del self._files[self._unreadable]
                self._unreadable = None


def _write(
    path: str | Path,
    image: MaskedImage,
    unit: str,
    inputs: Sequence[str | Path],
    settings: Settings,
) -> None:
    primary = fits.PrimaryHDU(header=provenance_header(settings.section("calibs"), inputs))
    compression = "none" if settings.products.compression == "none" else "lossless"
    write_fits(path, [primary, *masked_image_hdus(image, None, unit, compression)])
