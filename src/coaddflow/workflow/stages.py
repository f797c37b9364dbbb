"""The registry of stages: everything about a stage that is not its method or its rule.

What a run makes (`rule all`), what makes a job run again, what provenance names, what `coaddflow
plan` counts, what `coaddflow status` looks for and how the jobs of a cluster are called follow
from here. A new stage is an entry here, a rule, a script, and a package.

Standard library only: every job of a cluster and every script imports this first.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from coaddflow.tables import paths

if TYPE_CHECKING:
    from coaddflow.cluster.history import JobNames
    from coaddflow.workflow.plan import Plan

Names = dict[str, str]
"""Wildcards and their values: ``{"exposure": "1001", "ccd": "3"}``."""


# Units: what one job, or one product, is about ---------------------------------------------------


def _survey(plan: "Plan") -> Iterator[Names]:
    yield {}


def _each(name: str, attribute: str) -> Callable[["Plan"], Iterator[Names]]:
    """Return a function that lists what an attribute of a plan holds, under a name."""
    return lambda plan: ({name: str(value)} for value in getattr(plan, attribute))


_exposures = _each("exposure", "exposures")
_raw_exposures = _each("exposure", "science")
_imported_exposures = _each("exposure", "images")
_tracts = _each("tract", "tracts")


def _ccds(exposures: Callable[["Plan"], Iterator[Names]]) -> Callable[["Plan"], Iterator[Names]]:
    """Return a function that lists the CCDs of some exposures of a plan."""

    def ccds(plan: "Plan") -> Iterator[Names]:
        for names in exposures(plan):
            for ccd in plan.ccds_of(names["exposure"]):
                yield names | {"ccd": str(ccd)}

    return ccds


def _exposures_on_tracts(plan: "Plan") -> Iterator[Names]:
    for exposure in plan.exposures:
        for tract in plan.overlaps[exposure]:
            yield {"exposure": exposure, "tract": str(tract)}


def _bands_of_tracts(plan: "Plan") -> Iterator[Names]:
    for tract in plan.tracts:
        for band in plan.bands:
            if plan.exposures_of_tract(tract, band):
                yield {"band": band, "tract": str(tract)}


def _patches(plan: "Plan") -> Iterator[Names]:
    for tract in plan.tracts:
        for band in plan.bands:
            for patch in plan.patches_of(band, tract):
                yield {"band": band, "tract": str(tract), "patch": patch}


def _calibration_frames(kind: str) -> Callable[["Plan"], Iterator[Names]]:
    """Return a function that lists the calibration frames of a kind that a plan makes."""

    def frames(plan: "Plan") -> Iterator[Names]:
        if not plan.science or getattr(plan.settings.calibs, kind).source == "given":
            return
        for band, name in plan.calib_units[kind]:
            for ccd in plan.ccds:
                yield {"ccd": str(ccd)} | _known(band=band, set=name)

    return frames


def _known(**names: str | None) -> Names:
    """Return wildcards without those that a product does not have."""
    return {name: value for name, value in names.items() if value}


def _frame_tables(plan: "Plan") -> Iterator[Names]:
    for kind in paths.CALIB_KINDS if plan.science else ():
        for band, name in plan.calib_units[kind]:
            if plan.frame_table(kind, band, name) is not None:
                yield {"frames": paths.frames_id(kind, band, name)}


def _tables_of_calibs(plan: "Plan") -> Iterator[Names]:
    for band, all_taken in plan.all_sets_taken.items():
        for taken in all_taken:
            if plan.calib_table(band, taken) is not None:
                yield {"band": band} | _known(set=taken)


# When a stage is part of a run -------------------------------------------------------------------


def _always(plan: "Plan") -> bool:
    return True


def _from_raw(plan: "Plan") -> bool:
    return bool(plan.science)


def _ccd_by_ccd(plan: "Plan") -> bool:
    return plan.settings.parallel.calexp == "ccd"


def _patch_by_patch(plan: "Plan") -> bool:
    return plan.settings.parallel.coadd == "patch"


class Product(NamedTuple):
    """A kind of file that a stage makes."""

    path: str
    """Template, relative to the working folder."""
    units: Callable[["Plan"], Iterable[Names]]
    """What there is one of, in a plan."""
    label: str = ""
    """What ``coaddflow status`` calls them, in plural; empty: they are not listed there."""
    sets_of: tuple[str, ...] = ()
    """Kinds of calibration frames whose set its path has, where they have sets."""

    def template(self, plan: "Plan") -> str:
        """Return the template of its path in a plan."""
        has_set = any(plan.calib_sets.in_paths(kind) for kind in self.sets_of)
        return paths.in_set(self.path) if has_set else self.path

    def file(self, names: Names) -> str:
        """Return the file of some wildcards."""
        template = paths.in_set(self.path) if "set" in names else self.path
        return template.format(**names)

    def files(self, plan: "Plan") -> list[str]:
        """Return the files of this kind that a plan makes."""
        return [self.file(names) for names in self.units(plan)]


@dataclass(frozen=True)
class Stage:
    """A stage of the workflow."""

    name: str
    """Name of its rule, and of its folder of logs."""
    products: tuple[Product, ...]
    """What it makes. The first is what its job promises Snakemake, and is written last."""
    sections: tuple[str, ...] = ()
    """Sections of the settings that its products depend on, and that provenance names."""
    reads: tuple[str, ...] = ()
    """What its params have besides: "skymap", "camera", and the tables "exposures" and "images"."""
    version: int = 1
    """Raised when its results change for the same settings and input: its jobs, and all that depend
    on them, then run again."""
    includes: tuple[str, ...] = ()
    """Stages whose work its job does as well."""
    group: str = ""
    """Jobs that go to a cluster as one, with wildcards; empty: each by itself."""
    is_planned: Callable[["Plan"], bool] = _always
    """Whether the stage is part of a plan."""
    is_target: bool = True
    """Whether a run asks for its products by name. Those of single CCDs are asked for by their
    exposure."""
    is_local: bool = False
    """Whether its jobs are so small that the Snakemake of the run does them itself, also where
    others go to a cluster."""
    after: tuple[str, ...] = ()
    """Stages of the same group whose products it takes."""
    scatters: bool = False
    """Whether its job scatters its work over workers."""
    needs_most: bool = False
    """Whether its job needs most among those of its group: its memory and time are to be raised."""

    @property
    def versions(self) -> dict[str, int]:
        """Versions of the stage and of those that it includes."""
        return {self.name: self.version} | {name: STAGES[name].version for name in self.includes}

    def group_in(self, plan: "Plan") -> str:
        """Return the group of its jobs in a plan.

        With MPI the bands of a tract are jobs of their own: Snakemake would add the CPUs of a task
        to those of the other bands, and not only the tasks.
        """
        by_band = plan.settings.parallel.backend == "mpi" and not _patch_by_patch(plan)
        has_band = "{band}" in self.products[0].path
        return self.group + "_{band}" * (self.group == _TRACT and by_band and has_band)

    def token(self, names: Names) -> str:
        """Return the name of the token that one of its jobs must have to write (`fence`).

        It is what the job promises, such as ``summary_1001.ecsv`` or ``coadd_r_0_2_4.fits``. Not
        its group: steps of a group that do not depend on each other, such as the flats of two
        bands, may be jobs of their own that run side by side.
        """
        return self.products[0].file(names).removeprefix(f"{paths.RESULTS}/").replace("/", "_")

    def files(self, plan: "Plan") -> list[str]:
        """Return all files that the stage makes in a plan; none if it is not part of it."""
        if not self.is_planned(plan):
            return []
        return [path for product in self.products for path in product.files(plan)]

    def units(self, plan: "Plan") -> Iterable[Names]:
        """Return the wildcards of its jobs in a plan; none if it is not part of it."""
        return self.products[0].units(plan) if self.is_planned(plan) else ()

    def targets(self, plan: "Plan") -> list[str]:
        """Return the files of the stage that a run asks for by name."""
        if not (self.is_target and self.is_planned(plan)):
            return []
        return self.products[0].files(plan)

    def files_by_job(self, plan: "Plan") -> Iterator[tuple[str, str]]:
        """Yield each file that must be there in the end, with the job of a cluster that makes it.

        The job is named by its group, such as ``tract_0``, or by the stage if it has none.
        """
        if not self.is_planned(plan):
            return
        for product in self.products:
            wanted = product.label or (self.is_target and product is self.products[0])
            for names in product.units(plan) if wanted else ():
                yield product.file(names), self.group.format(**names) or self.name


_CALEXP_SECTIONS = (
    "detrend",
    "cosmics",
    "interpolation",
    "background",
    "detection",
    "psf",
    "astrometry",
    "photometry",
    "refcat",
    "products",
)
_IMPORT_SECTIONS = ("calibrated", "background", "detection", "psf", "photometry", "products")
_CALIB_SECTIONS = ("calibs", "detrend", "products")
_COADD_SECTIONS = ("coadd", "selection", "warp", "products")
_RAW = ("camera", "exposures")

_EXPOSURE = "exposure_{exposure}"
_TRACT = "tract_{tract}"
_CALIBS = "calibs_{ccd}"


def _defects_from(stage: str) -> Callable[["Plan"], bool]:
    """Return whether a plan has the defects of a stage: of the night sky, or of dark and flats."""

    def is_planned(plan: "Plan") -> bool:
        night_sky = plan.settings.calibs.defects.source == "night_sky"
        return bool(plan.science) and night_sky == (stage == "night_sky_defects")

    return is_planned


CALIB_STAGES = {
    "master_bias": "bias",
    "master_dark": "dark",
    "master_flat": "flat",
    "defects": "defects",
    "night_sky_defects": "defects",
}
"""Kinds of calibration frames, by the stages that make them, in their order."""

_CALIB_PATHS = {"master_flat": paths.FLAT, "defects": paths.DEFECTS}


def _master(name: str, kind: str) -> Stage:
    path = _CALIB_PATHS.get(name, paths.CALIB.replace("{kind}", kind))
    return Stage(
        name,
        (Product(path, _calibration_frames(kind), sets_of=(kind,)),),
        _CALIB_SECTIONS,
        _RAW,
        version=2,
        group=_CALIBS,
        is_planned=_defects_from(name) if kind == "defects" else _from_raw,
        needs_most=kind == "flat",
    )


_ALL = (
    Stage(
        "frame_table",
        (Product(paths.FRAME_TABLE, _frame_tables),),
        reads=("exposures",),
        is_planned=_from_raw,
        is_local=True,
    ),
    *(_master(name, kind) for name, kind in CALIB_STAGES.items()),
    Stage(
        "calib_table",
        (Product(paths.CALIB_TABLE, _tables_of_calibs, sets_of=paths.CALIB_KINDS),),
        is_planned=lambda plan: _from_raw(plan) and not _ccd_by_ccd(plan),
        is_local=True,
    ),
    Stage(
        "calexp",
        (
            Product(paths.ROW, _ccds(_raw_exposures)),
            Product(paths.CALEXP, _ccds(_raw_exposures)),
            Product(paths.SOURCES, _ccds(_raw_exposures)),
        ),
        _CALEXP_SECTIONS,
        _RAW,
        version=4,
        group=_EXPOSURE,
        is_planned=lambda plan: _from_raw(plan) and _ccd_by_ccd(plan),
        is_target=False,
        needs_most=True,
    ),
    Stage(
        "calibrated",
        (
            Product(paths.ROW, _ccds(_imported_exposures)),
            Product(paths.CALEXP, _ccds(_imported_exposures)),
        ),
        _IMPORT_SECTIONS,
        ("images",),
        version=4,
        group=_EXPOSURE,
        is_planned=lambda plan: bool(plan.images) and _ccd_by_ccd(plan),
        is_target=False,
        needs_most=True,
    ),
    Stage(
        "manifest",
        (Product(paths.MANIFEST, _exposures),),
        reads=("exposures",),
        group=_EXPOSURE,
        is_planned=_ccd_by_ccd,
        after=("calexp", "calibrated"),
    ),
    Stage(
        "exposure",
        (Product(paths.MANIFEST, _raw_exposures),),
        (*_CALEXP_SECTIONS, "exposure"),
        _RAW,
        includes=("calexp", "manifest"),
        group=_EXPOSURE,
        is_planned=lambda plan: _from_raw(plan) and not _ccd_by_ccd(plan),
        needs_most=True,
        scatters=True,
        version=2,
    ),
    Stage(
        "calibrated_exposure",
        (Product(paths.MANIFEST, _imported_exposures),),
        _IMPORT_SECTIONS,
        ("images",),
        includes=("calibrated", "manifest"),
        group=_EXPOSURE,
        is_planned=lambda plan: bool(plan.images) and not _ccd_by_ccd(plan),
        needs_most=True,
        scatters=True,
    ),
    Stage(
        "tract_corners",
        (Product(paths.TRACT_CORNERS, _bands_of_tracts, "corner databases"),),
        reads=("skymap",),
        version=3,
        group=_TRACT,
    ),
    Stage(
        "survey_corners",
        (Product(paths.SURVEY_CORNERS, _survey, "corner databases"),),
        ("prediction",),
        ("skymap",),
        version=3,
    ),
    Stage(
        "warp",
        (Product(paths.WARP_TABLE, _exposures_on_tracts),),
        ("warp", "products"),
        ("skymap",),
        version=4,
        group=_TRACT,
        is_planned=_patch_by_patch,
    ),
    Stage(
        "coadd",
        (Product(paths.COADD, _patches, "coadds"),),
        _COADD_SECTIONS,
        ("skymap",),
        version=4,
        group=_TRACT,
        is_planned=_patch_by_patch,
        needs_most=True,
        after=("tract_corners", "warp"),
    ),
    Stage(
        "tract",
        (
            Product(paths.COADD_TABLE, _bands_of_tracts, "lists of coadds"),
            Product(paths.COADD, _patches, "coadds"),
        ),
        _COADD_SECTIONS,
        ("skymap",),
        version=4,
        includes=("warp", "coadd"),
        group=_TRACT,
        is_planned=lambda plan: not _patch_by_patch(plan),
        needs_most=True,
        after=("tract_corners",),
        scatters=True,
    ),
    Stage(
        "picture",
        (Product(paths.PICTURE, _tracts, "pictures"),),
        reads=("skymap",),
        version=2,
        group=_TRACT,
        after=("coadd", "tract"),
    ),
    Stage(
        "depth",
        (
            Product(paths.DEPTH_TABLE, _tracts, "depth tables"),
            Product(paths.DEPTH, _patches, "depth maps"),
        ),
        ("products",),
        ("skymap",),
        version=3,
        group=_TRACT,
        after=("coadd", "tract"),
    ),
)

STAGES = {stage.name: stage for stage in _ALL}
"""All stages, in the order of the data."""


def targets(plan: "Plan") -> list[str]:
    """Return the files that a run of the whole plan asks for.

    Manifests, tables of warps, databases and calibration frames are among them although coadds
    depend on them: Snakemake does not miss an intermediate file that a failed job has taken away
    as long as the older files made from it are there, and the next run would call them up to date.
    """
    files = (path for stage in STAGES.values() for path in stage.targets(plan))
    return list(dict.fromkeys(files))


def files_by_job(plan: "Plan") -> dict[str, list[str]]:
    """Return what each job of a cluster makes, by the name of its group or stage."""
    found: dict[str, list[str]] = {}
    for stage in STAGES.values():
        for path, job in stage.files_by_job(plan):
            found.setdefault(job, []).append(path)
    return found


def files_by_label(plan: "Plan") -> dict[str, list[str]]:
    """Return the products of tracts and survey by what they are called in plural."""
    found: dict[str, list[str]] = {}
    for stage in _planned(plan):
        for product in stage.products:
            if product.label:
                found.setdefault(product.label, []).extend(product.files(plan))
    return found


def promises_by_label(plan: "Plan") -> dict[str, str]:
    """Return what must be removed before a run makes missing products again, by their label.

    Snakemake only knows what a job promises, which is the first product of its stage.
    """
    return {
        product.label: stage.products[0].path
        for stage in _planned(plan)
        for product in stage.products[1:]
        if product.label
    }


def _planned(plan: "Plan") -> Iterator[Stage]:
    return (stage for stage in STAGES.values() if stage.is_planned(plan))


def job_names() -> "JobNames":
    """Return how the jobs of a cluster are called: groups, and the stages that make them."""
    from coaddflow.cluster.history import JobNames

    groups = dict.fromkeys(stage.group for stage in STAGES.values() if stage.group)
    return JobNames(
        {
            group: sorted(
                (name for name, stage in STAGES.items() if stage.group == group),
                key=lambda name: not STAGES[name].needs_most,
            )
            for group in groups
        }
    )
