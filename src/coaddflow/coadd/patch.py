"""The coadd of a patch in one band: what goes in, and the job that makes it from warps on disk.

Here the corner database is asked what goes into what. The job of a whole tract
(`coaddflow.coadd.tract_job`) uses the same pieces.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.table import Table, vstack
from numpy.typing import NDArray

from coaddflow.coadd.background_matching import SkyCorrection
from coaddflow.coadd.mean import (
    Coadd,
    CoaddInput,
    coadd_patch,
    effective_area,
    exposure_weight,
    inputs_table,
)
from coaddflow.coadd.product import coadd_figures, write_coadd
from coaddflow.coadd.psf import CoaddPsf, PsfInput
from coaddflow.coadd.readers import CorrectedWarp, LayeredWarp, WithoutCcds
from coaddflow.corners.database import CornerDatabase, Rejection, Selection
from coaddflow.files import remove, remove_partial
from coaddflow.image.provenance import provenance_header
from coaddflow.settings import Settings
from coaddflow.skymap.tract import Tract
from coaddflow.tables.coadds import coadd_table_path
from coaddflow.tables.manifest import CcdRow
from coaddflow.tables.warps import read_warp_table
from coaddflow.warp.files import WarpFile, WarpReader
from coaddflow.warp.kernels import covariance_factor

_LOG = logging.getLogger(__name__)

SECTIONS = ("coadd", "selection", "warp", "products")
"""Settings that coadds depend on: those of the stages `coadd` and `tract`."""


def make_coadd(
    path: str | Path,
    database: str | Path,
    warps: Sequence[str | Path],
    tract: Tract,
    band: str,
    patch: str,
    settings: Settings,
) -> None:
    """Coadd a patch in one band from warps on disk: the whole job.

    Parameters
    ----------
    path : str or Path
        The coadd. It is written also if nothing covers the patch.
    database : str or Path
        The corner database of the tract.
    warps : sequence of str or Path
        Tables of the warps of all exposures that can touch the patch.
    tract, band, patch : Tract, str, str
        Which coadd.
    settings : Settings
        Sections coadd, selection, warp (its kernel) and products.
    """
    # the list of a tract's coadds says that all of them are of one job
    remove(coadd_table_path(path))
    remove_partial(path)
    files = _warps_of_patch(warps, patch)
    nothing = LayeredWarp([], tract.patch(patch).outer_box)

    def reader_of(exposure: str) -> WarpReader:
        return WarpFile(files[exposure]) if exposure in files else nothing

    with CornerDatabase(database) as corners:
        inputs = TractInputs(corners, tract, band, settings)
        work = inputs.work(patch, inputs.select(patch), reader_of)
    write_patch(path, work, database, tract, band, settings)


def _warps_of_patch(tables: Sequence[str | Path], patch: str) -> dict[str, Path]:
    """Return the warps that cover a patch, by exposure."""
    files = {}
    for path in map(Path, tables):
        table = read_warp_table(path)
        for row in table.warps:
            if row.patch == patch:
                files[table.exposure] = path.parent / row.path
    return files


@dataclass(frozen=True)
class PatchWork:
    """A coadd that is to be made."""

    patch: str
    """Id of the patch, "x_y"."""
    inputs: tuple[CoaddInput, ...]
    """The exposures that go in, in the order of summation."""
    rejected: tuple[Rejection, ...]
    """CCDs that were left out, with the reasons."""
    failed: tuple[Rejection, ...]
    """CCDs that would cover the patch if they, or their exposures, had not failed."""
    manifests: tuple[str, ...]
    """Manifests of the exposures that go in."""
    covariance: float
    """Covariance factor of the warps (`warp.kernels.covariance_factor`)."""


class TractInputs:
    """What goes into the coadds of a band on a tract, as its corner database says.

    The database must stay open. Used are the section selection, the weight of the coadds and the
    kernel of the warps.

    Raises
    ------
    InputError
        If the selection leaves out all CCDs of the band.
    """

    def __init__(self, corners: CornerDatabase, tract: Tract, band: str, settings: Settings):
        self._corners = corners
        self._tract, self._band, self._cuts = tract, band, settings.selection
        self._weight = settings.coadd.weight
        corners.require_some(tract.id, band, settings.selection)
        self._manifests = corners.manifests()
        self._of_exposure: dict[str, tuple[float, float]] = {}
        scales = [ccd.pixel_scale for ccd in corners.ccds() if ccd.pixel_scale is not None]
        ratio = (tract.pixel_scale / np.median(scales)) ** 2 if scales else 1.0
        self._covariance = covariance_factor(settings.warp.kernel, float(ratio))

    def select(self, patch: str) -> Selection:
        """Return the CCDs that go into the coadd of a patch, and those that do not."""
        return self._corners.select(self._tract.id, patch, self._band, self._cuts)

    def work(
        self,
        patch: str,
        selection: Selection,
        reader_of: Callable[[str], WarpReader],
        corrections: Mapping[str, SkyCorrection] | None = None,
    ) -> PatchWork:
        """Return the coadd that is to be made of a patch.

        Parameters
        ----------
        patch : str
            Patch id.
        selection : Selection
            From `select`.
        reader_of : callable
            Gives the warp of an exposure on the patch; its pixels of CCDs that were left out are
            not used.
        corrections : mapping of str to SkyCorrection, optional
            What is subtracted from the exposures, if their backgrounds are matched.
        """
        x0, y0, x1, y1 = self._tract.patch(patch).outer_box
        selected: dict[str, list[CcdRow]] = {}
        for overlap in selection.selected:
            selected.setdefault(overlap.ccd.exposure, []).append(overlap.ccd)
        left_out: dict[str, list[CcdRow]] = {}
        for one in selection.rejected:
            left_out.setdefault(one.overlap.ccd.exposure, []).append(one.overlap.ccd)
        inputs = []
        for exposure, ccds in selected.items():
            reader, offset = reader_of(exposure), None
            if exposure in left_out:
                reader = WithoutCcds(reader, left_out[exposure], self._tract)
            if corrections is not None:
                reader = CorrectedWarp(reader, corrections[exposure])
                offset = corrections[exposure].at((x0 + x1 - 1) / 2, (y0 + y1 - 1) / 2)
            weight, seeing = self._weight_and_seeing(exposure)
            inputs.append(_coadd_input(ccds, reader, weight, seeing, offset))
        manifests = tuple(self._manifests[exposure] for exposure in selected)
        without = tuple(selection.rejected), tuple(selection.failed)
        return PatchWork(patch, tuple(inputs), *without, manifests, self._covariance)

    def _weight_and_seeing(self, exposure: str) -> tuple[float, float]:
        """Return figures of a whole exposure, so that overlapping patches agree."""
        if exposure not in self._of_exposure:
            ccds = [row for row in self._corners.ccds(exposure) if row.state == "done"]
            seeing = _median(ccds, "seeing")
            weight = exposure_weight(
                _column(ccds, "sky_noise"),
                _column(ccds, "zero_point"),
                self._tract.pixel_scale / _column(ccds, "pixel_scale"),
                self._area(seeing),
            )
            self._of_exposure[exposure] = (weight, seeing)
        return self._of_exposure[exposure]

    def _area(self, seeing: float) -> float:
        """Return the area that the weight of an exposure counts, pixels of the coadd."""
        if self._weight == "sky":
            return 1.0
        if not seeing > 0:
            seeing = self._corners.band_medians(self._band).seeing or self._tract.pixel_scale
        return float(effective_area(seeing, self._tract.pixel_scale))


def write_patch(
    path: str | Path,
    work: PatchWork,
    database: str | Path,
    tract: Tract,
    band: str,
    settings: Settings,
) -> tuple[Coadd, str]:
    """Coadd a patch and write it; return it, and the SHA-256 checksum of the file.

    Parameters
    ----------
    path : str or Path
        Final name of the coadd.
    work : PatchWork
        The patch and its exposures.
    database : str or Path
        The corner database, for the header.
    tract, band : Tract, str
        Which coadd.
    settings : Settings
        Sections coadd, selection, warp (its kernel) and products.
    """
    coadd = coadd_patch(
        work.inputs,
        tract.patch(work.patch).outer_box,
        settings.coadd,
        pixel_scale=tract.pixel_scale,
        covariance=work.covariance,
    )
    psf = _psf_of(work, coadd, tract)
    coadd = dataclasses.replace(
        coadd, inputs=with_rejected(coadd.inputs, (*work.rejected, *work.failed))
    )
    _LOG.info(
        "%d exposures used, %d CCDs left out, %d failed",
        *(len(work.inputs), len(work.rejected), len(work.failed)),
    )
    for item in work.rejected:
        ccd, reasons = item.overlap.ccd, "; ".join(item.reasons)
        _LOG.info("left out: exposure %s CCD %d: %s", ccd.exposure, ccd.ccd, reasons)
    cards = provenance_header(settings.only(*SECTIONS).provenance(), [database, *work.manifests])
    figures = coadd_figures(coadd, psf, tract.pixel_scale, work.covariance)
    figures["FILTER"] = (band, "band")
    figures["PATCH"] = (work.patch, "patch of the tract")
    compression = settings.products.compression
    return coadd, write_coadd(path, coadd, tract, cards, compression, psf, figures)


def _psf_of(work: PatchWork, coadd: Coadd, tract: Tract) -> CoaddPsf:
    """Return the PSF of the coadd of a patch.

    It knows the CCDs that were selected, of exposures of which pixels are used: however the warps
    were made, these are the same.
    """
    is_used = dict(zip(coadd.inputs["exposure"], coadd.inputs["n_used"] > 0, strict=True))
    inputs = []
    for one in sorted(work.inputs, key=lambda one: one.exposure):
        selected = set(map(int, one.ccds.split(","))) if is_used[one.exposure] else ()
        psfs = tuple(psf for psf in one.reader.read_psfs() if psf.ccd in selected)
        inputs.append(PsfInput(one.exposure, one.weight, psfs))
    return CoaddPsf(tract, coadd.box, coadd.sets, inputs)


def with_rejected(inputs: Table, rejected: Sequence[Rejection]) -> Table:
    """Return a coadd's table of inputs with the CCDs that were left out, and the reasons.

    The table gets a column ``reason``, which is empty for what was used; a CCD that was left out
    has a row of its own, with weight 0.
    """
    inputs = inputs.copy()
    offset = np.nan if "sky_offset" in inputs.colnames else None
    inputs["reason"] = np.full(len(inputs), "", "U1")
    if not rejected:
        return inputs
    ccds = [[item.overlap.ccd] for item in rejected]
    left_out = inputs_table(
        [_coadd_input(ccd, None, 0.0, _median(ccd, "seeing"), offset) for ccd in ccds]
    )
    left_out["reason"] = ["; ".join(item.reasons) for item in rejected]
    return vstack([inputs, left_out]) if len(inputs) else left_out


def _coadd_input(
    ccds: Sequence[CcdRow],
    reader: WarpReader | None,
    weight: float,
    seeing: float,
    sky_offset: float | None,
) -> CoaddInput:
    """Return some CCDs of an exposure as an input."""
    first, numbers = ccds[0], ",".join(str(ccd.ccd) for ccd in ccds)
    zero_point = _median(ccds, "zero_point")
    figures = (seeing, zero_point, first.mjd, first.exposure_time, sky_offset)
    return CoaddInput(first.exposure, reader, weight, numbers, *figures)


def _column(ccds: Sequence[CcdRow], name: str) -> NDArray[np.float64]:
    """Return a column of the manifest; NaN where it has no value (None)."""
    return np.array([getattr(ccd, name) for ccd in ccds], float)


def _median(ccds: Sequence[CcdRow], name: str) -> float:
    values = _column(ccds, name)
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else float("nan")
