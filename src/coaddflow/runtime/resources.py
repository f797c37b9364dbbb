"""Memory and CPU time of one CCD, one warp, one patch, from counts of pixels.

The figures per pixel were measured on the stages of this package: memory with some room, since a
job that asks for too little is killed, and one that asks for too much only waits longer; CPU time
as it is, and time limits several times as long. `coaddflow plan` shows after a run how they
compare with it; docs/slurm.md has such figures. Memory in MB (1e6 bytes). What a job of the
scheduler asks for is put together from these in `coaddflow.workflow.needs`.
"""

import math
from collections.abc import Iterable, Sequence

MASTER_MB = 150
"""A process that gathers what its workers send: Python with the libraries for tables. 140 to 190
were measured."""

PLAIN_MB = 220
"""Python with the libraries for images, without compiled kernels: 150 to 220."""

KERNELS_MB = 320
"""The same with compiled kernels: 205 to 230 when they are loaded, 250 to 350 where a job is the
first of all and compiles them, which it need not after `coaddflow compile`."""

COADD_MB = 345
"""The same with those of coadds and of the stars that are drawn for their PSF: 225 when they are
loaded, 330 where they are compiled."""

CALIB_MB = 380
"""The same with those of calibration frames: 200 to 220 when they are loaded, 300 to 375 where they
are compiled."""

CCD_MB = 450
"""The same with all kernels of a CCD: 250 when they are loaded, 390 where a match is searched for
long, 415 where they are compiled."""

CCD_BYTES_PER_PIXEL = 70
"""Raw, image, variance, mask, calibration frames, and the copies that the search for cosmic rays
and sources makes."""

CCD_SECONDS_PER_MPIXEL = 0.6
CALIB_BYTES_PER_PIXEL = 50
CALIB_SECONDS_PER_MPIXEL_AND_FRAME = 0.07
WARP_BYTES_PER_PIXEL = 30
WARP_SECONDS_PER_MPIXEL = 0.07
WARPED_BYTES_PER_PIXEL = 16
"""A patch that is being filled."""

WARPED_PATCHES = 4
"""Patches that one CCD may touch."""

COADD_BYTES_PER_PIXEL = 30
COADD_SECONDS_PER_MPIXEL_AND_INPUT = 0.04
DEPTH_BYTES_PER_PIXEL = 60
"""A coadd that is read for its depth map: image, variance, mask and number of inputs, and the map
and its copies in double precision; 50 were measured, with each compression."""

DEPTH_SECONDS_PER_MPIXEL = 0.15
READ_COADD_BYTES_PER_PIXEL = 60
"""A patch that is read for the picture of its tract."""

PICTURE_BYTES_PER_PIXEL = 165
"""A pixel of that picture in three bands, and what mixing their colours needs beside it."""

PICTURE_SIDE = 2000
"""Most columns and rows of it."""

FLAGGED_FRACTION = 0.005
"""Pixels of an exposure that are flagged or clipped."""

PIXELS_PER_SET = 4
"""Pixels that have the same set of exposures where two or more are flagged."""

SET_COPIES = 3
"""The bits of a set, and their copies while the sets of a coadd are put together and written."""

PSF_BYTES = 100_000
"""The PSF of a CCD."""

STACK_BYTES_PER_PIXEL = 13
"""A warp in the stack of a coadd: image, variance, mask and state."""

STACK_ROWS = (32, 384)
"""Least and most rows of a block of a coadd that is in work at a time (`coaddflow.coadd.mean`)."""

STACK_COPIES = 1.2
"""The stack of a coadd, and what clipping needs beside it."""

STACK_HALO = 60
"""Rows that clipping needs above and below a block at most."""

MATCHING_BYTES_PER_CELL = 200
"""The sky of an exposure in a cell of the tract, and what comparing the cells needs beside it."""

MATCHING_CELLS = 4_000_000
"""Cells of all exposures that are compared at most: of more cells a part is taken."""

SPOOL_ROOM = 2.3
"""Pixels of the box around a CCD on a tract, over those of the CCD, where it is not known how it is
turned: those of one turned by 45 degrees that is twice as long as wide."""

HELD_BYTES_PER_PIXEL = 13
"""A CCD that waits in memory until the whole exposure is solved."""

SIGNAL_BYTES_PER_PIXEL = 8
"""The signal of an aggressor amplifier of crosstalk, and a copy of it on its way."""

TIME_MARGIN = 8.0
"""A time limit over the CPU time: slow nodes, crowded fields, a file system under load."""

START_SECONDS = 30.0
"""Until a step has loaded its libraries and compiled its kernels, on a busy file system."""


def ccd_memory(n_pixels: int) -> int:
    """Return the memory of calibrating one CCD, MB."""
    return _megabytes(CCD_MB, CCD_BYTES_PER_PIXEL * n_pixels)


def ccd_seconds(n_pixels: int) -> float:
    """Return the CPU time of calibrating one CCD, s."""
    return CCD_SECONDS_PER_MPIXEL * n_pixels / 1e6


def calib_memory(n_pixels: int, n_frames: int, stack_gb: float) -> int:
    """Return the memory of combining frames of one CCD, MB.

    Parameters
    ----------
    n_pixels : int
        Pixels of the CCD.
    n_frames : int
        Frames that are combined.
    stack_gb : float
        Size from which the stack stands on disk (settings ``calibs.memory``), GB.
    """
    stack = min(4 * n_pixels * n_frames, 1e9 * stack_gb)
    return _megabytes(CALIB_MB, 2 * stack + CALIB_BYTES_PER_PIXEL * n_pixels)


def calib_seconds(n_pixels: int, n_frames: int) -> float:
    """Return the CPU time of combining frames of one CCD, s."""
    return CALIB_SECONDS_PER_MPIXEL_AND_FRAME * n_frames * n_pixels / 1e6


def defects_memory(n_pixels: int) -> int:
    """Return the memory of finding defects on calibration frames, MB."""
    return _megabytes(CALIB_MB, CALIB_BYTES_PER_PIXEL * n_pixels)


def warp_memory(ccd_pixels: int, patch_pixels: int, n_patches: int = WARPED_PATCHES) -> int:
    """Return the memory of warping one exposure onto one tract, MB.

    One CCD and the patches that are in work, ``n_patches`` at most, stand in memory at a time.
    """
    patches = WARPED_BYTES_PER_PIXEL * n_patches * patch_pixels
    return _megabytes(KERNELS_MB, WARP_BYTES_PER_PIXEL * ccd_pixels + patches)


def warp_seconds(n_pixels: int) -> float:
    """Return the CPU time of warping so many pixels of CCDs, s."""
    return WARP_SECONDS_PER_MPIXEL * n_pixels / 1e6


def warped_ccd_memory(ccd_pixels: int, tract_pixels: float = math.inf) -> int:
    """Return the memory of warping one CCD to all of its pixels on a tract, MB."""
    on_tract = min(ccd_pixels, tract_pixels)
    return _megabytes(KERNELS_MB, WARP_BYTES_PER_PIXEL * (ccd_pixels + on_tract))


def coadd_memory(patch_pixels: int, n_inputs: int, block_mb: float) -> int:
    """Return the memory of one coadd, MB: the patch, and the blocks of all warps in work.

    Parameters
    ----------
    patch_pixels : int
        Pixels of the patch with its border.
    n_inputs : int
        Exposures that can touch it.
    block_mb : float
        Setting ``coadd.memory_mb``.
    """
    side = math.sqrt(patch_pixels)
    pixel = STACK_BYTES_PER_PIXEL * max(n_inputs, 1)
    least, most = STACK_ROWS
    smallest = pixel * (least + 2 * STACK_HALO) ** 2
    largest = pixel * side * (min(most, side) + 2 * STACK_HALO)
    stack = min(max(1e6 * block_mb, smallest), largest)
    flagged = n_inputs * FLAGGED_FRACTION
    # of the pixels at which two or more values are not used, whose set of inputs is rare
    n_sets = patch_pixels * (1.0 - (1.0 + flagged) * math.exp(-flagged)) / PIXELS_PER_SET
    sets = SET_COPIES * n_sets * (n_inputs / 8 + 10)
    patch = COADD_BYTES_PER_PIXEL * patch_pixels
    return _megabytes(COADD_MB, patch + STACK_COPIES * stack + sets + PSF_BYTES * n_inputs)


def tract_work_memory(
    workers: int, n_ccds: int, warping: int, n_patches: int, coadding: int
) -> int:
    """Return the memory of all that warp the CCDs of a tract and then coadd its patches, MB.

    Parameters
    ----------
    workers : int
        Processes that work.
    n_ccds, n_patches : int
        How many CCDs and patches there are for them.
    warping, coadding : int
        Memory of one that warps a CCD (`warped_ccd_memory`) or coadds a patch (`coadd_memory`), MB.
    """
    # a worker without a patch has loaded the kernels, too
    patches = min(workers, n_patches) * (coadding - KERNELS_MB) + workers * KERNELS_MB
    return max(min(workers, n_ccds) * warping, patches)


def coadd_seconds(patch_pixels: int, n_inputs: int) -> float:
    """Return the CPU time of one coadd, s."""
    return COADD_SECONDS_PER_MPIXEL_AND_INPUT * (2 + n_inputs) * patch_pixels / 1e6


def picture_memory(patch_pixels: int, n_patches: int) -> int:
    """Return the memory of the picture of a tract, MB."""
    picture = PICTURE_BYTES_PER_PIXEL * min(PICTURE_SIDE**2, n_patches * patch_pixels)
    return _megabytes(PLAIN_MB, READ_COADD_BYTES_PER_PIXEL * patch_pixels + picture)


def depth_memory(patch_pixels: int) -> int:
    """Return the memory of the depth maps of a tract, MB: one patch stands in memory at a time."""
    return _megabytes(PLAIN_MB, DEPTH_BYTES_PER_PIXEL * patch_pixels)


def held_memory(n_pixels: Sequence[int], crosstalk: bool) -> int:
    """Return the memory of all CCDs of an exposure that wait until it is solved, MB.

    Parameters
    ----------
    n_pixels : sequence of int
        Pixels of each of its CCDs.
    crosstalk : bool
        Whether the signals of their amplifiers wait as well.
    """
    each = HELD_BYTES_PER_PIXEL + (SIGNAL_BYTES_PER_PIXEL if crosstalk else 0)
    return math.ceil(each * sum(n_pixels) / 1e6)


def box_room(nx: int, ny: int, rotation: float | None) -> float:
    """Return the pixels of the upright box around a turned CCD, over those of the CCD.

    Parameters
    ----------
    nx, ny : int
        Columns and rows of the CCD.
    rotation : float or None
        How it is turned, degrees; None: unknown.
    """
    if rotation is None:
        return SPOOL_ROOM
    cosine, sine = (abs(part(math.radians(rotation))) for part in (math.cos, math.sin))
    return (nx * cosine + ny * sine) * (nx * sine + ny * cosine) / (nx * ny)


def spool_memory(boxes: Iterable[float], tract_pixels: int, spool_mb: float) -> int:
    """Return the memory of the warps of a tract that wait for their patches, MB.

    Parameters
    ----------
    boxes : iterable of float
        Pixels of the box around each CCD that can touch the tract.
    tract_pixels : int
        Pixels of the tract, beyond which no box reaches.
    spool_mb : float
        Setting ``coadd.spool_mb``: what they may have; the others wait on disk.
    """
    pixels = sum(min(box, tract_pixels) for box in boxes)
    return math.ceil(min(spool_mb, HELD_BYTES_PER_PIXEL * pixels / 1e6))


def matching_memory(n_exposures: int, patch_pixels: int, n_patches: int, bin_size: int) -> int:
    """Return what background matching needs beside that in the process that gathers, MB.

    Parameters
    ----------
    n_exposures : int
        Exposures of the band on the tract.
    patch_pixels, n_patches : int
        Pixels of a patch, and patches.
    bin_size : int
        Setting ``coadd.background_matching.bin_size``.
    """
    cells = min(n_exposures * patch_pixels * n_patches / bin_size**2, MATCHING_CELLS)
    # a matrix of all coefficients, its eigenvectors, and two copies
    matrices = 4 * 8 * (3 * n_exposures) ** 2
    return math.ceil((MATCHING_BYTES_PER_CELL * cells + matrices) / 1e6)


def time_limit(seconds: float) -> int:
    """Return the time limit of a step that takes so long when nothing hinders it, minutes."""
    return max(math.ceil((START_SECONDS + TIME_MARGIN * seconds) / 60.0), 5)


def machine_memory() -> int:
    """Return the memory that this process may use, MB: the machine's, or its container's."""
    import psutil

    available = psutil.virtual_memory().total
    for limit_file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(limit_file, encoding="ascii") as stream:  # noqa: PTH123
                available = min(available, int(stream.read()))
        except (OSError, ValueError):
            continue
    return int(available / 1e6)


def _megabytes(at_rest: int, n_bytes: float) -> int:
    return at_rest + math.ceil(n_bytes / 1e6)
