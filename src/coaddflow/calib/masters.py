"""Calibration frames of one CCD: from raw exposures to files.

`calib.frames` and `calib.night_sky` know arrays only: here frames are read, detrended as far as
each kind needs it, combined and written. A frame that cannot be read is left out, as long as
enough others are there. If a calibration frame fails for this CCD alone, a file that says why is
written instead: the CCD then fails in every exposure, and the other CCDs go on.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from coaddflow.image.masked_image import MaskedImage
from coaddflow.image.provenance import provenance_header
from coaddflow.instrument.camera import Camera
from coaddflow.instrument.raw import RawCcd, read_raw_ccd
from coaddflow.isr.detrend import (
    CcdCalibs,
    counts_above_overscan,
    counts_to_electrons,
    join_amplifiers,
    subtract_dark,
)
from coaddflow.settings import Settings
from coaddflow.settings.detrend import DetrendSettings

_LOG = logging.getLogger(__name__)


def make_master(
    path: str | Path,
    kind: CalibKind,
    raw_files: Mapping[str, float],
    calibs: Mapping[str, str],
    camera: Camera,
    ccd: int,
    settings: Settings,
    calibs_of_frames: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Make a calibration frame of a CCD from raw exposures and write it.

    Parameters
    ----------
    path : str or Path
        The calibration frame.
    kind : {"bias", "dark", "flat", "defects"}
        What to make: a bias in counts, a dark in electrons per second, a flat of one band, or a
        map of bad pixels from the night sky (see `make_defects` for one from other masters).
    raw_files : mapping of str to float
        Raw files, with their exposure times in seconds: exposures of this kind, or dithered
        science exposures where the settings say ``night_sky``.
    calibs : mapping of str to str
        The masters that the frames are detrended with. A dark, for a map of bad pixels, was
        itself made from the night sky: it is then used as it is, and no raw file is read.
    camera, ccd, settings
        Which CCD; sections calibs and detrend.
    calibs_of_frames : mapping, optional
        Masters of kinds that are not the same for all raw files (sets of their nights), by raw
        file and kind.
    """
    of_frames = calibs_of_frames or {}

    def make() -> tuple[MaskedImage, int]:
        if kind == "defects" and "dark" in calibs:
            dark = read_master(calibs["dark"], "dark")
            return defects_frame(hot_pixel_map(dark, settings.calibs.defects)), 1
        known = read_calibs(calibs)
        frames = _Frames(dict(raw_files), kind, known, camera, ccd, settings, of_frames)
        return frames.combined(), len(frames)

    several = (file for of_frame in of_frames.values() for file in of_frame.values())
    inputs = [*raw_files, *calibs.values(), *dict.fromkeys(several)]
    _write(path, kind, inputs, settings, make)


def make_defects(path: str | Path, calibs: Mapping[str, str], settings: Settings) -> None:
    """Make the map of bad pixels of a CCD in a band and write it.

    It is made from the master dark and the flat of the band (``calibs``, by kind) that there are: a
    map that rested on the flats of all bands would redo a survey whenever a band is added.
    """

    def make() -> tuple[MaskedImage, int]:
        frames = read_calibs(calibs)
        flats = [frames.flat] if frames.flat is not None else []
        bad = find_defects(frames.dark, flats, settings.calibs.defects)
        return defects_frame(bad), len(calibs)

    _write(path, "defects", calibs.values(), settings, make)


def _write(
    path: str | Path,
    kind: CalibKind,
    inputs: Iterable[str],
    settings: Settings,
    make: Callable[[], tuple[MaskedImage, int]],
) -> None:
    """Write what ``make`` returns (a calibration frame, its number of inputs), or why it fails."""
    try:
        image, n_frames = make()
    except CcdFailure as failure:
        _LOG.warning("there is no %s: %s", kind, failure)
        write_failed_master(path, kind, failure)
        return
    cards = provenance_header(settings.provenance(), inputs)
    write_master(path, image, kind, n_frames, cards, settings.products.compression)


@dataclass
class _Frames:
    """The raw frames of a CCD, detrended one by one as they are asked for."""

    files: dict[str, float]
    kind: CalibKind
    calibs: CcdCalibs
    camera: Camera
    ccd: int
    settings: Settings
    calibs_of_frames: Mapping[str, Mapping[str, str]]
    """Further masters by raw file and kind."""
    unusable: Sequence[str] = ()
    """Frames that cannot be combined with the others, once they are known."""
    _last: tuple[Mapping[str, str], CcdCalibs] | None = None
    """Further masters of the last frame, and all that it takes."""

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[MaskedImage]:
        detector, detrend = self.camera.detector(self.ccd), self.settings.detrend
        for number, (path, time) in enumerate(self.files.items(), start=1):
            _LOG.info("frame %d of %d: %s", number, len(self), path)
            self.unusable = [path]
            # no name holds them while the next ones are made
            yield detrend_frame(
                read_raw_ccd(path, self.camera, detector, detrend.check_raw),
                self._calibs_of(path),
                time,
                detrend,
                self.kind,
            )
        self.unusable = ()

    def _calibs_of(self, path: str) -> CcdCalibs:
        """Return the masters that a frame takes; those of one set are read once."""
        further = self.calibs_of_frames.get(path, {})
        if not further:
            return self.calibs
        if self._last is None or self._last[0] != further:
            # a master that failed costs all its frames
            self.unusable = [p for p in self.files if self.calibs_of_frames.get(p) == further]
            masters = {kind: read_master(file, kind) for kind, file in further.items()}
            self.unusable = [path]
            self._last = further, dataclasses.replace(self.calibs, **masters)
        return self._last[1]

    @property
    def _least(self) -> int:
        """The number of frames without which nothing is made."""
        calibs = self.settings.calibs
        own = getattr(calibs, self.kind)
        return (calibs.night_sky if own.source == "night_sky" else own).min_frames

    def combined(self) -> MaskedImage:
        """Return the calibration frame, made without the frames that cannot be used.

        The number of frames must be known before they are combined, so one that cannot be read or
        detrended, or that has no light, is removed and the work begins again. Frames whose master
        failed are removed together.
        """
        left_out: list[str] = []
        while True:
            try:
                return self._combined()
            except CcdFailure as failure:
                dark = failure.reason in (Reason.DARK_FLAT, Reason.NO_SKY)
                if not self.unusable or (dark and len(self) <= self._least):
                    raise
                _LOG.warning("left out: %s: %s", ", ".join(self.unusable), failure)
                left_out.append(str(failure))
                for path in self.unusable:
                    del self.files[path]
                self.unusable = ()
            except InputError as error:
                # too few are left: for this CCD, where others may have enough
                if left_out:
                    causes = "; ".join(left_out)
                    raise CcdFailure(Reason.BROKEN_FRAMES, f"{error}. {causes}") from error
                # the table has enough of them, or the plan would do without this master
                if len(self) < getattr(self.settings.calibs, self.kind).min_frames:
                    cause = f"{error}: raw files are missing"
                    raise CcdFailure(Reason.MISSING_FRAMES, cause) from error
                raise

    def _combined(self) -> MaskedImage:
        settings, times = self.settings.calibs, list(self.files.values())
        if self.kind == "bias":
            return combine_bias(self, len(self), settings)
        if self.kind == "flat":
            combine = night_sky_flat if settings.flat.source == "night_sky" else combine_flat
            return combine(self, len(self), settings)
        if self.kind == "dark" and settings.dark.source != "night_sky":
            return combine_dark(self, times, settings)
        pattern = night_sky_dark(self, times, settings)
        if self.kind == "dark":
            return pattern
        return defects_frame(hot_pixel_map(pattern, settings.defects))


def detrend_frame(
    raw: RawCcd, calibs: CcdCalibs, exposure_time: float, settings: DetrendSettings, kind: CalibKind
) -> MaskedImage:
    """Detrend a frame as far as a calibration frame of this kind needs it.

    For a bias the result is in counts above the overscan, otherwise in electrons; for a flat it is
    without dark current, which is scaled by the exposure time (s).
    """
    ccd = counts_above_overscan(raw, settings)
    join_amplifiers(ccd)
    if kind == "bias":
        return ccd.masked_image
    counts_to_electrons(ccd, calibs.bias)
    if kind == "flat":
        subtract_dark(ccd, calibs.dark, exposure_time)
    return ccd.masked_image
