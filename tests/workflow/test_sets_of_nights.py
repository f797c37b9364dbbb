"""Which set of calibration frames holds in which night, and what the plan makes of it."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from survey_run import REPOSITORY
from test_plan import _in_folder, calibration, plan_of, science  # noqa: F401

from coaddflow.errors import InputError
from coaddflow.runtime.log import job_log
from coaddflow.settings import Settings
from coaddflow.settings.calib_sets import CalibSetsSettings
from coaddflow.tables.paths import CALIB_KINDS
from coaddflow.workflow.calib_sets import (
    NO_SET,
    CalibSet,
    CalibSets,
    CandidateFrames,
    HeldSet,
    date_of,
    found_sets,
    held,
    joined,
    named_sets,
    night_of,
    of_night,
    separated,
)
from coaddflow.workflow.cost import forecast
from coaddflow.workflow.inputs import Inputs
from coaddflow.workflow.params import Params
from coaddflow.workflow.plan_cache import KeptRows
from coaddflow.workflow.report import notes, set_lines
from coaddflow.workflow.stages import CALIB_STAGES, STAGES
from coaddflow.workflow.status import survey_status
from coaddflow.workflow.targets import check_targets

CHILE, HAWAII, AUSTRALIA = -70.8, -155.5, 149.1
"""East longitudes of observatories, degrees."""

NIGHTS = {"longitude": CHILE, "sets": {"gap": 0}}
FIRST, SECOND = 60_310, 60_313
"""Nights, as MJD of their evenings."""

NAMES = {FIRST: "20240101", SECOND: "20240104"}
"""Names of the sets of these nights."""


def frames(night, *kinds, n=3):
    """Return calibration frames of an afternoon; kinds such as "bias", "flat r"."""
    return [
        calibration(f"{kind.replace(' ', '')}{night}_{i}", *kind.split()).model_copy(
            update={"mjd": night + 0.85 + 0.001 * i}
        )
        for kind in kinds
        for i in range(n)
    ]


def exposures(night, *names, band="r"):
    return [science(name, band, mjd=night + 1.2) for name in names]


# Nights


@pytest.mark.parametrize(
    ("longitude", "evening", "morning"),
    # sunset of 2024-01-01 and sunrise after it, in UTC
    [
        (CHILE, 60310.99, 60311.40),
        (HAWAII, 60311.16, 60311.71),
        (AUSTRALIA, 60310.38, 60310.80),
        (0.0, 60310.68, 60311.34),
    ],
)
def test_a_night_has_the_date_of_its_evening_everywhere(longitude, evening, morning):
    assert night_of(evening, longitude) == night_of(morning, longitude) == 60310
    assert date_of(60310).isoformat() == "2024-01-01"
    # flats before sunset, and after the next sunrise
    assert night_of(evening - 0.1, longitude) == night_of(morning + 0.05, longitude) == 60310
    assert night_of(evening - 1, longitude) == 60309
    assert night_of(morning + 0.4, longitude) == 60311


def test_sets_are_found_where_nights_with_frames_are_apart():
    nights = [60310, 60311, 60311, 60314, 60320]
    spans = {gap: [one[1:] for one in found_sets(nights, gap)] for gap in (0, 1, 3, 6)}
    assert spans == {
        0: [(60310, 60310), (60311, 60311), (60314, 60314), (60320, 60320)],
        1: [(60310, 60311), (60314, 60314), (60320, 60320)],
        3: [(60310, 60314), (60320, 60320)],
        6: [(60310, 60320)],
    }
    assert [one.name for one in found_sets(nights, 3)] == ["20240101", "20240111"]


def test_the_name_of_a_found_set_stays_when_later_frames_come():
    before = found_sets([60310, 60314], 3)
    assert found_sets([60310, 60314, 60320, 60321], 3)[0] == before[0]
    assert found_sets([60310, 60314, 60316], 3)[0].name == before[0].name
    assert found_sets([60308, 60310, 60314], 3)[0].name == "20231230", "an earlier frame renames it"


SETS = [CalibSet("a", 10, 12), CalibSet("b", 20, 20)]


@pytest.mark.parametrize(
    ("night", "gap", "outside", "expected"),
    [
        (11, None, "stop", HeldSet("a", 0)),
        (13, None, "stop", None),
        (13, 1, "stop", HeldSet("a", 0)),
        (14, 1, "stop", None),
        (14, 1, "nearest", HeldSet("a", 1)),
        (16, 4, "stop", HeldSet("a", 0)),  # 4 nights from both: the earlier one
        (17, 4, "stop", HeldSet("b", 0)),
        (9, None, "nearest", HeldSet("a", 1)),
        (99, None, "nearest", HeldSet("b", 79)),
    ],
)
def test_a_set_holds_as_far_from_its_frames_as_the_gap(night, gap, outside, expected):
    nights = [{"name": "named"}] if gap is None else []
    settings = CalibSetsSettings(nights=nights, gap=gap, outside=outside)
    assert held(SETS, night, settings) == expected
    assert held([], night, settings) is None


def test_frames_belong_to_the_set_of_their_night_or_to_none():
    assert [of_night(SETS, night) for night in (9, 10, 12, 13, 20, 21)] == [
        *(None, SETS[0], SETS[0], None, SETS[1], None)
    ]


@pytest.mark.parametrize("names", [("a", "a"), ("a", "b"), ("a_b", "c"), ("a", "b_c")])
def test_a_name_of_several_sets_is_that_of_no_others(names):
    assert tuple(separated(joined(names), ["dark", "flat"]).values()) == names
    assert joined(["a_b", "c"]) != joined(["a", "b_c"])
    assert joined(["a"] * 3) == "a"
    assert joined([]) == ""


# Settings


@pytest.mark.parametrize(
    ("calibs", "said"),
    [
        ({"sets": {"gap": 1}}, "needs calibs.longitude"),
        ({"sets": {"gap": 1, "nights": [{"name": "a"}]}}, "either named .* or found"),
        ({"sets": {"nights": [{"name": "a"}, {"name": "b"}]}}, "hold for the same nights"),
        ({"sets": {"nights": [{"name": "a/b"}]}}, "'a/b' is not a valid set id"),
        ({"sets": {"nights": [{"name": "frames"}]}}, "cannot be called 'frames'"),
        ({"sets": {"nights": [{"name": "none"}]}}, "cannot be called 'none'"),
        ({"sets": {"nights": [{"name": "a", "first": 20240101}]}}, "write one as 2026-01-05"),
        ({"sets": {"nights": [{"name": "a", "first": "20240101"}]}}, "write one as 2026-01-05"),
        ({"sets": {"nights": [{"name": "a", "last": "1704067200"}]}}, "write one as 2026-01-05"),
        ({"sets": {"outside": "nearest"}}, "`outside` without `nights` or `gap`"),
        ({"flat": {"sets": {"outside": "nearest"}}}, "`outside` without `nights` or `gap`"),
        ({"flat": {"sets": {"outside": "stop"}}}, "`outside` without `nights` or `gap`"),
        (
            {"flat": {"sets": {"nights": [], "gap": None, "outside": "nearest"}}},
            "`outside` without `nights` or `gap`",
        ),
        (
            {"sets": {"nights": [{"name": "a", "first": "2024-01-02", "last": "2024-01-01"}]}},
            "ends before it begins",
        ),
        ({"bias": {"source": "given", "path": "{set}/{ccd}.fits"}}, "name the sets"),
        (
            {"defects": {"sets": {"gap": 1}}},
            "calibs.defects.sets has no effect: defects have the sets of the frames",
        ),
        (
            {"bias": {"source": "none", "sets": {"gap": 1}}},
            "calibs.bias.sets has no effect: source is `none`",
        ),
        (
            {"bias": {"source": "given", "path": "{ccd}.fits", "sets": {"gap": 1}}},
            r"calibs.bias.sets has no effect: given frames need \{set\}",
        ),
    ],
)
def test_a_mistake_in_the_sets_is_named(calibs, said):
    with pytest.raises(ValueError, match=said):
        Settings(calibs=calibs)


def test_defaults_that_are_written_out_are_one_set_for_all_nights():
    written = CalibSetsSettings().model_dump()
    assert written.keys() == {"nights", "gap", "outside"}
    assert not CalibSetsSettings(**written).in_use
    assert not CalibSetsSettings().in_use


def test_a_name_that_looks_like_a_date_or_a_number_is_a_name():
    sets = Settings(calibs=NIGHTS | {"sets": {"nights": [{"name": 20240101}]}}).calibs.sets
    assert sets.nights[0].name == "20240101"


def test_the_example_of_the_documentation_is_what_it_says():
    page = (REPOSITORY / "docs/calibration.md").read_text(encoding="utf-8")
    example = page.partition("```yaml\n")[2].partition("```")[0]
    calibs = Settings(**yaml.safe_load(example)).calibs
    in_use = {kind: calibs.sets_of(kind) for kind in CALIB_KINDS}
    assert [in_use[kind].in_use for kind in CALIB_KINDS] == [True, False, True, False]
    assert in_use["bias"].gap == 0
    nights = [one[1:] for one in named_sets(in_use["flat"])]
    assert nights[1][0] - nights[0][1] == 1, "one begins where the other ends"


# What exposures take


def test_kinds_may_have_sets_of_their_own_and_defects_have_those_of_dark_and_flat():
    rows = [*frames(FIRST, "bias", "dark", "flat r"), *frames(SECOND, "bias", "flat r")]
    rows += [*exposures(FIRST, "a"), *exposures(SECOND, "b")]
    year = {"nights": [{"name": "2024", "first": "2024-01-01"}]}
    plan = plan_of(rows, calibs=NIGHTS | {"dark": {"sets": year}})
    assert plan.calibs_of_band("r", plan.sets_taken("b"))[2] == {
        "bias": "results/calibs/bias/20240104/2.fits",
        "dark": "results/calibs/dark/2024/2.fits",
        "flat": "results/calibs/flat/20240104/r/2.fits",
        "defects": "results/calibs/defects/2024+20240104/r/2.fits",
    }
    table = plan.calib_table("r", plan.sets_taken("b"))
    assert table == "results/calibs/20240104+2024+20240104/r.ecsv"
    # what it is made with is found again from the name
    wildcards = SimpleNamespace(ccd="2", band="r", set="2024+20240104")
    assert Inputs(plan).defects(wildcards) == {
        "dark": "results/calibs/dark/2024/2.fits",
        "flat": "results/calibs/flat/20240104/r/2.fits",
    }
    # the dark frames are of the first night, and so is their bias, for exposures of any night
    made_with = Inputs(plan).dark(SimpleNamespace(ccd="2", set="2024"))
    assert made_with["bias"] == "results/calibs/bias/20240101/2.fits"
    assert made_with["frames"] == "results/calibs/frames/dark.2024.ecsv"


def test_a_bias_that_only_darks_need_is_made():
    rows = [*frames(FIRST, "bias", "dark"), *frames(SECOND, "bias"), *exposures(SECOND, "b")]
    calibs = NIGHTS | {"dark": {"sets": {}}, "flat": {"source": "none"}}
    assert plan_of(rows, calibs=calibs).calib_units["bias"] == [
        *((None, "20240104"), (None, "20240101"))
    ]


def test_each_band_has_flats_of_its_own_nights():
    rows = [*frames(FIRST, "flat r"), *frames(SECOND, "flat g"), *exposures(FIRST, "a")]
    rows += exposures(SECOND, "b", band="g")
    plan = plan_of(rows, calibs=NIGHTS)
    plan.check()
    assert plan.calib_units["flat"] == [("g", "20240104"), ("r", "20240101")]
    with pytest.raises(InputError, match=r"no set of flat frames in r holds for exposure 'c'"):
        plan_of([*rows, *exposures(SECOND, "c")], calibs=NIGHTS).check()


NO_FLATS = {"dark": {"source": "none"}, "flat": {"source": "none"}}


def test_an_exposure_of_a_night_without_a_set_stops_the_plan():
    rows = [*frames(FIRST, "bias"), *exposures(FIRST, "a"), *exposures(SECOND, "b", "c")]
    calibs = NIGHTS | NO_FLATS
    plan = plan_of(rows, calibs=calibs)
    said = (
        r"no set of bias frames holds for exposure 'b' and 1 more of the night of 2024-01-04; the "
        r"nearest is '20240101', 3 nights away\. Add frames of this night \(at least 3\)"
    )
    with pytest.raises(InputError, match=said):
        plan.check()
    assert plan.sets_taken("b") == NO_SET
    assert plan.shown_sets("b") == "bias=none"
    near = plan_of(rows, calibs=calibs | {"sets": {"gap": 0, "outside": "nearest"}})
    near.check()
    assert near.shown_sets("b") == "bias=20240101(nearest)"
    assert near.shown_sets("a") == "bias=20240101"
    assert "take the nearest one: b, c" in "; ".join(notes(near))


def test_a_set_of_too_few_frames_does_not_exist_and_its_frames_are_named():
    rows = [*frames(FIRST, "bias"), *frames(SECOND, "bias", n=2)]
    rows += [*exposures(FIRST, "a"), *exposures(SECOND, "b")]
    calibs = NIGHTS | NO_FLATS
    said = (
        r"exposure 'b' of the night of 2024-01-04; set '20240104' has 2 bias frames, 3 are needed"
    )
    with pytest.raises(InputError, match=said):
        plan_of(rows, calibs=calibs).check()
    nights = [{"name": "old", "last": "2024-01-03"}, {"name": "new", "first": "2024-01-04"}]
    with pytest.raises(InputError, match=r"; set 'new' has 2 bias frames, 3 are needed; the near"):
        plan_of(rows, calibs=calibs | {"sets": {"nights": nights}}).check()
    near = plan_of(rows, calibs=calibs | {"sets": {"gap": 0, "outside": "nearest"}})
    said = "2 bias frames in no set (outside of the nights of all sets, or fewer than 3 in a set)"
    assert said in "; ".join(notes(near))


@pytest.mark.parametrize("outside", ["stop", "nearest"])
def test_frames_that_are_too_few_in_each_night_stop_the_plan(outside):
    nights = range(FIRST, FIRST + 10)
    rows = [row for night in nights for row in frames(night, "flat r", n=2)]
    rows += [row for night in nights for row in exposures(night, f"e{night}")]
    calibs = NIGHTS | {"sets": {"gap": 0, "outside": outside}}
    plan = plan_of(rows, calibs=calibs)
    said = (
        r"20 flat frames in r of 10 nights, but no set has the 3 that are needed\. Widen the gap .*"
        r", lower calibs\.flat\.min_frames, or .* \(calibs\.flat\.sets: \{\}\)"
    )
    with pytest.raises(InputError, match=said):
        plan.check()
    assert len(plan.frames_without_set("flat")) == 20
    assert "20 flat frames in no set" in "; ".join(notes(plan))
    assert "no master flat" not in "; ".join(notes(plan))
    assert plan.shown_sets(f"e{FIRST}") == "flat=none"
    # other kinds have no frames at all, which stops nothing
    plan_of(rows, calibs=calibs | {"flat": {"sets": {}}}).check()


def test_frames_of_the_night_sky_that_are_too_few_in_each_night_stop_the_plan():
    rows = [row for night in (FIRST, SECOND) for row in exposures(night, f"a{night}", f"b{night}")]
    sky = {"flat": {"source": "night_sky", "min_frames": 2}}
    named = {"nights": [{"name": "new", "first": "2024-01-04"}], "outside": "nearest"}
    said = r"4 flat frames in r of 2 nights.* 5 that are needed\. Name more nights .*night_sky"
    with pytest.raises(InputError, match=said):
        plan_of(rows, calibs=sky | {"longitude": CHILE, "sets": named}).check()


def test_a_frame_without_a_date_is_named():
    dateless = calibration("z9", "bias").model_copy(update={"mjd": None})
    rows = [*frames(FIRST, "bias"), dateless, *exposures(FIRST, "a")]
    plan_of(rows).check()
    with pytest.raises(InputError, match=r"exposure 'z9' \(bias\) has no mjd in the exposure"):
        plan_of(rows, calibs=NIGHTS | NO_FLATS).check()


def test_frames_of_several_nights_take_the_bias_of_theirs():
    rows = [*frames(FIRST, "bias", "flat r"), *frames(SECOND, "bias", "flat r")]
    rows += exposures(SECOND, "b")
    calibs = NIGHTS | {"dark": {"source": "none"}, "flat": {"sets": {"gap": 3}}}
    plan = plan_of(rows, calibs=calibs)
    plan.check()
    wildcards = SimpleNamespace(ccd="2", band="r", set="20240101")
    bias = {night: f"results/calibs/bias/{name}/2.fits" for night, name in NAMES.items()}
    assert Inputs(plan).flat(wildcards)["bias"] == list(bias.values())
    made_by = Params(plan).master("master_flat")(wildcards)
    assert made_by["calibs_of_frames"] == {
        f"tables/raw/flatr{night}_{i}.fits": {"bias": bias[night]}
        for night in (FIRST, SECOND)
        for i in range(3)
    }
    # no exposure is of the first night
    assert plan.calib_units["bias"] == [(None, "20240104"), (None, "20240101")]
    # a job all of whose frames take the same does not say it for each
    each = plan_of(rows, calibs=NIGHTS | {"dark": {"source": "none"}})
    made_by = Params(each).master("master_flat")(wildcards)
    assert made_by.keys() == {"versions", "settings"}
    assert Inputs(each).flat(wildcards)["bias"] == bias[FIRST]


def test_without_sets_files_and_params_are_what_they_were_before_there_were_sets():
    """A finished survey has these in Snakemake's records: another value would redo it."""
    rows = [*frames(FIRST, "bias", "dark", "flat r"), *frames(SECOND, "bias")]
    rows += [*exposures(FIRST, "a"), *exposures(SECOND, "b")]
    plan = plan_of(rows)
    inputs, params = Inputs(plan), Params(plan)
    wildcards = SimpleNamespace(ccd="2", band="r")
    assert inputs.flat(wildcards) == {
        "frames": "results/calibs/frames/flat_r.ecsv",
        "bias": "results/calibs/bias/2.fits",
        "dark": "results/calibs/dark/2.fits",
    }
    assert params.master("master_flat")(wildcards) == {
        "versions": {"master_flat": STAGES["master_flat"].version},
        "settings": {"calibs": {"flat": {}}},
    }
    assert params.exposure_times("master_flat")(wildcards, {}) == {}
    biases = [plan.raw_template(exposure) for exposure in plan.calib_frames("bias")]
    times = params.times_of_frames(SimpleNamespace(frames="bias"), biases)
    assert times == dict.fromkeys(biases, 60.0) and len(biases) == 6
    assert inputs.calexp(SimpleNamespace(exposure="b", ccd="2")) == {
        "raw": [],
        "bias": "results/calibs/bias/2.fits",
        "dark": "results/calibs/dark/2.fits",
        "flat": "results/calibs/flat/r/2.fits",
        "defects": "results/calibs/defects/r/2.fits",
        "refcat": "stars.csv",
    }
    assert inputs.exposure(SimpleNamespace(exposure="b"))["calibs"] == "results/calibs/r.ecsv"
    assert params.table_row(SimpleNamespace(exposure="b", ccd="2")).keys() == {
        *("exposure", "kind", "band", "ra", "dec", "rotation", "mjd", "exposure_time", "path")
    }


def test_a_frame_of_a_night_without_bias_stops_the_plan():
    rows = [*frames(FIRST, "bias"), *exposures(FIRST, "a"), *frames(SECOND, "dark")]
    calibs = NIGHTS | {"flat": {"source": "none"}, "dark": {"sets": {}}}
    said = r"no set of bias frames holds for exposure 'dark60313_0' of the night of 2024-01-04"
    with pytest.raises(InputError, match=said):
        plan_of(rows, calibs=calibs).check()


def test_given_frames_have_sets_by_their_path():
    given = {"source": "given", "path": "masters/{set}/bias_{ccd}.fits"}
    nights = [{"name": "old", "last": "2024-01-03"}, {"name": "new", "first": "2024-01-04"}]
    calibs = NO_FLATS | {"longitude": CHILE, "sets": {"nights": nights}, "bias": given}
    rows = [*exposures(FIRST, "a"), *exposures(SECOND, "b")]
    plan = plan_of(rows, calibs=calibs, exclude_ccds=[1, 2, 3])
    files = {e: plan.calibs_of_band("r", plan.sets_taken(e))[0]["bias"] for e in "ab"}
    assert files == {"a": "masters/old/bias_0.fits", "b": "masters/new/bias_0.fits"}
    Path("masters/old").mkdir(parents=True)
    Path("masters/old/bias_0.fits").touch()
    with pytest.raises(InputError, match=r"masters/new/bias_0\.fits: 1 of the 2 files"):
        plan.check()
    assert plan.sets_made_with("bias", None, "old") == {}
    # frames that are given cannot be added
    first = calibs | {"sets": {"nights": nights[:1]}}
    with pytest.raises(InputError, match=r"'old', 1 night away\. Widen the set"):
        plan_of(rows, calibs=first).check()
    # a set that no exposure takes need not be there
    plan_of(rows[:1], calibs=calibs, exclude_ccds=[1, 2, 3]).check()


def test_given_frames_that_only_raw_frames_take_are_looked_for():
    """The dark of the first night, whose bias no exposure takes."""
    given = {"source": "given", "path": "masters/{set}/bias_{ccd}.fits"}
    nights = [{"name": "old", "last": "2024-01-03"}, {"name": "new", "first": "2024-01-04"}]
    calibs = {"longitude": CHILE, "bias": given | {"sets": {"nights": nights}}}
    rows = [*frames(FIRST, "dark"), *exposures(SECOND, "b")]
    plan = plan_of(rows, calibs=calibs, exclude_ccds=[1, 2, 3])
    assert plan.given_files("bias", "r") == [f"masters/{n}/bias_0.fits" for n in ("new", "old")]
    Path("masters/new").mkdir(parents=True)
    Path("masters/new/bias_0.fits").touch()
    with pytest.raises(InputError, match=r"masters/old/bias_0\.fits: 1 of the 2 files"):
        plan.check()


def test_given_frames_without_a_set_in_their_path_hold_for_all_nights():
    given = {"source": "given", "path": "masters/flat_{band}_{ccd}.fits"}
    rows = [*frames(FIRST, "bias"), *frames(SECOND, "bias")]
    rows += [*exposures(FIRST, "a"), *exposures(SECOND, "b")]
    calibs = {"flat": given, "dark": {"source": "none"}, "defects": {"source": "none"}}
    plan = plan_of(rows, calibs=NIGHTS | calibs, exclude_ccds=[1, 2, 3])
    for exposure, name in (("a", "20240101"), ("b", "20240104")):
        assert plan.calibs_of_band("r", plan.sets_taken(exposure))[0] == {
            "bias": f"results/calibs/bias/{name}/0.fits",
            "flat": "masters/flat_r_0.fits",
        }
        assert plan.shown_sets(exposure) == f"bias={name}"
    assert plan.given_files("flat", "r") == ["masters/flat_r_0.fits"]


def test_frames_of_the_night_sky_have_sets_too():
    rows = [*exposures(FIRST, *(f"a{i}" for i in range(5)))]
    rows += exposures(SECOND, *(f"b{i}" for i in range(5)))
    sky = {"source": "night_sky", "min_frames": 3}
    calibs = {"bias": {"source": "none"}, "dark": sky, "flat": sky, "defects": sky}
    plan = plan_of(rows, calibs=NIGHTS | calibs)
    plan.check()
    assert plan.calib_frames("flat", "r", "20240104") == [f"b{i}" for i in range(5)]
    assert plan.calibs_of_band("r", plan.sets_taken("b0"))[0] == {
        "dark": "results/calibs/dark/20240104/0.fits",
        "flat": "results/calibs/flat/20240104/r/0.fits",
        # found on the dark
        "defects": "results/calibs/defects/20240104/0.fits",
    }
    # too few for the search for sources (calibs.night_sky.min_frames)
    few = plan_of(rows[:-1], calibs=NIGHTS | calibs)
    assert few.calib_units["flat"] == [("r", "20240101")]


@pytest.mark.parametrize("sets", [{}, NIGHTS])
def test_defects_on_a_dark_of_the_night_sky_need_frames_of_their_own_number(sets):
    """Six exposures of the first night and five of the second make two darks, or one of all."""
    rows = exposures(FIRST, *(f"a{i}" for i in range(6)))
    rows += exposures(SECOND, *(f"b{i}" for i in range(5)))
    sky = {"source": "night_sky"}
    calibs = {"bias": {"source": "none"}, "flat": {"source": "none"}, "dark": sky} | sets
    names = {True: ("20240101/", "20240104/"), False: ("", "")}[bool(sets)]
    # what there is in the nights of both exposures
    for least, expected in ((5, "ab"), (6, "a" if sets else "ab"), (12, "")):
        plan = plan_of(rows, calibs=calibs | {"defects": sky | {"min_frames": least}})
        plan.check()
        for exposure, name in zip("ab", names, strict=True):
            files = plan.calibs_of_band("r", plan.sets_taken(f"{exposure}0"))[0]
            kinds = {"dark", "defects"} if exposure in expected else {"dark"}
            assert files == {kind: f"results/calibs/{kind}/{name}0.fits" for kind in kinds}
            product = plan.calib_product("defects", 0, "r", name.rstrip("/"))
            assert product == files.get("defects")
        units = [name for _, name in plan.calib_units["defects"]]
        assert units == [
            *dict.fromkeys(
                name.rstrip("/") for e, name in zip("ab", names, strict=True) if e in expected
            )
        ]
        assert all(plan.sets_made_with("defects", None, one) == {"dark": [one]} for one in units)
        assert plan.calib_frames("defects") == []
        assert ("no master defects" in "; ".join(notes(plan))) == (not expected)


# Jobs, counts, words


def test_a_job_of_a_cluster_takes_the_sets_of_its_run():
    rows = [*frames(FIRST, "bias", "dark", "flat r"), *frames(SECOND, "bias", "flat r")]
    rows += [*exposures(FIRST, "a"), *exposures(SECOND, "b")]
    calibs = NIGHTS | {"dark": {"sets": {}}}
    run = plan_of(rows, "cache", calibs=calibs)
    job = plan_of(rows, "cache", is_job=True, calibs=calibs)
    assert isinstance(job.science, KeptRows)
    job.check()
    for exposure in run.exposures:
        taken = run.sets_taken(exposure)
        assert job.sets_taken(exposure) == taken
        assert job.calibs_of_band("r", taken) == run.calibs_of_band("r", taken)
    for stage in STAGES.values():
        assert list(stage.units(run)) == list(stage.units(job))
        for names in stage.units(run) if "set" in stage.products[0].template(run) else ():
            wildcards = SimpleNamespace(**names)
            of_stage = stage.name.removeprefix("master_")
            inputs = [getattr(Inputs(plan), of_stage)(wildcards) for plan in (run, job)]
            assert inputs[0] == inputs[1]


def test_sets_that_the_table_shows_may_change_during_a_run():
    rows = [*frames(FIRST, "bias"), *exposures(FIRST, "a", "b")]
    calibs = NIGHTS | NO_FLATS
    plan_of(rows, "cache", calibs=calibs)
    for shown in ("bias=20240101", "bias=20240104(nearest)"):
        told = [row.model_copy(update={"sets": shown}) for row in rows]
        job = plan_of(told, "cache", is_job=True, calibs=calibs)
        assert isinstance(job.science, KeptRows)
    assert "sets" in Path("tables/exposures.ecsv").read_text()
    # another value is another plan
    moved = [row.model_copy(update={"path": f"other/{row.exposure}.fits"}) for row in told]
    assert not isinstance(plan_of(moved, "cache", is_job=True, calibs=calibs).science, KeptRows)


def test_a_job_looks_up_its_set_without_reading_the_table():
    looks = []
    for n in (4, 40):
        rows = [*frames(FIRST, "bias"), *exposures(FIRST, *(f"e{i:02d}" for i in range(n)))]
        calibs = NIGHTS | NO_FLATS
        plan_of(rows, "cache", calibs=calibs)
        plan, asked = plan_of(rows, "cache", is_job=True, calibs=calibs), []
        plan.science.kept._database.set_trace_callback(asked.append)
        plan.check()
        assert plan.calib_table("r", plan.sets_taken("e02")) == "results/calibs/20240101/r.ecsv"
        looks.append(len(asked))
    assert looks[0] == looks[1] < 6


def test_names_of_products_and_tokens_have_the_set():
    rows = [*frames(FIRST, "bias", "flat r"), *exposures(FIRST, "a")]
    plan = plan_of(rows, calibs=NIGHTS)
    flat = STAGES["master_flat"]
    names = {"ccd": "0", "band": "r", "set": "20240101"}
    assert names in list(flat.units(plan))
    assert flat.products[0].file(names) == "results/calibs/flat/20240101/r/0.fits"
    assert flat.token(names) == "calibs_flat_20240101_r_0.fits"
    assert flat.token({"ccd": "0", "band": "r"}) == "calibs_flat_r_0.fits"


@pytest.mark.parametrize("dark", [{}, {"sets": {}}, {"source": "none"}])
@pytest.mark.parametrize("others", [(), ("flat g",), ("bias",), ("bias", "flat g")])
@pytest.mark.parametrize("granularity", ["ccd", "exposure"])
def test_every_file_has_the_name_that_its_rule_makes(dark, others, granularity):
    """Also of bands and kinds without any frame, where other bands and kinds have sets."""
    rows = [*frames(FIRST, "flat r", *others), *frames(SECOND, "dark", "flat r", *others)]
    rows += [*exposures(FIRST, "a"), *exposures(SECOND, "b"), *exposures(SECOND, "c", band="g")]
    plan = plan_of(
        rows,
        calibs={"longitude": CHILE, "sets": {"gap": 0, "outside": "nearest"}, "dark": dark},
        parallel={"calexp": granularity},
    )
    plan.check()
    made = set()
    for stage in STAGES.values():
        pattern = re.sub(r"\\{(\w+)\\}", "[^/]+", re.escape(stage.products[0].template(plan)))
        files = stage.products[0].files(plan) if stage.is_planned(plan) else []
        assert [file for file in files if not re.fullmatch(pattern, file)] == [], stage.name
        made |= {*files}
    for exposure in "abc":
        taken, band = plan.sets_taken(exposure), plan.band_of(exposure)
        assert {*plan.calibs_of_band(band, taken)[2].values()} <= made
        if granularity == "exposure":
            table = plan.calib_table(band, taken)
            assert table in made if plan.calibs_of_band(band, taken)[2] else table is None
    for stage in CALIB_STAGES:
        for names in STAGES[stage].units(plan):
            asked = getattr(Inputs(plan), stage.removeprefix("master_"))(SimpleNamespace(**names))
            files = [one for key, one in asked.items() if key != "raw"]
            flat_list = [f for one in files for f in ([one] if isinstance(one, str) else one)]
            assert {*flat_list} <= made


def test_a_master_that_failed_is_named_with_its_set():
    plan = plan_of([*frames(FIRST, "bias", "flat r"), *exposures(FIRST, "a")], calibs=NIGHTS)
    for log in ("bias/20240101/0", "flat/20240101/r/2"):
        with pytest.raises(SystemExit), job_log(f"logs/calibs/{log}.log"):
            raise InputError("the pixels are gone")
        assert f"calibs/{log}" in {step.job for step in survey_status(plan).failed_steps}
    Path("results/calibs/bias/20240101").mkdir(parents=True)
    Path("results/calibs/bias/20240101/0.fits").touch()
    found = survey_status(plan).failed_steps
    assert [step.job for step in found] == ["calibs/flat/20240101/r/2"]


def test_a_target_of_a_set_that_there_is_not_is_named_with_those_there_are():
    plan = plan_of([*frames(FIRST, "bias", "flat r"), *exposures(FIRST, "a")], calibs=NIGHTS)
    check_targets(plan, ["results/calibs/flat/20240101/r/0.fits"])
    with pytest.raises(InputError, match=r"there is no set '20240104'.*; there are 20240101"):
        check_targets(plan, ["results/calibs/flat/20240104/r/0.fits"])


@pytest.mark.parametrize(
    ("dark", "jobs"),
    [({}, 2), ({"sets": {}}, 1), ({"source": "none"}, 2)],
    ids=["a dark each night", "the dark of the first night for both", "no dark"],
)
def test_the_jobs_of_a_ccd_are_as_many_as_sets_that_have_nothing_in_common(dark, jobs):
    second = () if dark.get("sets") == {} else ("dark",)
    rows = [*frames(FIRST, "bias", "dark", "flat r"), *frames(SECOND, "bias", "flat r", *second)]
    rows += [*exposures(FIRST, "a"), *exposures(SECOND, "b")]
    plan = plan_of(rows, calibs=NIGHTS | {"dark": dark})
    plan.check()
    cost = forecast(plan, 8)[0]
    assert (cost.name, cost.n_jobs) == ("calibration", jobs * len(plan.ccds))


def test_sets_are_listed_with_their_frames_and_exposures():
    rows = [*frames(FIRST, "bias"), *frames(SECOND, "bias", n=4)]
    rows += [*exposures(FIRST, "a"), *exposures(SECOND, "b", "c")]
    assert set_lines(plan_of(rows, calibs=NIGHTS | NO_FLATS)) == [
        "bias 20240101: 3 frames, taken by 1 exposure",
        "bias 20240104: 4 frames, taken by 2 exposures",
    ]
    assert set_lines(plan_of(rows)) == []


def test_nothing_is_looked_for_more_often_in_a_survey_of_more_exposures():
    """Sets are worked out once for each band and night."""
    looks = []
    for n in (2, 20):
        rows = [row for night in (FIRST, SECOND) for row in frames(night, "bias", "flat r")]
        for night in (FIRST, SECOND):
            rows += exposures(night, *(f"e{night}{i:02d}" for i in range(n)))
        plan = plan_of(rows, calibs=NIGHTS)
        plan._taken.cache_clear()
        for exposure in plan.exposures:
            plan.calibs_of_band("r", plan.sets_taken(exposure))
        looks.append(plan._taken.cache_info().misses)
    assert looks == [2, 2]


class CountedRows(list):
    """Rows of a table, which count how often all are gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_rows_are_gone_through_as_often_for_many_bands_as_for_one():
    sky = {"source": "night_sky", "min_frames": 3}
    calibs = Settings(calibs={"flat": sky, "dark": sky}).calibs
    passes = []
    for bands in ("r", "grizy"):
        rows = CountedRows(
            row
            for band in bands
            for row in exposures(FIRST, *(f"{band}{i}" for i in range(5)), band=band)
        )
        sets = CalibSets.of_frames(CandidateFrames(calibs, rows, []))
        assert [*sets.made["flat"]] == sorted(bands)
        passes.append(rows.passes)
    assert passes[0] == passes[1] <= 2


def test_candidates_of_a_band_are_those_of_its_table_or_of_the_sky_in_order_of_time():
    rows = [*exposures(SECOND, "b", "a"), *exposures(FIRST, "g0", band="g"), *exposures(FIRST, "c")]
    dark = frames(FIRST, "dark", "flat g", "flat r", n=1)
    sky = Settings(calibs={"flat": {"source": "night_sky"}}).calibs
    found = CandidateFrames(sky, rows, dark)
    assert [row.exposure for row in found.of("flat", "r")] == ["c", "a", "b"]
    assert [row.exposure for row in found.of("dark")] == [f"dark{FIRST}_0"]
    named = Settings(calibs={"flat": {"exposures": [f"flatr{FIRST}_0", "flatg"]}}).calibs
    found = CandidateFrames(named, rows, dark)
    assert [row.exposure for row in found.of("flat", "r")] == [f"flatr{FIRST}_0"]
    assert [row.exposure for row in found.of("flat", "g")] == []


def test_the_table_shows_what_exposures_take_and_is_not_read_for_it():
    rows = [*frames(FIRST, "bias"), *exposures(FIRST, "a")]
    shown = [
        r.model_copy(update={"sets": "bias=other"}) if r.kind == "science" else r for r in rows
    ]
    plan = plan_of(shown, calibs=NIGHTS | NO_FLATS)
    assert plan.shown_sets("a") == "bias=20240101"
    assert "sets" not in plan.table_row("a")
    assert "the column `sets` of tables/exposures.ecsv is out of date for 1 exposure" in "; ".join(
        notes(plan)
    )
    silent = [*rows[:-1], *exposures(FIRST, "a")]
    assert "column `sets`" not in "; ".join(notes(plan_of(silent, calibs=NIGHTS | NO_FLATS)))
