"""The spool: where the warped CCDs of a tract wait for its patches.

A job that coadds a tract warps each CCD once; all patches that the CCD touches then take their
pixels from here. The first ones are kept in memory, as much as the settings allow, the others in
a scratch folder. On one machine neither has a name: they are a few files that are open in the
master and nowhere else, which the workers reach through ``/proc``, and the kernel frees them when
the master ends, however it ends. Where the workers may be on other nodes, a folder that all nodes
share holds one file a CCD. It is removed at the end; that of a job that was killed is removed by
the next job on that machine, if the file system knows locks.
"""

import contextlib
import errno
import fcntl
import glob
import io
import os
import platform
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from coaddflow.errors import InputError
from coaddflow.geometry.box import Box, part_of
from coaddflow.image.fits_hdus import BLOCK
from coaddflow.image.masked_image import MaskedImage
from coaddflow.warp.ccd_psf import CcdPsf, psfs_from_hdu, psfs_hdu

BYTES_PER_PIXEL = 12
"""Image, variance and mask."""

PSF_ROOM = 4 << 20
"""Room behind the pixels for the table of the PSF: it takes what is written in it, 0.1 MB."""

_PLANES = (np.float32, np.float32, np.int32)

_FILES = 16
"""Files of each kind: of workers that write into the same one, all but one wait."""

_ROWS_AT_A_TIME = 512
"""Rows that are written by one call: Linux takes 1024 at most."""


@dataclass(frozen=True)
class SpoolSlot:
    """Room for the pixels of one warp."""

    path: str
    """File, as a worker opens it."""
    offset: int
    """Where the slot begins, bytes."""


@dataclass(frozen=True)
class SpooledWarp:
    """A warp in the spool, as it is sent to workers; `coaddflow.coadd.readers` reads it."""

    slot: SpoolSlot
    """Where its pixels are: image, variance and mask, one after the other."""
    box: Box
    """Its pixels on the tract."""
    psf_bytes: int = 0
    """Length of the table of its PSF, which comes after the pixels."""

    def read_box(self, box: Box) -> MaskedImage:
        """Return the pixels of a box inside of ``self.box``, as the spool has them."""
        shape = (self.box[3] - self.box[1], self.box[2] - self.box[0])
        part = part_of(self.box, box)
        planes = []
        for number, kind in enumerate(_PLANES):
            offset = self.slot.offset + 4 * number * shape[0] * shape[1]
            # writable, which changes no file, like the copies of parts that are not contiguous:
            # compiled functions are compiled for one kind
            plane = np.memmap(self.slot.path, kind, "c", offset, shape)
            planes.append(plane[part])
        return MaskedImage(*planes)

    def read_psfs(self) -> list[CcdPsf]:
        """Return its PSF, if it has one."""
        if not self.psf_bytes:
            return []
        x0, y0, x1, y1 = self.box
        offset = self.slot.offset + BYTES_PER_PIXEL * (x1 - x0) * (y1 - y0)
        content = np.fromfile(self.slot.path, np.uint8, self.psf_bytes, offset=offset)
        return psfs_from_hdu(fits.BinTableHDU.fromstring(content.tobytes()))


def write_warp(
    slot: SpoolSlot, box: Box, pixels: MaskedImage, psfs: Sequence[CcdPsf] = ()
) -> SpooledWarp:
    """Put a warp into its slot of the spool.

    Parameters
    ----------
    slot : SpoolSlot
        Room for at least as many pixels (`Spool.reserve`).
    box : tuple of int
        Where the pixels are on the tract.
    pixels : MaskedImage
        Image, variance and mask inside the box.
    psfs : sequence of CcdPsf
        The PSF of the CCD, if it has one.

    Raises
    ------
    InputError
        If there is no room left on the disk, or the PSF has more samples than any that is fitted.
    """
    table = _table_bytes(psfs)
    if len(table) > PSF_ROOM:
        raise InputError(
            f"the PSF of CCD {psfs[0].ccd} has too many samples to be kept "
            f"({psfs[0].model.basis.size})",
            remedy="reduce psf.radius, psf.samples_per_fwhm or psf.order",
        )
    try:
        descriptor = os.open(slot.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            offset = slot.offset
            for plane in (pixels.image, pixels.variance, pixels.mask):
                offset = _write_rows(descriptor, plane, offset)
            if table:
                _write_rows(descriptor, np.frombuffer(table, np.uint8)[None], offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError(
            f"the warps of the tract cannot be kept: {error.strerror}",
            path=slot.path,
            remedy="free some space, or name another folder in coadd.scratch",
        ) from error
    return SpooledWarp(slot, box, len(table))


def _table_bytes(psfs: Sequence[CcdPsf]) -> bytes:
    """Return the table of PSFs in the form that it has in a FITS file; empty without PSFs."""
    if not psfs:
        return b""
    stream = io.BytesIO()
    psfs_hdu(psfs).writeto(stream)
    # behind an empty primary HDU of one block
    return stream.getvalue()[BLOCK:]


def _write_rows(descriptor: int, plane: NDArray, offset: int) -> int:
    """Write the rows of a plane one after the other; return where they end.

    Rows that are contiguous, as those of a part of an image, are not copied.
    """
    for first in range(0, len(plane), _ROWS_AT_A_TIME):
        rows = plane[first : first + _ROWS_AT_A_TIME]
        written = os.pwritev(descriptor, list(rows), offset)
        if written < rows.nbytes:  # a disk that is nearly full; the next call says so
            rest = np.ascontiguousarray(rows).data.cast("B")[written:]
            while rest.nbytes:
                written = os.pwrite(descriptor, rest, offset + rows.nbytes - rest.nbytes)
                rest = rest[written:]
        offset += rows.nbytes
    return offset


class Spool:
    """Room for the warps of a tract, in a ``with`` block.

    Parameters
    ----------
    memory : int
        Bytes that may be kept in memory.
    scratch : str or Path
        Folder for what goes beyond; it is made if need be.
    one_machine : bool
        Whether all workers are processes of this machine. If not, all warps are in files of
        the folder, which all nodes must have.
    """

    def __init__(self, memory: int, scratch: str | Path, one_machine: bool):
        self._scratch = Path(scratch)
        self._nameless = one_machine and Path("/proc/self/fd").is_dir()
        self._memory = memory if self._nameless and hasattr(os, "memfd_create") else 0
        self.in_memory = self.on_disk = 0
        """Bytes reserved so far in memory and in the scratch folder."""
        self._cleanup = contextlib.ExitStack()
        self._files: dict[str, list[_File]] = {}
        self._folder: Path | None = None

    def __enter__(self) -> Self:
        if not self._nameless:
            self._folder = self._cleanup.enter_context(_shared_folder(self._scratch))
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def reserve(self, n_pixels: int, name: str) -> SpoolSlot:
        """Reserve room for a warp.

        Parameters
        ----------
        n_pixels : int
            Most pixels that it may have.
        name : str
            A name for a file, no two alike.
        """
        n_bytes = BYTES_PER_PIXEL * n_pixels
        if self.in_memory + n_bytes <= self._memory:
            self.in_memory += n_bytes
            return self._slot("memory", n_bytes + PSF_ROOM)
        self.on_disk += n_bytes
        if self._folder is not None:
            return SpoolSlot(str(self._folder / name), 0)
        return self._slot("disk", n_bytes + PSF_ROOM)

    def _slot(self, kind: str, n_bytes: int) -> SpoolSlot:
        """Enlarge a nameless file; what is never written in it takes no room."""
        files = self._files.setdefault(kind, [])
        if len(files) < _FILES:
            files.append(_File(self._open(kind)))
            self._cleanup.callback(os.close, files[-1].descriptor)
        file = min(files, key=lambda one: one.size)
        offset, file.size = file.size, file.size + n_bytes
        os.ftruncate(file.descriptor, file.size)
        return SpoolSlot(f"/proc/{os.getpid()}/fd/{file.descriptor}", offset)

    def _open(self, kind: str) -> int:
        if kind == "memory":
            return os.memfd_create("coaddflow-spool", os.MFD_CLOEXEC)
        with _making(self._scratch), tempfile.TemporaryFile(dir=self._scratch) as stream:
            return os.dup(stream.fileno())


@dataclass
class _File:
    """A nameless file of the spool."""

    descriptor: int
    size: int = 0


@contextlib.contextmanager
def _making(folder: Path):
    """Make the scratch folder; an error names the setting."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(
            f"the scratch folder cannot be used: {error.strerror}",
            path=folder,
            remedy="name another one in coadd.scratch",
        ) from error


@contextlib.contextmanager
def _shared_folder(scratch: Path):
    """Give a folder of its own to this job, and remove it and those of dead jobs of this machine.

    A running job holds a lock in its folder, which the kernel releases when the job ends.
    """
    prefix = f"coaddflow-{platform.node()}-"
    with _making(scratch):
        for folder in scratch.glob(f"{glob.escape(prefix)}*"):
            _remove_if_dead(folder)
        hidden = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=scratch))
        lock = os.open(hidden / "lock", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        # without locks, as on some parallel file systems, no folder counts as dead
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        folder = hidden.rename(scratch / hidden.name[1:])
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError), _own_folder(folder) as inside:
            _remove_locked(folder, inside, lock)


def _remove_if_dead(folder: Path) -> None:
    """Remove the folder of a job of this user that has ended."""
    with contextlib.suppress(OSError), _own_folder(folder) as inside:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        lock = os.open("lock", flags, dir_fd=inside)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return
        _remove_locked(folder, inside, lock)


@contextlib.contextmanager
def _own_folder(path: Path) -> Iterator[int]:
    """Open a folder; raise OSError if it is a link, or of somebody else.

    Others may write in a scratch folder as well. What is opened here stays the same folder,
    whatever they put in its place.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(errno.EPERM, "the folder is not one of this user alone", path)
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_locked(folder: Path, inside: int, lock: int) -> None:
    """Remove a folder of which this process has the lock, and the lock last, when it is closed.

    NFS keeps a file that is open under another name, and with it the folder.
    """
    try:
        for name in os.listdir(inside):
            if name != "lock":
                os.unlink(name, dir_fd=inside)
    finally:
        os.close(lock)
    os.unlink("lock", dir_fd=inside)
    folder.rmdir()
