"""Warps: the pixels of an exposure on the pixels of a tract.

One warp per exposure and patch holds all CCDs of the exposure there, in nJy, with variance and
mask, trimmed to the box that has data. A job goes through the patches of a tract in an order in
which each calexp is read once and only few are in memory at a time.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from astropy.io import fits
from astropy.table import Table
from numpy.typing import NDArray

from coaddflow.errors import InputError
from coaddflow.files import atomic_path, check_id, sha256_of
from coaddflow.geometry.wcs import wcs_to_header
from coaddflow.image.masked_image import (
    AB_ZERO_POINT,
    Compression,
    MaskedImage,
    MaskPlane,
    masked_image_hdus,
    write_fits,
)
from coaddflow.settings.warp import WarpSettings
from coaddflow.warp.mapping import PixelGrid, SkyGrid, footprint_box, map_ccd
from coaddflow.warp.resample import Kernel, Rules, Source, make_kernel, prepare_source, resample

if TYPE_CHECKING:
    from astropy.wcs import WCS

    from coaddflow.skymap.maps import Tract

Box = tuple[int, int, int, int]
"""Half-open box (x0, y0, x1, y1) in tract pixels."""

_ROWS_PER_TASK = 128


@dataclass(frozen=True)
class CcdImage:
    """A calibrated CCD, as `warp_exposure` wants it.

    Attributes
    ----------
    masked_image : MaskedImage
        Pixels, sky subtracted.
    wcs : astropy.wcs.WCS
        Any projection and distortion that astropy knows.
    scale : float
        nJy per unit of the pixels (`flux_scale`).
    """

    masked_image: MaskedImage
    wcs: "WCS"
    scale: float


@dataclass(frozen=True)
class Warp:
    """The pixels of an exposure on a part of a tract.

    Attributes
    ----------
    box : tuple of int
        Where the pixels are on the tract.
    masked_image : MaskedImage
        Pixels in nJy; NaN, infinite variance and NO_DATA where the exposure has no data.
    ccds : tuple of int
        The CCDs that contributed, ascending.
    n_covered : int
        Number of pixels with data.
    """

    box: Box
    masked_image: MaskedImage
    ccds: tuple[int, ...] = ()

    n_covered: int = 0

    def read_box(self, box: Box) -> MaskedImage:
        """Return the pixels of a box of the tract, inside of ``self.box``, without a copy."""
        part = part_of(self.box, box)
        planes = self.masked_image
        return MaskedImage(planes.image[part], planes.variance[part], planes.mask[part])


class WarpReader(Protocol):
    """Where a coadd takes the pixels of a warp from: `Warp` in memory, `WarpFile` on disk."""

    box: Box

    def read_box(self, box: Box) -> MaskedImage:
        """Return the pixels of a box of the tract, which must be inside of ``self.box``."""


def common_box(*boxes: Box) -> Box | None:
    """Return the box of the pixels that all boxes have, or None."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    common = max(x0), max(y0), min(x1), min(y1)
    return common if common[0] < common[2] and common[1] < common[3] else None


def enclosing_box(boxes: Iterable[Box]) -> Box:
    """Return the smallest box that holds all boxes, of which there must be one."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def part_of(whole: Box, box: Box) -> tuple[slice, slice]:
    """Return rows and columns of a box in the pixels of a box around it."""
    rows = slice(box[1] - whole[1], box[3] - whole[1])
    return rows, slice(box[0] - whole[0], box[2] - whole[0])


@dataclass(frozen=True)
class _ReadyCcd:
    """A CCD that waits for the patches that need it."""

    source: Source
    grid: PixelGrid
    box: Box
    scale: float


def _make_ready(ccd: CcdImage, tract: SkyGrid, kernel: Kernel, settings: WarpSettings) -> _ReadyCcd:
    shape = ccd.masked_image.shape
    return _ReadyCcd(
        prepare_source(ccd.masked_image, kernel),
        map_ccd(ccd.wcs, shape, tract, settings.grid_step, settings.grid_tolerance),
        footprint_box(ccd.wcs, shape, tract),
        ccd.scale,
    )


def warp_ccd(
    masked_image: MaskedImage,
    ccd_wcs: "WCS",
    tract: SkyGrid,
    box: Box,
    settings: WarpSettings,
    scale: float = 1.0,
    threads: int = 1,
) -> MaskedImage:
    """Resample one CCD onto a box of tract pixels.

    Parameters
    ----------
    masked_image : MaskedImage
        Pixels of the CCD, shape (ny, nx).
    ccd_wcs : astropy.wcs.WCS
        Its WCS, any projection and distortion.
    tract : Tract
        Anything with ``sky_to_pixel(ra, dec)``.
    box : tuple of int
        Output box (x0, y0, x1, y1) in tract pixels.
    settings : WarpSettings
        Kernel and treatment of flags.
    scale : float
        nJy per unit of the input.
    threads : int
        Rows are shared among so many threads; the result does not depend on it.

    Returns
    -------
    MaskedImage
        Shape (y1 - y0, x1 - x0); see `coaddflow.warp.resample.resample` for fluxes, variances and
        flags. NaN, infinite variance and NO_DATA outside of the CCD.

    Raises
    ------
    InputError
        If the WCS cannot be inverted on the CCD.
    """
    kernel = make_kernel(settings.kernel)
    ready = _make_ready(CcdImage(masked_image, ccd_wcs, scale), tract, kernel, settings)
    target = MaskedImage.empty((box[3] - box[1], box[2] - box[0]))
    _resample_into(target, box, ready, kernel, settings, threads)
    return target


def _resample_into(
    target: MaskedImage,
    box: Box,
    ccd: _ReadyCcd,
    kernel: Kernel,
    settings: WarpSettings,
    threads: int,
) -> int:
    """Fill the pixels of ``target`` that have no data from a CCD; return how many were filled."""
    rules = Rules(ccd.scale, settings.mask_threshold, settings.max_missing)
    first, last = max(ccd.box[1], box[1]) - box[1], min(ccd.box[3], box[3]) - box[1]

    def work(row: int) -> int:
        rows = (row, min(row + _ROWS_PER_TASK, last))
        return resample(ccd.source, ccd.grid, kernel, target, box[:2], rows, rules)

    tasks = range(first, last, _ROWS_PER_TASK)
    if threads == 1:
        return sum(map(work, tasks))
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, tasks))


def order_patches(patch_ccds: Mapping[str, Sequence[int]]) -> list[str]:
    """Order patches so that few CCDs need to be in memory at a time.

    The next patch is the one that needs the fewest CCDs that are not there yet, and among these
    the one that uses the most that are; remaining ties are broken by name.
    """
    remaining = {patch: set(ccds) for patch, ccds in patch_ccds.items()}
    order: list[str] = []
    alive: set[int] = set()
    while remaining:
        patch = min(
            remaining,
            key=lambda p: (len(remaining[p] - alive), -len(remaining[p] & alive), _place(p)),
        )
        alive |= remaining.pop(patch)
        alive &= set().union(*remaining.values())
        order.append(patch)
    return order


def _place(patch: str) -> tuple[int, int]:
    x, y = patch.split("_")
    return int(y), int(x)


def warp_patches(
    tract: "Tract",
    patch_ccds: Mapping[str, Sequence[int]],
    load_calexp: Callable[[int], CcdImage],
    settings: WarpSettings,
    threads: int = 1,
) -> Iterator[tuple[str, Warp | None]]:
    """Warp an exposure patch by patch.

    Each CCD is loaded when the first patch needs it and dropped after the last. Where CCDs of an
    exposure overlap, the pixel is that of the lower CCD number.

    Parameters
    ----------
    tract : Tract
        The tract.
    patch_ccds : mapping of str to sequence of int
        For each patch, the CCDs that overlap it.
    load_calexp : callable
        Gives the `CcdImage` of a CCD; called once for each.
    settings : WarpSettings
        Kernel and treatment of flags.
    threads : int
        Threads for the resampling.

    Yields
    ------
    patch : str
        Patch id, in the order of `order_patches`.
    warp : Warp or None
        Its pixels, trimmed to the box with data; None if the exposure has none there.
    """
    kernel = make_kernel(settings.kernel)
    order = order_patches(patch_ccds)
    last_use = {ccd: patch for patch in order for ccd in patch_ccds[patch]}
    ready: dict[int, _ReadyCcd] = {}
    for patch in order:
        ccds = sorted(set(patch_ccds[patch]))
        for ccd in ccds:
            if ccd not in ready:
                try:
                    ready[ccd] = _make_ready(load_calexp(ccd), tract, kernel, settings)
                except InputError as error:
                    raise _of_ccd(ccd, error) from error
        boxes = {ccd: ready[ccd].box for ccd in ccds}
        box = _reached_box(tract.patch(patch).outer_box, boxes.values())
        warp = None
        if box is not None:
            target = MaskedImage.empty((box[3] - box[1], box[2] - box[0]))
            counts = {
                ccd: _resample_into(target, box, ready[ccd], kernel, settings, threads)
                for ccd in ccds
            }
            warp = trim(target, box, counts)
        for ccd in ccds:
            if last_use[ccd] == patch:
                del ready[ccd]
        yield patch, warp


def warp_whole_ccd(
    number: int, ccd: CcdImage, tract: SkyGrid, outer: Box, settings: WarpSettings
) -> Warp | None:
    """Warp one CCD to all pixels of a tract that it reaches.

    Parameters
    ----------
    number : int
        Its number.
    ccd : CcdImage
        Its pixels.
    tract : Tract
        The tract.
    outer : tuple of int
        Pixels beyond this box of the tract are of no interest.
    settings : WarpSettings
        Kernel and treatment of flags.

    Returns
    -------
    Warp or None
        The same pixels as `warp_patches` gives where no other CCD was before; None if there are
        none.
    """
    kernel = make_kernel(settings.kernel)
    try:
        ready = _make_ready(ccd, tract, kernel, settings)
    except InputError as error:
        raise _of_ccd(number, error) from error
    box = common_box(ready.box, outer)
    if box is None:
        return None
    target = MaskedImage.empty((box[3] - box[1], box[2] - box[0]))
    return trim(target, box, {number: _resample_into(target, box, ready, kernel, settings, 1)})


def _of_ccd(ccd: int, error: InputError) -> InputError:
    """Name the CCD in an error that names no file."""
    if error.path is not None:
        return error
    return InputError(f"CCD {ccd}: {error.cause}", remedy=error.remedy)


def _reached_box(outer: Box, boxes: Iterable[Box]) -> Box | None:
    """Return the part of a patch that boxes of CCDs reach, or None."""
    parts = [part for box in boxes if (part := common_box(box, outer)) is not None]
    return enclosing_box(parts) if parts else None


def trim(target: MaskedImage, box: Box, counts: Mapping[int, int]) -> Warp | None:
    """Return the warp in a box, cut to the pixels with data; None if no CCD gave any.

    ``counts``: pixels that each CCD has given.
    """
    if not any(counts.values()):
        return None
    (y0, y1), (x0, x1) = (_data_span(target.mask, axis) for axis in (0, 1))
    part = slice(y0, y1), slice(x0, x1)
    return Warp(
        (box[0] + x0, box[1] + y0, box[0] + x1, box[1] + y1),
        MaskedImage(target.image[part], target.variance[part], target.mask[part]),
        tuple(ccd for ccd, n in counts.items() if n > 0),
        sum(counts.values()),
    )


def _data_span(mask: NDArray[np.int32], axis: int) -> tuple[int, int]:
    """Return the first and last-plus-one row (or column) with data, looking from both ends."""
    lines = np.moveaxis(mask, axis, 0)

    def has_data(index: int) -> bool:
        return bool(np.any((lines[index] & MaskPlane.NO_DATA) == 0))

    first = next(index for index in range(len(lines)) if has_data(index))
    last = next(index for index in reversed(range(len(lines))) if has_data(index))
    return first, last + 1


# Files


def warp_exposure(
    table_path: str | Path,
    exposure: str,
    tract: "Tract",
    patch_ccds: Mapping[str, Sequence[int]],
    load_calexp: Callable[[int], CcdImage],
    settings: WarpSettings,
    *,
    cards: fits.Header | None = None,
    compression: Compression = "none",
    threads: int = 1,
) -> Table:
    """Warp the CCDs of an exposure to a tract and write the patches and their table.

    The patches go into the folder beside the table that has the exposure's name. What stood
    there from an earlier run is removed first, and the table is written last: where it stands,
    all files that it names are whole.

    Parameters
    ----------
    table_path : str or Path
        ``.../{tract}/{exposure}.ecsv``.
    exposure : str
        Exposure id.
    tract, patch_ccds, load_calexp, settings, threads
        See `warp_patches`. An exposure that touches no patch gets an empty table.
    cards : astropy.io.fits.Header, optional
        Further cards for the primary header of each file (provenance).
    compression : {"none", "lossless", "quantized"}
        See `coaddflow.image.masked_image.image_hdu`; instead of ``quantized`` it is ``lossless``.

    Returns
    -------
    astropy.table.Table
        The table: patch, path (relative to the table's folder), x0, y0, x1, y1 (tract pixels),
        ccds (joined by commas), n_covered (pixels with data), sha256 (of the file).
    """
    warps = warp_patches(tract, patch_ccds, load_calexp, settings, threads)
    return write_warps(table_path, exposure, tract, warps, settings, cards, compression)


def write_warps(
    table_path: str | Path,
    exposure: str,
    tract: "Tract",
    warps: Iterable[tuple[str, Warp | None]],
    settings: WarpSettings,
    cards: fits.Header | None = None,
    compression: Compression = "none",
) -> Table:
    """Write the warps of an exposure on the patches of a tract, and their table last.

    Parameters
    ----------
    warps : iterable of (str, Warp or None)
        Patch id and warp, as `warp_patches` yields them.
    table_path, exposure, tract, settings, cards, compression
        See `warp_exposure`, which also tells about the table.
    """
    table_path = Path(table_path)
    folder = table_path.parent / check_id(exposure, "exposure")
    remove_warps(folder)
    rows = []
    for patch, warp in warps:
        if warp is None:
            continue
        path = folder / f"{patch}.fits"
        header = fits.Header() if cards is None else cards.copy()
        header["EXPOSURE"] = exposure
        header["TRACT"] = tract.id
        header["PATCH"] = patch
        header["KERNEL"] = (settings.kernel, "of the resampling")
        write_warp(path, warp, tract, header, compression)
        ccds = ",".join(map(str, warp.ccds))
        name = path.relative_to(table_path.parent).as_posix()
        rows.append((patch, name, *warp.box, ccds, warp.n_covered, sha256_of(path)))
    table = _make_table(rows, exposure, tract.id)
    with atomic_path(table_path) as temporary:
        table.write(temporary, format="ascii.ecsv", overwrite=True)
    return table


def kept_table(folder: str | Path) -> Path:
    """Return the table of the warps in a folder if the job of a tract has kept them.

    It has a name of its own: that of the rule ``warp`` would promise Snakemake warps of which it
    does not know the settings.
    """
    return Path(folder).with_suffix(".kept.ecsv")


def remove_warps(folder: str | Path) -> None:
    """Remove the warps of an exposure on a tract, ``.../{tract}/{exposure}``, their table first."""
    folder = Path(folder)
    folder.with_suffix(".ecsv").unlink(missing_ok=True)
    kept_table(folder).unlink(missing_ok=True)
    for stale in folder.glob("*.fits"):
        stale.unlink()
    with contextlib.suppress(OSError):  # not there, or something else is in it
        folder.rmdir()


def _make_table(rows: list[tuple], exposure: str, tract: int) -> Table:
    """Return the table of an exposure's warps, ordered by patch."""
    columns = {
        "patch": str,
        "path": str,
        **dict.fromkeys(("x0", "y0", "x1", "y1"), np.int64),
        "ccds": str,
        "n_covered": np.int64,
        "sha256": str,
    }
    rows = sorted(rows, key=lambda row: _place(row[0]))
    values = zip(*rows, strict=True) if rows else [[] for _ in columns]
    table = Table(
        [np.array(list(v), dtype=t) for v, t in zip(values, columns.values(), strict=True)],
        names=list(columns),
    )
    table.meta = {"exposure": exposure, "tract": int(tract)}
    return table


def read_warp_table(path: str | Path) -> Table:
    """Read the table written by `warp_exposure`; raise InputError if it is missing or damaged."""
    try:
        table = Table.read(path, format="ascii.ecsv")
        for name in ("patch", "path", "ccds", "sha256"):
            # a column of one CCD a patch is read as numbers
            table[name] = table[name].astype(str)
        return table
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"is not a table of warps ({error})",
            path=path,
            remedy="remove it and run the workflow again",
        ) from error


def part_header(tract: "Tract", box: Box) -> fits.Header:
    """Return the WCS of a part of a tract, with LTV1/2 that tell where it begins.

    LTVn is the IRAF keyword: ds9 shows tract pixels (1-based) as physical coordinates.
    """
    header = wcs_to_header(tract.wcs())
    header["CRPIX1"] -= box[0]
    header["CRPIX2"] -= box[1]
    header["LTV1"] = (float(-box[0]), "pixel here minus pixel of the tract")
    header["LTV2"] = (float(-box[1]), "pixel here minus pixel of the tract")
    header["PHOTZP"] = (AB_ZERO_POINT, "AB magnitude of one unit")
    return header


def write_warp(
    path: str | Path,
    warp: Warp,
    tract: "Tract",
    cards: fits.Header,
    compression: Compression = "none",
) -> None:
    """Write a warp: primary header with ``cards``; extensions IMAGE, MASK and VARIANCE.

    It is never quantised, since coadds are made from it: they would be rounded twice.
    """
    kept = "lossless" if compression == "quantized" else compression
    hdus = masked_image_hdus(warp.masked_image, part_header(tract, warp.box), "nJy", kept)
    write_fits(path, [fits.PrimaryHDU(header=cards), *hdus])


class WarpFile:
    """A warp on disk, read in parts.

    Parameters
    ----------
    path : str or Path
        A file written by `write_warp`.

    Attributes
    ----------
    path : Path
        The file.
    box : tuple of int
        Its pixels on the tract.

    Raises
    ------
    InputError
        If it is missing, damaged or no warp; also when pixels are read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with fits.open(self.path, memmap=False) as hdus:
                header = hdus["IMAGE"].header
                x0, y0 = round(-header["LTV1"]), round(-header["LTV2"])
                self.box: Box = (x0, y0, x0 + header["NAXIS1"], y0 + header["NAXIS2"])
                self._offsets = {
                    name: hdus[name].fileinfo()["datLoc"]
                    for name in ("IMAGE", "VARIANCE", "MASK")
                    if not isinstance(hdus[name], fits.CompImageHDU)
                }
                self._compressed = len(self._offsets) < 3
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, cause: object) -> InputError:
        return InputError(
            f"is not a readable warp ({cause})",
            path=self.path,
            remedy="remove it and the table beside its folder, and run the workflow again",
        )

    def read_box(self, box: Box) -> MaskedImage:
        """Return the pixels of a box of the tract, which must be inside of ``self.box``."""
        part = part_of(self.box, box)
        try:
            if self._compressed:
                with fits.open(self.path, memmap=False) as hdus:
                    planes = [hdus[n].section[part] for n in ("IMAGE", "VARIANCE", "MASK")]
            else:
                planes = [
                    self._read_plane(name, part, kind)
                    for name, kind in (("IMAGE", "f4"), ("VARIANCE", "f4"), ("MASK", "i4"))
                ]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from error
        return MaskedImage(*planes)

    def _read_plane(self, name: str, part: tuple[slice, slice], kind: str) -> NDArray:
        """Read a part of an uncompressed extension from its place in the file."""
        rows, columns = part
        width = self.box[2] - self.box[0]
        if columns.stop - columns.start < width:
            shape = (self.box[3] - self.box[1], width)
            plane = np.memmap(self.path, f">{kind}", "r", self._offsets[name], shape)
            return plane[part].astype(kind)
        shape = (rows.stop - rows.start, width)
        pixels = np.fromfile(
            self.path,
            dtype=kind,
            count=shape[0] * width,
            offset=self._offsets[name] + rows.start * width * 4,
        )
        if pixels.size < shape[0] * width:
            raise ValueError("file ends early")
        if sys.byteorder == "little":
            # in place, which spares the pass over memory that a conversion costs
            pixels.byteswap(inplace=True)
        return pixels.reshape(shape)
