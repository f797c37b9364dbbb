"""What coadds do not have: exposures that the selection left out, bands and patches without data.

It is told at the end of a run and by `coaddflow status`, from the tables of depths.
"""

from pathlib import Path

from coaddflow.errors import InputError
from coaddflow.tables import paths
from coaddflow.tables.depths import WHOLE_TRACT, DepthRow, read_depth_table
from coaddflow.workflow.plan import Plan

_NAMED = 5


def left_out_lines(plan: Plan, results: str | Path = paths.RESULTS) -> list[str]:
    """Return a line for each band and tract whose coadds lack something that was planned.

    Parameters
    ----------
    plan : Plan
        What there should be.
    results : path
        Folder of the products. Tracts without a readable table of depths are not finished.
    """
    lines = []
    for tract in plan.tracts:
        name = Path(paths.DEPTH_TABLE.format(tract=tract)).relative_to(paths.RESULTS)
        try:
            rows = read_depth_table(Path(results) / name)
        except InputError:
            continue
        for whole in (row for row in rows if row.patch == WHOLE_TRACT):
            patches = [row for row in rows if row.band == whole.band and row is not whole]
            text = _lacks(whole, patches)
            lines += [f"tract {tract}, band {whole.band}: {text}"] if text else []
    return lines


def _lacks(whole: DepthRow, patches: list[DepthRow]) -> str:
    """Return what the coadds of a band on a tract lack; empty if nothing."""
    told = []
    if not whole.n_pixels:
        told.append("the coadds have no data: no CCD with a calexp covers them")
    if whole.n_left_out:
        exposures = whole.left_out.split(",") if whole.left_out else []
        which = f", among them all of {_some('exposure', exposures)}" if exposures else ""
        ccds = f"{whole.n_left_out} CCD{'s' * (whole.n_left_out != 1)}"
        told.append(f"the selection left out {ccds}{which}")
    emptied = [row.patch for row in patches if row.n_left_out and not row.n_pixels]
    if emptied:
        told.append(f"so that nothing is left of {_some('patch', emptied, 'es')}")
    return "; ".join(told)


def _some(what: str, names: list[str], plural: str = "s") -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{what}{plural * (len(names) != 1)} {', '.join(names[:_NAMED])}{more}"
