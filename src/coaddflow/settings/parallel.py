"""Settings of jobs and their workers."""

from typing import Literal

from pydantic import Field

from coaddflow.settings.base import Section


class ParallelSettings(Section):
    """What one job of the scheduler is, and how it distributes its work."""

    calexp: Literal["ccd", "exposure"] = "ccd"
    """`ccd`: one job per CCD, grouped by exposure on a cluster; `exposure`: one job per exposure,
    with the pixels of all its CCDs in memory."""
    coadd: Literal["patch", "tract"] = "patch"
    """`patch`: one job per patch and band, grouped by tract on a cluster; `tract`: one job per
    tract and band, which reads each calexp once."""
    workers: int = Field(8, ge=1)
    """CCDs or patches that a job of an exposure or tract processes at a time, each on a core;
    limited by the cores of the run or node."""
    ccd_threads: int | None = Field(None, ge=1)
    """Cores that share the work on one CCD, or on the warps of an exposure, on its machine. null: 1
    if the run has as many CCDs as cores, or is on a cluster; otherwise its cores over its CCDs."""
    backend: Literal["processes", "serial", "mpi", "dask"] = "processes"
    """How such a job distributes its work: processes on its machine, serially, MPI ranks, or dask
    workers (docs/pool.md)."""
    mpi_command: tuple[str, ...] = Field(("mpirun",), min_length=1)
    """Command that starts MPI ranks; `-n` and their number are appended. `[srun]` inside Slurm."""
    dask_address: str | None = None
    """Dask scheduler (`tcp://...`) or its scheduler file (`....json`); null: workers are started on
    the machine of the job."""

    @property
    def has_workers_here(self) -> bool:
        """Whether workers are on the machine of the job; elsewhere each has one core."""
        elsewhere = self.backend == "dask" and self.dask_address is not None
        return self.backend != "mpi" and not elsewhere
