"""One tract: the warps of its exposures and the coadds of its patches.

This is where the corner database is asked what goes into what, and where files are read and
written; `warp` and `coadd` do the work. The job of a whole tract (`tract_job`) uses the same
pieces.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.table import Table, vstack
from numpy.typing import NDArray

from coaddflow.coadd.background_matching import CorrectedWarp, SkyCorrection
from coaddflow.coadd.mean import Coadd, CoaddInput, coadd_patch, exposure_weight
from coaddflow.coadd.picture import write_picture
from coaddflow.coadd.product import write_coadd
from coaddflow.corners.database import CornerDatabase, Rejection, Selection
from coaddflow.files import remove_partial
from coaddflow.geometry import polygon
from coaddflow.geometry.box import Box
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.image.provenance import provenance_header
from coaddflow.settings import Settings
from coaddflow.skymap.tract import Tract
from coaddflow.tables.coadds import coadd_files, coadd_table_path
from coaddflow.tables.manifest import CcdRow
from coaddflow.tables.warps import read_warp_table
from coaddflow.warp.files import WarpFile, WarpReader
from coaddflow.warp.resample import covariance_factor

_LOG = logging.getLogger(__name__)

_WAVELENGTH_ORDER = "KHJYyzIiRrVgGBUu"
"""Filters from red to blue."""

_FOOTPRINT_GROWTH = 1.5
"""Pixels by which the outline of a CCD is enlarged when the CCD is taken out of a warp."""


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
    coadd_table_path(path).unlink(missing_ok=True)
    files = _warps_of_patch(warps, patch)

    def reader_of(exposure: str) -> WarpReader:
        return WarpFile(files[exposure]) if exposure in files else NoWarp()

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
    """A coadd that is to be made.

    Attributes
    ----------
    patch : str
        Patch id.
    inputs : tuple of CoaddInput
        What goes in.
    rejected : tuple of Rejection
        CCDs that were left out, with the reasons.
    manifests : tuple of str
        Manifests of the exposures that go in.
    """

    patch: str
    inputs: tuple[CoaddInput, ...]
    rejected: tuple[Rejection, ...]
    manifests: tuple[str, ...]


class TractInputs:
    """What goes into the coadds of a band on a tract, as its corner database says.

    Parameters
    ----------
    corners : CornerDatabase
        That of the tract; it must stay open.
    tract, band : Tract, str
        Which coadds.
    settings : Settings
        Section selection.
    """

    def __init__(self, corners: CornerDatabase, tract: Tract, band: str, settings: Settings):
        self._corners = corners
        self._tract, self._band, self._cuts = tract, band, settings.selection
        self._manifests = corners.manifests()
        self._figures: dict[str, tuple[float, float]] = {}

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
        """Return what is to be done for a patch.

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
            inputs.append(self._input(exposure, reader, ccds, offset))
        manifests = tuple(self._manifests[exposure] for exposure in selected)
        return PatchWork(patch, tuple(inputs), tuple(selection.rejected), manifests)

    def _input(
        self, exposure: str, reader: WarpReader, ccds: Sequence[CcdRow], offset: float | None
    ) -> CoaddInput:
        weight, seeing = self._figures_of(exposure)
        return CoaddInput(
            exposure=exposure,
            reader=reader,
            weight=weight,
            ccds=",".join(str(ccd.ccd) for ccd in ccds),
            seeing=seeing,
            zero_point=_median(ccds, "zero_point"),
            mjd=ccds[0].mjd,
            exposure_time=ccds[0].exposure_time,
            sky_offset=offset,
        )

    def _figures_of(self, exposure: str) -> tuple[float, float]:
        """Return weight and seeing of a whole exposure, so that overlapping patches agree."""
        if exposure not in self._figures:
            ccds = [row for row in self._corners.ccds(exposure) if row.state == "done"]
            weight = exposure_weight(_figures(ccds, "sky_noise"), _figures(ccds, "zero_point"))
            self._figures[exposure] = (weight, _median(ccds, "seeing"))
        return self._figures[exposure]


def write_patch(
    path: str | Path,
    work: PatchWork,
    database: str | Path,
    tract: Tract,
    band: str,
    settings: Settings,
) -> Coadd:
    """Coadd a patch and write it.

    Parameters
    ----------
    path : str or Path
        The coadd.
    work : PatchWork
        What goes in.
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
        covariance=covariance_factor(settings.warp.kernel),
    )
    coadd = dataclasses.replace(coadd, inputs=with_rejected(coadd.inputs, work.rejected))
    _LOG.info("%d exposures used, %d CCDs left out", len(work.inputs), len(work.rejected))
    sections = settings.section("coadd", "selection")
    cards = provenance_header(sections, [database, *work.manifests])
    cards["FILTER"] = (band, "band")
    cards["PATCH"] = (work.patch, "patch of the tract")
    remove_partial(path)
    write_coadd(path, coadd, tract, cards, settings.products.compression)
    return coadd


def make_picture(path: str | Path, tract: Tract, coadds: Sequence[str | Path]) -> None:
    """Make the picture of a tract from its coadds in all bands: the whole job.

    Parameters
    ----------
    path : str or Path
        The picture.
    tract : Tract
        The tract.
    coadds : sequence of str or Path
        ``.../{band}/{tract}/{patch}.fits``, or the list of a band's coadds
        (``.../{band}/{tract}.ecsv``).
    """
    by_band: dict[str, dict[str, Path]] = {}
    for coadd in coadd_files(coadds):
        by_band.setdefault(coadd.parts[-3], {})[coadd.stem] = coadd
    write_picture(path, tract, {band: by_band[band] for band in reddest_first(by_band)})


def reddest_first(bands: Iterable[str]) -> list[str]:
    """Return bands in the order of the wavelengths that their first letters stand for.

    Bands with other names come last, in the order of their names.
    """
    return sorted(bands, key=lambda band: (_WAVELENGTH_ORDER.find(band[0]) % 100, band))


class NoWarp:
    """The warp of an exposure that has no pixel on a patch."""

    box: Box = (0, 0, 0, 0)

    def read_box(self, box: Box) -> MaskedImage:
        """Return nothing."""
        return MaskedImage.empty((box[3] - box[1], box[2] - box[0]))


class WithoutCcds:
    """A warp in which the pixels of some CCDs count as not measured.

    Parameters
    ----------
    reader : WarpReader
        The warp of an exposure.
    ccds : sequence of CcdRow
        CCDs to take out.
    tract : Tract
        The tract.
    """

    def __init__(self, reader: WarpReader, ccds: Sequence[CcdRow], tract: Tract):
        self.box: Box = reader.box
        self._reader = reader
        self._outlines = [
            _grown(tract.footprint_pixels(ccd.footprint_ra, ccd.footprint_dec)) for ccd in ccds
        ]

    def read_box(self, box: Box) -> MaskedImage:
        """Return the pixels of a box of the tract, which must be inside of ``self.box``."""
        pixels = self._reader.read_box(box)
        # a reader may hand out its own memory
        pixels = MaskedImage(pixels.image.copy(), pixels.variance.copy(), pixels.mask.copy())
        columns = np.arange(box[0], box[2])
        for row, y in enumerate(range(box[1], box[3])):
            for outline in self._outlines:
                inside = polygon.contains(outline, columns, np.full(columns.size, y))
                pixels.image[row, inside] = np.nan
                pixels.variance[row, inside] = np.inf
                pixels.mask[row, inside] |= np.int32(MaskPlane.NO_DATA)
        return pixels


def _grown(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move the vertices of an outline away from its middle."""
    offset = points - points.mean(axis=0)
    distance = np.hypot(*offset.T)[:, None]
    return points + offset / distance * _FOOTPRINT_GROWTH * np.sqrt(2.0)


def with_rejected(inputs: Table, rejected: Sequence[Rejection]) -> Table:
    """Return a coadd's table of inputs with the CCDs that were left out, and the reasons.

    The table gets a column ``reason``, which is empty for what was used; a CCD that was left out
    has a row of its own, with weight 0.
    """
    inputs = inputs.copy()
    inputs["reason"] = np.full(len(inputs), "", "U1")
    if not rejected:
        return inputs
    ccds = [item.overlap.ccd for item in rejected]
    names = [*inputs.colnames]
    left_out = Table(
        {
            "exposure": [ccd.exposure for ccd in ccds],
            "ccds": [str(ccd.ccd) for ccd in ccds],
            "mjd": [ccd.mjd for ccd in ccds],
            "exposure_time": [ccd.exposure_time for ccd in ccds],
            "seeing": _figures(ccds, "seeing"),
            "zero_point": _figures(ccds, "zero_point"),
            "weight": np.zeros(len(ccds)),
            "n_used": np.zeros(len(ccds), np.int64),
            "n_clipped": np.zeros(len(ccds), np.int64),
            "sky_offset": np.full(len(ccds), np.nan),
            "reason": ["; ".join(item.reasons) for item in rejected],
        }
    )
    left_out.keep_columns(names)
    return vstack([inputs, left_out]) if len(inputs) else left_out


def _figures(ccds: Sequence[CcdRow], name: str) -> NDArray[np.float64]:
    return np.array([_or_nan(getattr(ccd, name)) for ccd in ccds])


def _median(ccds: Sequence[CcdRow], name: str) -> float:
    figures = _figures(ccds, name)
    known = figures[np.isfinite(figures)]
    return float(np.median(known)) if known.size else float("nan")


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)
