"""How much memory and time a job of the scheduler needs, from counts of pixels.

The figures per pixel were measured on the stages of this package (docs/workflow.md); they are
upper bounds with some room, since a job that asks for too little is killed, and one that asks for
too much only waits longer. Memory in MB (1e6 bytes), time in minutes.
"""

import math

INTERPRETER_MB = 450
"""Python with the numerical libraries and their compiled kernels."""

CCD_BYTES_PER_PIXEL = 130
"""Raw, image, variance, mask, calibration frames, and the copies that the search for cosmic rays
and sources makes."""

CCD_SECONDS_PER_MPIXEL = 12.0
WARP_BYTES_PER_PIXEL = 40
WARP_SECONDS_PER_MPIXEL = 3.0
COADD_BYTES_PER_PIXEL = 60
COADD_SECONDS_PER_MPIXEL_AND_INPUT = 1.0
CALIB_SECONDS_PER_MPIXEL_AND_FRAME = 2.0
START_SECONDS = 20.0


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
    return _megabytes(2 * stack + CCD_BYTES_PER_PIXEL * n_pixels)


def calib_runtime(n_pixels: int, n_frames: int) -> int:
    """Return the time limit of combining frames of one CCD, minutes."""
    return _minutes(CALIB_SECONDS_PER_MPIXEL_AND_FRAME * n_frames * n_pixels / 1e6)


def warp_memory(ccd_pixels: int, patch_pixels: int) -> int:
    """Return the memory of warping one exposure onto one tract, MB.

    One CCD and the patches that are in work stand in memory at a time.
    """
    return _megabytes(WARP_BYTES_PER_PIXEL * (ccd_pixels + 4 * patch_pixels))


def warp_runtime(exposure_pixels: int) -> int:
    """Return the time limit of warping one exposure onto one tract, minutes."""
    return _minutes(WARP_SECONDS_PER_MPIXEL * exposure_pixels / 1e6)


def coadd_memory(patch_pixels: int, block_mb: float) -> int:
    """Return the memory of one coadd, MB: the patch, and the blocks of all warps in work."""
    return _megabytes(COADD_BYTES_PER_PIXEL * patch_pixels + 3e6 * block_mb)


def coadd_runtime(patch_pixels: int, n_inputs: int) -> int:
    """Return the time limit of one coadd, minutes."""
    return _minutes(COADD_SECONDS_PER_MPIXEL_AND_INPUT * (2 + n_inputs) * patch_pixels / 1e6)


def picture_memory(patch_pixels: int, n_coadds: int) -> int:
    """Return the memory of the picture of a tract, MB: one coadd, and all of them made small."""
    return _megabytes(COADD_BYTES_PER_PIXEL * patch_pixels + 4 * patch_pixels * n_coadds)


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
    return max(math.ceil((START_SECONDS + seconds) / 60.0), 2)
