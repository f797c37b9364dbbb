"""Settings of how the work is divided."""

from typing import Literal

from pydantic import Field

from coaddflow.settings.base import Section


class ParallelSettings(Section):
    """What one job of the scheduler is, and how it scatters its work."""

    calexp: Literal["ccd", "exposure"] = Field(
        "ccd",
        description="`ccd`: one job per CCD, grouped per exposure on a cluster; `exposure`: one "
        "job per exposure, which scatters its CCDs and keeps their pixels in memory.",
    )
    coadd: Literal["patch", "tract"] = Field(
        "patch",
        description="`patch`: one job per patch and band, grouped per tract on a cluster; "
        "`tract`: one job per tract and band, which reads each calexp once and scatters.",
    )
    workers: int = Field(
        8,
        ge=1,
        description="Cores of a job of an exposure or tract: so many CCDs or patches are worked "
        "on side by side. Not more are taken than the run or the node has.",
    )
    backend: Literal["processes", "serial", "mpi", "dask"] = Field(
        "processes",
        description="How such a job scatters: over processes of its machine, not at all, over "
        "the ranks of MPI, or over the workers of dask (docs/pool.md).",
    )
    mpi_command: tuple[str, ...] = Field(
        ("mpirun",),
        min_length=1,
        description="What starts the ranks of MPI; `-n` and their number are added. `[srun]` "
        "inside Slurm.",
    )
    dask_address: str | None = Field(
        None,
        description="Scheduler of dask (`tcp://...`) or its scheduler file (`....json`); null: "
        "its workers are started on the machine of the job.",
    )
