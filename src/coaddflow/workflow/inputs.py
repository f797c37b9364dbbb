"""Which files a job needs: the input functions of the rules.

A raw file that is not there would stop the whole plan, so it is left out of a job's inputs: the
job then runs, and its CCD fails with a reason. When the file appears the set of inputs changes, and
the CCD is done again. Where a CCD has been done and its raw file has since been moved away (an
archive), the file stays an input and the CCD stays done.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from coaddflow.errors import InputError, Reason
from coaddflow.tables import paths
from coaddflow.tables.calibs import read_frame_table
from coaddflow.tables.manifest import ccds_failed_with
from coaddflow.tables.paths import CALIB_KINDS
from coaddflow.workflow.calib_sets import ALWAYS
from coaddflow.workflow.plan import Plan
from coaddflow.workflow.stages import STAGES


class Inputs:
    """The input functions of the rules of a plan; each takes the wildcards of a job."""

    def __init__(self, plan: Plan):
        self.plan = plan

    # calibration frames

    def bias(self, wildcards: Any) -> dict[str, Any]:
        """Return what the master bias of a CCD is made from."""
        return self._master("bias", wildcards)

    def dark(self, wildcards: Any) -> dict[str, Any]:
        """Return what the master dark of a CCD is made from."""
        return self._master("dark", wildcards)

    def flat(self, wildcards: Any) -> dict[str, Any]:
        """Return what the flat of a CCD and band is made from."""
        return self._master("flat", wildcards)

    def defects(self, wildcards: Any) -> dict[str, Any]:
        """Return what the map of bad pixels of a CCD is made from, in the band of its flat.

        The flats of other bands have no part in it: a band that is added redoes no other.
        """
        return self._made_with("defects", wildcards)

    def night_sky_defects(self, wildcards: Any) -> dict[str, Any]:
        """Return what the map of bad pixels of a CCD from the night sky is made from."""
        if self.plan.settings.calibs.defects_from:
            return self._made_with("defects", wildcards)
        return self._master("defects", wildcards)

    def _master(self, kind: str, wildcards: Any) -> dict[str, Any]:
        """Return the raw frames of a calibration frame, and the calibration frames for these."""
        return self._frames(kind, wildcards) | self._made_with(kind, wildcards)

    def _frames(self, kind: str, wildcards: Any) -> dict[str, Any]:
        """Return the raw frames that a calibration frame of a CCD is made from, or their table."""
        ccd, band, name = int(wildcards.ccd), getattr(wildcards, "band", None), set_of(wildcards)
        table = self.plan.frame_table(kind, band, name)
        if table is not None:
            return {"frames": table}
        frames = self.plan.calib_frames(kind, band, name)
        files = [self.plan.raw_file(exposure, ccd) for exposure in frames]
        found = [path for path in files if _is_there(path)]
        done = self.plan.calib_product(kind, ccd, band or self.plan.bands[0], name)
        if len(found) < len(files) and done and _is_there(done):
            return {"raw": found if _lacked_frames(done) else files}
        return {"raw": found}

    def frame_table(self, wildcards: Any) -> list[str]:
        """Return the raw frames that a table names, or is to name.

        Without a table all are asked for where calibration frames were made from them: made again
        from those that are left, these would be lost.
        """
        kind, band, name = paths.frames_of(wildcards.frames)
        files = [
            self.plan.raw_template(exposure)
            for exposure in self.plan.calib_frames(kind, band, name)
        ]
        if all(map(_is_there, files)):
            return files
        try:
            table = read_frame_table(paths.FRAME_TABLE.format(frames=wildcards.frames))
        except InputError:
            if self._has_masters(kind, band or self.plan.bands[0], name):
                return files
            table = ()
        named = {row.path for row in table}
        return [path for path in files if path in named or _is_there(path)]

    def _has_masters(self, kind: str, band: str, name: str) -> bool:
        """Return whether calibration frames of a kind are there that did not lack raw frames."""
        masters = {self.plan.calib_product(kind, ccd, band, name) for ccd in self.plan.ccds}
        return any(_is_there(path) and not _lacked_frames(path) for path in masters - {None})

    def _made_with(self, kind: str, wildcards: Any) -> dict[str, str | list[str]]:
        """Return the calibration frames that one of this kind is made with, by kind."""
        ccd, band = int(wildcards.ccd), getattr(wildcards, "band", None)
        sets = self.plan.sets_made_with(kind, band, set_of(wildcards))
        files = {
            source: [
                self.plan.calib_product(source, ccd, band or self.plan.bands[0], name)
                for name in names
            ]
            for source, names in sets.items()
        }
        there = {source: [path for path in of_kind if path] for source, of_kind in files.items()}
        return {source: _one_or_list(of_kind) for source, of_kind in there.items() if of_kind}

    # calexps

    def calexp(self, wildcards: Any) -> dict[str, Any]:
        """Return the raw file, calibration frames and reference catalogue of a CCD."""
        exposure, ccd = wildcards.exposure, int(wildcards.ccd)
        raw = _files_or_failure([self.plan.raw_file(exposure, ccd)], _row_of(wildcards))
        return {
            "raw": _one_or_list(raw),
            **self.plan.calibs_of_band(self.plan.band_of(exposure), self.plan.sets_taken(exposure))[
                ccd
            ],
            "refcat": _one_or_list(self.plan.refcat_files),
        }

    def calibrated(self, wildcards: Any) -> list[str]:
        """Return the files of an image calibrated elsewhere: image, weight, mask."""
        files = self.plan.image_files(wildcards.exposure, int(wildcards.ccd))
        return _files_or_failure(files, _row_of(wildcards))

    def exposure(self, wildcards: Any) -> dict[str, Any]:
        """Return raw files and reference catalogue, and the table of the calibration frames."""
        exposure = wildcards.exposure
        table = self.plan.calib_table(self.plan.band_of(exposure), self.plan.sets_taken(exposure))
        raw = _files_of_exposure_or_failure(exposure, self.plan.raw_files(exposure))
        return {
            "raw": _one_or_list(raw),
            "calibs": [] if table is None else table,
            "refcat": _one_or_list(self.plan.refcat_files),
        }

    def calib_table(self, wildcards: Any) -> list[str]:
        """Return the calibration frames of all CCDs in a band, each once, kind by kind."""
        by_ccd = self.plan.calibs_of_band(wildcards.band, set_of(wildcards)).values()
        found = (calibs[kind] for kind in CALIB_KINDS for calibs in by_ccd if kind in calibs)
        return list(dict.fromkeys(found))

    def calibrated_exposure(self, wildcards: Any) -> list[str]:
        """Return the files of all images of an exposure that was calibrated elsewhere."""
        exposure = wildcards.exposure
        ccds = self.plan.ccds_of(exposure)
        files = {ccd: self.plan.image_files(exposure, ccd) for ccd in ccds}
        return _files_of_exposure_or_failure(exposure, files)

    def manifest(self, wildcards: Any) -> list[str]:
        """Return the rows of all CCDs of an exposure."""
        exposure = wildcards.exposure
        ccds = self.plan.ccds_of(exposure)
        return [paths.ROW.format(exposure=exposure, ccd=ccd) for ccd in ccds]

    # tracts

    def tract_corners(self, wildcards: Any) -> list[str]:
        """Return the manifests of the exposures of a band that can touch a tract."""
        exposures = self.plan.exposures_of_tract(int(wildcards.tract), wildcards.band)
        return [paths.MANIFEST.format(exposure=exposure) for exposure in exposures]

    def survey_corners(self, wildcards: Any) -> list[str]:
        """Return the manifests of all exposures."""
        return [paths.MANIFEST.format(exposure=exposure) for exposure in self.plan.exposures]

    def coadd(self, wildcards: Any) -> list[str]:
        """Return the tables of warps of the exposures of a band that can touch a patch."""
        band, tract, patch = wildcards.band, int(wildcards.tract), wildcards.patch
        exposures = self.plan.exposures_of_patch(band, tract, patch)
        return [paths.WARP_TABLE.format(tract=tract, exposure=exposure) for exposure in exposures]

    def on_tract(self, *names: str) -> Callable[[Any], list[str]]:
        """Return the input function that lists what some stages make on a tract.

        Of stages that replace each other, such as ``coadd`` and ``tract``, one is part of the run.
        """

        def files(wildcards: Any) -> list[str]:
            return [path for name in names for path in self._by_tract(name)[wildcards.tract]]

        return files

    @functools.cache  # noqa: B019 - one object a run
    def _by_tract(self, name: str) -> Mapping[str, list[str]]:
        """Return what a stage promises on each tract."""
        found: dict[str, list[str]] = defaultdict(list)
        stage = STAGES[name]
        for units in stage.units(self.plan):
            found[units["tract"]].append(stage.products[0].path.format(**units))
        return found


def set_of(wildcards: Any) -> str:
    """Return the set of calibration frames of a job; `ALWAYS` if it is not in its wildcards."""
    return getattr(wildcards, "set", ALWAYS)


def _one_or_list(files: list[str]) -> str | list[str]:
    """Return files as they are given to Snakemake: one as text, for which it makes no list.

    A list takes 1 kB of each job while a run is planned.
    """
    return files[0] if len(files) == 1 else files


def _row_of(wildcards: Any) -> str:
    return paths.ROW.format(exposure=wildcards.exposure, ccd=wildcards.ccd)


@functools.cache
def _is_there(path: str) -> bool:
    return Path(path).exists()


def _files_or_failure(files: list[str], row: str) -> list[str]:
    """Return the raw files of a CCD; those that it lacks are left out unless it has been done."""
    if all(_is_there(path) for path in files) or not _lacked_file(row):
        return files
    return [path for path in files if _is_there(path)]


def _files_of_exposure_or_failure(exposure: str, files: Mapping[int, Iterable[str]]) -> list[str]:
    """Return the raw files of an exposure, given by CCD, each once; as `_files_or_failure`.

    The manifest is read only if one of them is not there.
    """
    each = dict.fromkeys(path for of_ccd in files.values() for path in of_ccd)
    if all(map(_is_there, each)):
        return list(each)
    without = ccds_failed_with(paths.MANIFEST.format(exposure=exposure), Reason.MISSING_FILE)
    kept = [
        path
        for ccd, of_ccd in files.items()
        for path in of_ccd
        if _is_there(path) or not (without is None or ccd in without)
    ]
    return list(dict.fromkeys(kept))


@functools.lru_cache(maxsize=4096)
def _lacked_file(row: str) -> bool:
    """Return whether a CCD's row says that its raw file was missing (or there is no row)."""
    try:
        return f'"{Reason.MISSING_FILE}"' in Path(row).read_text(encoding="utf-8")
    except FileNotFoundError:
        return True


@functools.lru_cache(maxsize=4096)
def _lacked_frames(master: str) -> bool:
    """Return whether a calibration frame could not be made because raw frames were missing."""
    with Path(master).open("rb") as stream:
        return f"CFFAILED= '{Reason.MISSING_FRAMES}".encode() in stream.read(2880)
