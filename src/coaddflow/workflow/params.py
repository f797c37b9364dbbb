"""What makes a job run again besides its input files: the ``params`` of the rules.

A job runs again when its params change. They carry the versions of its stages, the settings that
its stage uses and that differ from their defaults, and what the tables and the camera file say
about what it works on; nothing random, temporal or absolute. So a setting that is added with a
neutral default redoes nothing, and a stage whose version is raised redoes itself and its
dependents.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

from coaddflow.tables import paths
from coaddflow.tables.paths import CALIB_KINDS
from coaddflow.tables.verdict import key_of_today, read_verdict
from coaddflow.workflow.inputs import set_of
from coaddflow.workflow.plan import Plan
from coaddflow.workflow.stages import CALIB_STAGES, STAGES


class Params:
    """The params functions of the rules of a plan; most take the wildcards of a job."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def made_by(self, name: str) -> dict[str, Any]:
        """Return versions and changed settings of a stage."""
        stage = STAGES[name]
        return {
            "versions": stage.versions,
            "settings": self.plan.settings.changed_in(*stage.sections),
        }

    def master(self, name: str) -> Callable[[Any], dict[str, Any]]:
        """Return the params function of a stage of calibration frames for what makes them.

        That is `made_by`, with only what makes this kind of them. Where raw frames of a job take
        different calibration frames, since they are of different nights, it also says which.
        """
        made_by = self.made_by(name)
        kind, calibs = CALIB_STAGES[name], made_by["settings"].get("calibs", {})
        others = {*CALIB_KINDS} - {kind}
        if getattr(self.plan.settings.calibs, kind).source != "night_sky":
            others.add("night_sky")
        kept = {key: value for key, value in calibs.items() if key not in others}
        # which exposures it is made from is in the inputs
        kept[kind] = {k: v for k, v in kept.get(kind, {}).items() if k != "exposures"}
        made_by["settings"] = made_by["settings"] | {"calibs": kept}

        def of_job(wildcards: Any) -> dict[str, Any]:
            of_frames = self._calibs_of_frames(kind, wildcards)
            return made_by | {"calibs_of_frames": of_frames} if of_frames else made_by

        return of_job

    def _calibs_of_frames(self, kind: str, wildcards: Any) -> dict[str, dict[str, str]]:
        """Return calibration frames by raw file and kind, of kinds of which a job has several."""
        ccd, band = int(wildcards.ccd), getattr(wildcards, "band", None)
        found: dict[str, dict[str, str]] = {}
        for source, sets in self.plan.sets_of_frames(kind, band, set_of(wildcards)).items():
            for exposure, name in sets.items() if len({*sets.values()}) > 1 else ():
                path = self.plan.calib_product(source, ccd, band or self.plan.bands[0], name)
                found.setdefault(self.plan.raw_file(exposure, ccd), {})[source] = path
        return found

    def calexp(self, wildcards: Any) -> dict[str, Any]:
        """Return versions and settings that make the calexp of a CCD."""
        return self._of_band("calexp", self.plan.band_of(wildcards.exposure))

    def exposure(self, wildcards: Any) -> dict[str, Any]:
        """Return versions and settings that make the calexps of an exposure in one job."""
        return self._of_band("exposure", self.plan.band_of(wildcards.exposure))

    @functools.cache  # noqa: B019 - one object a run
    def _of_band(self, name: str, band: str) -> dict[str, Any]:
        """Return `made_by`, with only what this band uses of the reference catalogue.

        Where the files of the catalogue are inputs of the job their names are left out.
        """
        made_by = self.made_by(name)
        changed = made_by["settings"].pop("refcat", {})
        refcat = {key: value for key, value in changed.items() if key not in ("bands", "fallback")}
        magnitude = self.plan.settings.refcat.magnitude_column(band)
        refcat["magnitude"] = magnitude.model_dump(mode="json", exclude_defaults=True)
        if self.plan.refcat_files:
            refcat.pop("path", None)
        made_by["settings"]["refcat"] = refcat
        return made_by

    @functools.cache  # noqa: B019
    def calibrated(self, name: str) -> dict[str, Any]:
        """Return `made_by` of a stage that takes in images calibrated elsewhere.

        What ingest reads from headers and tables has become columns of the table of images.
        """
        made_by = self.made_by(name)
        calibrated = made_by["settings"].pop("calibrated", {})
        used = ("weight", "mask", "unit", "subtract_sky")
        kept = {key: calibrated[key] for key in used if key in calibrated}
        return {**made_by, "settings": made_by["settings"] | {"calibrated": kept}}

    def skymap(self) -> dict[str, Any]:
        """Return the settings of the sky map, with nothing left to be fitted."""
        unused = {"rings": "tangent", "tangent": "rings"}[self.plan.skymap.kind]
        return {k: v for k, v in self.plan.skymap.changed().items() if k != unused}

    def table_row(self, wildcards: Any) -> dict[str, Any]:
        """Return the row of the table of a CCD: of its raw exposure, or of its image."""
        return self.plan.table_row(wildcards.exposure, int(wildcards.ccd))

    def exposure_row(self, wildcards: Any) -> dict[str, Any] | None:
        """Return the row of the table of a raw exposure; None for images calibrated elsewhere."""
        is_raw = wildcards.exposure in self.plan.science
        return self.plan.table_row(wildcards.exposure) if is_raw else None

    def image_rows(self, wildcards: Any) -> list[dict[str, Any]]:
        """Return the rows of the table of the images of an exposure calibrated elsewhere."""
        exposure = wildcards.exposure
        return [self.plan.table_row(exposure, ccd) for ccd in self.plan.ccds_of(exposure)]

    def raw(self, wildcards: Any) -> str:
        """Return the raw files of an exposure as one name, in which {ccd} may stand for the CCD."""
        return self.plan.raw_template(wildcards.exposure)

    def ccds(self) -> dict[int, str]:
        """Return what stands for each CCD in the names of raw files."""
        return {ccd: self.plan.ccds[ccd].extension for ccd in sorted(self.plan.ccds)}

    def calibs_of_band(self, wildcards: Any) -> dict[int, dict[str, str]]:
        """Return the calibration frames of a band, by CCD and kind."""
        return self.plan.calibs_of_band(wildcards.band, set_of(wildcards))

    def exposure_times(self, name: str) -> Callable[[Any, Any], dict[str, float]]:
        """Return the params function of a stage for the exposure times of its frames, by file.

        Where a table of the frames has them there are none.
        """
        kind = CALIB_STAGES[name]

        def times(wildcards: Any, input: Any) -> dict[str, float]:
            raw = input.get("raw", [])
            if not raw:
                return {}
            band = getattr(wildcards, "band", None)
            known = self._times(kind, band, set_of(wildcards), int(wildcards.ccd))
            return {path: known[path] for path in raw}

        return times

    def times_of_frames(self, wildcards: Any, input: Any) -> dict[str, float]:
        """Return the exposure times of the frames of a table, by file."""
        known = self._times(*paths.frames_of(wildcards.frames), next(iter(self.plan.ccds)))
        return {path: known[path] for path in input}

    def _times(self, kind: str, band: str | None, name: str, ccd: int) -> dict[str, float]:
        plan = self.plan
        frames = plan.calib_frames(kind, band, name)
        rows = (plan.calibration.get(frame) or plan.science[frame] for frame in frames)
        return {plan.raw_file(row.exposure, ccd): row.exposure_time for row in rows}

    def camera_of_ccd(self, wildcards: Any) -> str:
        """Return a checksum of what the camera file says about a CCD."""
        return self.plan.ccds[int(wildcards.ccd)].fingerprint

    @functools.cache  # noqa: B019
    def camera_of_exposure(self) -> str:
        """Return a checksum of what the camera file says about all CCDs of an exposure."""
        known = [[ccd, self.plan.ccds[ccd].fingerprint] for ccd in sorted(self.plan.ccds)]
        if self.plan.settings.exposure.crosstalk.enabled:
            known.append(["crosstalk", self.plan.crosstalk])
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]

    def patches(self, wildcards: Any) -> list[str]:
        """Return the patches of a tract that exposures of a band can touch."""
        return self.plan.patches_of(wildcards.band, int(wildcards.tract))

    def verdict(self, wildcards: Any) -> str:
        """Return a key that changes when an exposure would be judged otherwise by today's settings.

        `calexp.max_failed_fraction` is not in the params of the gather job itself: raising it, to
        let one exposure pass, must not redo all others with all their dependents. Lowering it
        must fail those that now have too many failures, and no others.
        """
        settings = self.plan.settings
        return key_of_today(
            read_verdict(paths.MANIFEST.format(exposure=wildcards.exposure)),
            settings.calexp.max_failed_fraction,
            settings.prediction.margin,
            settings.calexp.on_failed_exposure == "stop",
        )
