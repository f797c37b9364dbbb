"""Master calibration frames of one CCD: from raw exposures to files.

The jobs around `calibs` and `nightsky`, which know arrays only: here frames are read, detrended
as far as each kind of master needs it, and the result is written. A frame that cannot be read is
left out, as long as enough others are there.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from astropy.io import fits

from coaddflow.calib.frames import (
    CalibKind,
    combine_bias,
    combine_dark,
    combine_flat,
    defects_frame,
    find_defects,
    read_calibs,
    read_master,
    write_failed_master,
    write_master,
)
from coaddflow.calib.night_sky import hot_pixel_map, night_sky_dark, night_sky_flat
from coaddflow.errors import CcdFailure, InputError, Reason
from coaddflow.image.masked_image import Compression, MaskedImage
from coaddflow.image.provenance import provenance_header
from coaddflow.instrument.camera import Camera
from coaddflow.instrument.raw import RawCcd, read_raw_ccd
from coaddflow.isr.detrend import (
    CcdCalibs,
    PartlyDetrendedCcd,
    apply_gain,
    assemble,
    correct_crosstalk,
    linearise,
    mask_saturation,
    subtract_bias,
    subtract_dark,
    subtract_overscan,
)
from coaddflow.settings import Settings
from coaddflow.settings.detrend import DetrendSettings

_LOG = logging.getLogger(__name__)


def make_bias(
    path: str | Path, raw_files: Mapping[str, float], camera: Camera, ccd: int, settings: Settings
) -> None:
    """Make the master bias of a CCD from bias exposures and write it, in counts."""
    with _master(path, "bias", raw_files, {}, settings) as master:
        frames = _Frames(raw_files, camera, ccd, CcdCalibs(), settings, "bias")
        image = frames.combined(lambda: combine_bias(frames, len(frames), settings.calibs))
        master.write(image, len(frames))


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
    make = night_sky_dark if settings.calibs.dark.source == "night_sky" else combine_dark
    with _master(path, "dark", raw_files, calibs, settings) as master:
        frames = _Frames(raw_files, camera, ccd, read_calibs(calibs), settings, "dark")
        image = frames.combined(lambda: make(frames, frames.times, settings.calibs))
        master.write(image, len(frames))


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
    make = night_sky_flat if settings.calibs.flat.source == "night_sky" else combine_flat
    with _master(path, "flat", raw_files, calibs, settings) as master:
        frames = _Frames(raw_files, camera, ccd, read_calibs(calibs), settings, "flat")
        image = frames.combined(lambda: make(frames, len(frames), settings.calibs))
        master.write(image, len(frames))


def make_defects(
    path: str | Path, dark: str | None, flats: Sequence[str], settings: Settings
) -> None:
    """Make the map of bad pixels of a CCD from its master dark and flats and write it."""
    calibs = {f"flat {number}": flat for number, flat in enumerate(flats)}
    calibs |= {"dark": dark} if dark is not None else {}
    with _master(path, "defects", {}, calibs, settings) as master:
        dark_image = read_master(dark, "dark") if dark is not None else None
        flat_images = [read_master(flat, "flat") for flat in flats]
        bad = find_defects(dark_image, flat_images, settings.calibs.defects)
        master.write(defects_frame(bad), len(calibs))


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
    with _master(path, "defects", raw_files, calibs, settings) as master:
        if "dark" in calibs:
            n_frames, pattern = 1, read_master(calibs["dark"], "dark")
        else:
            frames = _Frames(raw_files, camera, ccd, read_calibs(calibs), settings, "defects")
            pattern = frames.combined(lambda: night_sky_dark(frames, frames.times, settings.calibs))
            n_frames = len(frames)
        bad = hot_pixel_map(pattern, settings.calibs.defects)
        master.write(defects_frame(bad), n_frames)


def detrend_frame(
    raw: RawCcd,
    calibs: CcdCalibs,
    exposure_time: float,
    settings: DetrendSettings,
    kind: CalibKind,
) -> MaskedImage:
    """Detrend a frame as far as a calibration frame needs it.

    Parameters
    ----------
    raw : RawCcd
        The frame.
    calibs : CcdCalibs
        Calibration frames.
    exposure_time : float
        Of the frame, s.
    settings : DetrendSettings
        Which steps are made, and how.
    kind : {"bias", "dark", "flat", "defects"}
        What is made of it.

    Returns
    -------
    MaskedImage
        For a bias in counts above the overscan, otherwise in electrons; for a flat without dark
        current.
    """
    ccd = PartlyDetrendedCcd.of(raw, settings)
    mask_saturation(ccd)
    subtract_overscan(ccd)
    correct_crosstalk(ccd)
    assemble(ccd)
    if kind == "bias":
        return ccd.masked_image
    subtract_bias(ccd, calibs.bias)
    linearise(ccd)
    apply_gain(ccd)
    if kind == "flat":
        subtract_dark(ccd, calibs.dark, exposure_time)
    return ccd.masked_image


class _Frames:
    """The frames of one CCD, detrended one by one as they are asked for.

    Parameters
    ----------
    files : mapping of str to float
        Raw files, with their exposure times in seconds.
    camera, ccd, calibs, settings
        What they are detrended with.
    kind : str
        What is made of them.
    """

    def __init__(
        self,
        files: Mapping[str, float],
        camera: Camera,
        ccd: int,
        calibs: CcdCalibs,
        settings: Settings,
        kind: CalibKind,
    ):
        self._planned = getattr(settings.calibs, kind).min_frames
        self._files = dict(files)
        self._camera, self._detector = camera, camera.detector(ccd)
        self._calibs, self._settings, self._kind = calibs, settings.detrend, kind
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
            yield detrend_frame(raw, self._calibs, time, self._settings, self._kind)

    def combined(self, combine: Callable[[], MaskedImage]) -> MaskedImage:
        """Return what ``combine()`` makes of the frames, without those that cannot be read.

        How many frames there are must be known before they are combined, so an unreadable one
        is taken out and the work begins again.
        """
        left_out: list[str] = []
        while True:
            try:
                return combine()
            except CcdFailure as failure:
                if self._unreadable is None:
                    raise
                _LOG.warning("left out: %s", failure)
                left_out.append(str(failure))
                del self._files[self._unreadable]
                self._unreadable = None
            except InputError as error:
                # too few are left: for this CCD, where others may have enough
                if left_out:
                    raise CcdFailure(
                        Reason.BROKEN_FRAMES, f"{error}. {'; '.join(left_out)}"
                    ) from error
                # the table has enough of them, or the plan would do without this master
                if len(self) < self._planned:
                    raise CcdFailure(
                        Reason.MISSING_FRAMES, f"{error}: raw files are missing"
                    ) from error
                raise


@dataclass(frozen=True)
class _Master:
    """Where a calibration frame goes, and with which cards."""

    path: str | Path
    kind: CalibKind
    header: fits.Header
    compression: Compression

    def write(self, image: MaskedImage, n_frames: int) -> None:
        write_master(self.path, image, self.kind, n_frames, self.header, self.compression)


@contextmanager
def _master(
    path: str | Path,
    kind: CalibKind,
    raw_files: Mapping[str, float],
    calibs: Mapping[str, str],
    settings: Settings,
) -> Iterator[_Master]:
    """Give a calibration frame to write; if it fails for this CCD alone, say so in its place.

    The CCD then fails in every exposure, and the other CCDs go on.
    """
    cards = provenance_header(settings.section("calibs"), [*raw_files, *calibs.values()])
    try:
        yield _Master(path, kind, cards, settings.products.compression)
    except CcdFailure as failure:
        _LOG.warning("there is no %s: %s", kind, failure)
        write_failed_master(path, kind, failure)
