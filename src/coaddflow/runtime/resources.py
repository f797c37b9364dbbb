"""How much memory and time a job of the scheduler needs, from counts of pixels.

The figures per pixel were measured on the stages of this package: memory with some room, since a
job that asks for too little is killed, and one that asks for too much only waits longer; CPU time
as it is, and time limits several times as long. `coaddflow plan` shows after a run how they
compare with it; docs/slurm.md has such figures. Memory in MB (1e6 bytes), time in minutes.
"""

import math
from collections.abc import Sequence

INTERPRETER_MB = 450
"""Python with the numerical libraries and their kernels, which the first job compiles."""

SNAKEMAKE_MB = 300
"""The two Snakemakes in each job of a cluster."""

SMALL_STEP_MB = 450
"""A step that reads and writes tables, with the Snakemakes of its job."""

CCD_BYTES_PER_PIXEL = 85
"""Raw, image, variance, mask, calibration frames, and the copies that the search for cosmic rays
and sources makes."""

CCD_SECONDS_PER_MPIXEL = 1.4
CALIB_BYTES_PER_PIXEL = 85
CALIB_SECONDS_PER_MPIXEL_AND_FRAME = 0.1
WARP_BYTES_PER_PIXEL = 30
WARP_SECONDS_PER_MPIXEL = 0.1
WARPED_BYTES_PER_PIXEL = 16
"""A patch that is being filled."""

WARPED_PATCHES = 4
"""Patches that one CCD may touch."""

COADD_BYTES_PER_PIXEL = 30
COADD_SECONDS_PER_MPIXEL_AND_INPUT = 0.06
PICTURE_BYTES_PER_PIXEL = 60

STACK_BYTES_PER_PIXEL = 13
"""A warp in the stack of a coadd: image, variance, mask and state."""

STACK_ROWS = (32, 384)
"""Least and most rows of a block of a coadd that is in work at a time (`coaddflow.coadd.mean`)."""

STACK_COPIES = 1.2
"""The stack of a coadd, and what clipping needs beside it."""

STACK_HALO = 60
"""Rows that clipping needs above and below a block at most."""

MATCHING_BYTES_PER_SQUARE = 160
"""The sky of an exposure in a square of the tract, and what solving for planes needs beside it."""

SPOOL_ROOM = 2.3
"""Pixels of the box around a turned CCD on a tract, over those of the CCD, at most."""

HELD_BYTES_PER_PIXEL = 13
"""A CCD that waits in memory until the whole exposure is solved."""

SIGNAL_BYTES_PER_PIXEL = 8
"""The signal of an amplifier that shines into other CCDs, and a copy of it on its way."""

TIME_MARGIN = 8.0
"""A time limit over the CPU time: slow nodes, crowded fields, a file system under load."""

START_SECONDS = 30.0
"""Until a step has loaded its libraries and compiled its kernels, on a busy file system."""


def ccd_memory(n_pixels: int) -> int:
    """Return the memory of calibrating one CCD, MB."""
    return _megabytes(CCD_BYTES_PER_PIXEL * n_pixels)


def ccd_runtime(n_pixels: int) -> int:
    """Return the time limit of calibrating one CCD, minutes."""
    return _minutes(CCD_SECONDS_PER_MPIXEL * n_pixels / 1e6)


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
    return _megabytes(2 * stack + CALIB_BYTES_PER_PIXEL * n_pixels)


def calib_runtime(n_pixels: int, n_frames: int) -> int:
    """Return the time limit of combining frames of one CCD, minutes."""
    return _minutes(CALIB_SECONDS_PER_MPIXEL_AND_FRAME * n_frames * n_pixels / 1e6)


def warp_memory(ccd_pixels: int, patch_pixels: int) -> int:
    """Return the memory of warping one exposure onto one tract, MB.

    One CCD and the patches that are in work stand in memory at a time.
    """
    patches = WARPED_BYTES_PER_PIXEL * WARPED_PATCHES * patch_pixels
    return _megabytes(WARP_BYTES_PER_PIXEL * ccd_pixels + patches)


def warp_runtime(exposure_pixels: int) -> int:
    """Return the time limit of warping one exposure onto one tract, minutes."""
    return _minutes(WARP_SECONDS_PER_MPIXEL * exposure_pixels / 1e6)


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
    return _megabytes(_coadd_bytes(patch_pixels, n_inputs, block_mb))


def _coadd_bytes(patch_pixels: int, n_inputs: int, block_mb: float) -> float:
    side = math.sqrt(patch_pixels)
    pixel = STACK_BYTES_PER_PIXEL * max(n_inputs, 1)
    least, most = STACK_ROWS
    smallest = pixel * (least + 2 * STACK_HALO) ** 2
    largest = pixel * side * (min(most, side) + 2 * STACK_HALO)
    stack = min(max(1e6 * block_mb, smallest), largest)
    return COADD_BYTES_PER_PIXEL * patch_pixels + STACK_COPIES * stack


def coadd_runtime(patch_pixels: int, n_inputs: int) -> int:
    """Return the time limit of one coadd, minutes."""
    return _minutes(COADD_SECONDS_PER_MPIXEL_AND_INPUT * (2 + n_inputs) * patch_pixels / 1e6)


def picture_memory(patch_pixels: int, n_coadds: int) -> int:
    """Return the memory of the picture of a tract, MB: one coadd, and all of them made small."""
    return _megabytes(PICTURE_BYTES_PER_PIXEL * patch_pixels + 4 * patch_pixels * n_coadds)


# ---------------------------------------------------------------------------------------------
# Whole exposures and tracts in one job
# ---------------------------------------------------------------------------------------------


def exposure_memory(n_pixels: Sequence[int], threads: int, holds: bool, crosstalk: bool) -> int:
    """Return the memory of calibrating one exposure in a single job, MB.

    Parameters
    ----------
    n_pixels : sequence of int
        Pixels of each of its CCDs.
    threads : int
        Workers beside the process that gathers; each works on one CCD at a time.
    holds : bool
        Whether they hold their CCDs until the whole exposure is solved.
    crosstalk : bool
        Whether crosstalk between CCDs is corrected.
    """
    workers = sorted(n_pixels, reverse=True)[:threads]
    held = held_memory(n_pixels, crosstalk) if holds else 0
    return INTERPRETER_MB + held + sum(ccd_memory(pixels) for pixels in workers)


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


def exposure_runtime(n_pixels: Sequence[int], threads: int) -> int:
    """Return the time limit of calibrating one exposure in a single job, minutes."""
    rounds = math.ceil(len(n_pixels) / threads)
    return _minutes(rounds * CCD_SECONDS_PER_MPIXEL * max(n_pixels) / 1e6)


def tract_memory(
    ccd_pixels: int,
    all_pixels: int,
    patch_pixels: int,
    n_inputs: int,
    block_mb: float,
    spool_mb: float,
    threads: int,
) -> int:
    """Return the memory of warping and coadding one tract in a single job, MB.

    Parameters
    ----------
    ccd_pixels : int
        Pixels of the largest CCD.
    all_pixels : int
        Pixels of all CCDs that can touch it, together.
    patch_pixels : int
        Pixels of a patch with its border.
    n_inputs : int
        Exposures that can touch one patch, at most.
    block_mb, spool_mb : float
        Settings ``coadd.memory_mb`` and ``coadd.spool_mb``.
    threads : int
        Workers beside the process that gathers; each works on one CCD or patch at a time.
    """
    spool = min(1e6 * spool_mb, HELD_BYTES_PER_PIXEL * SPOOL_ROOM * all_pixels)
    coadding = coadd_memory(patch_pixels, n_inputs, block_mb)
    return _megabytes(spool) + threads * max(warped_ccd_memory(ccd_pixels), coadding)


def warped_ccd_memory(ccd_pixels: int) -> int:
    """Return the memory of warping one CCD to all of its pixels on a tract, MB."""
    return _megabytes(WARP_BYTES_PER_PIXEL * 2 * ccd_pixels)


def divided_memory(
    memory_mb: float, gather_mb: float, worker_mb: float, spool_mb: float, threads: int
) -> tuple[float, float]:
    """Divide the memory of the job of a tract, MB.

    The workers come first: warps that find no room in memory wait in the scratch folder.

    Parameters
    ----------
    memory_mb : float
        What the job has, which may be less than `tract_memory`.
    gather_mb : float
        What the process that gathers needs beside the interpreter.
    worker_mb : float
        What one worker needs at most.
    spool_mb : float
        Setting ``coadd.spool_mb``.
    threads : int
        Workers at most.

    Returns
    -------
    spool, in_work : float
        What the spool may have, and what all items that are in work at a time.
    """
    rest = max(memory_mb - INTERPRETER_MB - gather_mb, 0.0)
    spool = min(max(rest - threads * worker_mb, 0.0), spool_mb)
    return spool, rest - spool


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
    squares = patch_pixels * n_patches / bin_size**2
    return math.ceil(MATCHING_BYTES_PER_SQUARE * n_exposures * squares / 1e6)


def tract_runtime(
    warped_pixels: float, patch_pixels: int, inputs: Sequence[int], threads: int
) -> int:
    """Return the time limit of warping and coadding one tract in a single job, minutes.

    Parameters
    ----------
    warped_pixels : float
        Pixels of all CCDs that can touch it, together.
    patch_pixels : int
        Pixels of a patch with its border.
    inputs : sequence of int
        Exposures that can touch each of its patches.
    threads : int
        Patches in work at a time.
    """
    coadds = sum(2 + n for n in inputs) * COADD_SECONDS_PER_MPIXEL_AND_INPUT * patch_pixels
    rounds = math.ceil(len(inputs) / threads) * threads / max(len(inputs), 1)
    work = rounds * (WARP_SECONDS_PER_MPIXEL * warped_pixels + coadds)
    return _minutes(work / 1e6 / threads)


def task_memory(together: int, workers: int, gathering: int = 0) -> int:
    """Return the memory of each task of a job that scatters over tasks of Slurm, MB.

    Parameters
    ----------
    together : int
        What all workers need, MB.
    workers : int
        Tasks beside the one that gathers.
    gathering : int
        What solving takes in the task that gathers, MB. It may have a node for itself, on which
        the Snakemakes and the process that started it are too.
    """
    gathers = SNAKEMAKE_MB + 2 * INTERPRETER_MB + gathering
    return max(math.ceil(together / workers), gathers)


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


def _megabytes(n_bytes: float) -> int:
    return INTERPRETER_MB + math.ceil(n_bytes / 1e6)


def _minutes(seconds: float) -> int:
    return max(math.ceil((START_SECONDS + TIME_MARGIN * seconds) / 60.0), 5)
