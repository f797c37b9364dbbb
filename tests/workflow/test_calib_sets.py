"""Calibration frames of different nights: which exposure takes which, and what is redone."""

import contextlib
import datetime
import json
import sys
from pathlib import Path

import pytest
from survey_run import COARSE, Survey
from test_plan import calibration, science
from test_workflow import plan_of

from coaddflow.tables.exposures import read_exposures, write_exposures
from coaddflow.workflow.stages import STAGES, targets

LONGITUDE = -70.8
"""East longitude of the observatory, degrees: its noon is at 16:43 UTC."""

FIRST, SECOND, THIRD = 60_310, 60_313, 60_320
"""Nights, as MJD of their evenings: 2024-01-01, 2024-01-04, 2024-01-11."""

IDS = {FIRST: "20240101", SECOND: "20240104", THIRD: "20240111"}

EACH_NIGHT = {"longitude": LONGITUDE, "sets": {"gap": 0}, "dark": {"sets": {}}}
"""Biases and flats of each night, darks for all nights."""


def science_of(night, bands="gr"):
    """Return an exposure of a night in each band, at 22:00 and 3:00 of local time."""
    times = {"g": night + 1.11, "r": night + 1.32}
    return [science(f"{night}{band}", band, mjd=times[band]) for band in bands]


def frames_of(night, kinds=("bias", "flat"), bands="gr"):
    """Return three calibration frames of each kind, flats of each band, taken in the afternoon."""
    wanted = [(kind, band) for kind in kinds for band in (bands if kind == "flat" else [""])]
    return [
        calibration(f"{kind}{band}{night}_{i}", kind, band).model_copy(
            update={"mjd": night + 0.85 + 0.01 * i}
        )
        for kind, band in wanted
        for i in range(3)
    ]


TWO_NIGHTS = [
    *frames_of(FIRST, ("bias", "dark", "flat")),
    *frames_of(SECOND),
    *science_of(FIRST),
    *science_of(SECOND),
]


class EmptySurvey(Survey):
    """A survey of files without content, which is planned and never run."""

    def __init__(self, folder, settings, rows=()):
        super().__init__(folder)
        self.settings, self.rows = settings, list(rows)

    def add(self, *rows):
        """Add exposures to the table, with raw files."""
        self.rows += rows
        for row in rows:
            path = self / "data" / row.path
            if not path.exists():
                path.write_text(row.exposure)
        write_exposures(self / "data/exposures.ecsv", self.rows)

    def copy_to(self, folder):
        """Return a copy with all products and records."""
        super().copy_to(folder)
        return EmptySurvey(folder, self.settings, self.rows)

    def finish(self):
        """Make all products, empty, and Snakemake's records of them."""
        plan = plan_of(self)
        with contextlib.chdir(self.folder):
            rows = STAGES["calexp"].files(plan)
            for path in map(Path, [*targets(plan), *rows]):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        # Snakemake waits 0.1 s for every job whose products it touches
        code = (
            "from snakemake.executors import touch; touch.Executor.SLEEPING_TIME = 0; "
            "from snakemake.cli import main; main()"
        )
        arguments = self.command("--touch", "--forceall", "--cores", "1", "all")[3:]
        touched = self._call([sys.executable, "-c", code, *arguments])
        assert touched.returncode == 0, touched.text


def test_each_exposure_takes_the_frames_of_its_night(tmp_path):
    survey = empty_survey(tmp_path / "s", TWO_NIGHTS, calibs=EACH_NIGHT, **COARSE)
    plan = plan_of(survey)
    for night in (FIRST, SECOND):
        name = IDS[night]
        taken = plan.sets_taken(f"{night}r")
        assert plan.calibs_of_band("r", taken)[0] == {
            "bias": f"results/calibs/bias/{name}/0.fits",
            "dark": "results/calibs/dark/0.fits",
            "flat": f"results/calibs/flat/{name}/r/0.fits",
            "defects": f"results/calibs/defects/{name}/r/0.fits",
        }
        assert plan.calib_table("r", taken) == f"results/calibs/{name}/r.ecsv"


# What is redone


def rules_of(planned):
    assert planned.returncode == 0, planned.text
    return {rule: n for rule, n in planned.rules.items() if rule in CALIBRATION}


CALIBRATION = {name for name, stage in STAGES.items() if stage.group.startswith("calibs")} | {
    "frame_table",
    "calib_table",
}


def exposures_in(planned):
    """Return the exposures that are calibrated again."""
    return {
        what.split()[1].rstrip(",")
        for rule, what in planned.jobs
        if rule in ("calexp", "exposure", "manifest")
    }


def empty_survey(folder, rows, **settings):
    """Return a survey of these exposures, with raw files that are empty."""
    survey = EmptySurvey(folder, {"refcat": {"path": "data/stars.csv"}, **settings})
    (survey / "data/raw").mkdir(parents=True)
    (survey / "data/stars.csv").write_text("ra,dec,mag\n150.1,2.2,18.0\n")
    survey.write_settings(**survey.settings)
    survey.add(*rows)
    return survey


@pytest.fixture(scope="module", params=[{}, COARSE], ids=["jobs of CCDs", "jobs of exposures"])
def granularity(request):
    return request.param


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory, granularity):
    """A finished survey of two nights, with sets of each night. Not to be changed."""
    folder = tmp_path_factory.mktemp("sets") / "s"
    survey = empty_survey(folder, TWO_NIGHTS, calibs=EACH_NIGHT, **granularity)
    survey.finish()
    return survey


@pytest.fixture
def finished(finished_once, tmp_path):
    """A copy of the finished survey, to be changed."""
    return finished_once.copy_to(tmp_path / "s")


def test_a_frame_added_for_one_night_redoes_that_night_only(finished, granularity):
    more = calibration("bias_late", "bias").model_copy(update={"mjd": SECOND + 0.95})
    finished.add(more)
    planned = finished.plan()
    expected = {"frame_table": 1, "master_bias": 2, "master_flat": 4, "defects": 4}
    expected |= {"calib_table": 2} if granularity else {}
    assert rules_of(planned) == expected
    of_sets = {what for rule, what in planned.jobs if rule in CALIBRATION - {"frame_table"}}
    assert all(what.endswith(f", set {IDS[SECOND]}") for what in of_sets), of_sets
    assert ("frame_table", f"bias.{IDS[SECOND]}") in planned.jobs
    assert exposures_in(planned) == {f"{SECOND}g", f"{SECOND}r"}


def test_a_flat_added_for_one_night_redoes_its_band_of_that_night(finished):
    finished.add(calibration("flat_late", "flat", "g").model_copy(update={"mjd": FIRST + 1.4}))
    planned = finished.plan()
    assert exposures_in(planned) == {f"{FIRST}g"}
    assert rules_of(planned)["master_flat"] == 2
    assert "master_bias" not in planned.rules


def test_frames_of_a_night_without_exposures_redo_nothing(finished):
    finished.add(*frames_of(THIRD))
    assert finished.plan().planned_nothing


def test_a_night_that_is_added_makes_its_own_set_and_no_other(finished):
    finished.add(*frames_of(THIRD), *science_of(THIRD))
    planned = finished.plan()
    assert exposures_in(planned) == {f"{THIRD}g", f"{THIRD}r"}
    masters = {what for rule, what in planned.jobs if rule.startswith("master")}
    assert masters == {
        f"{words}CCD {ccd}, set {IDS[THIRD]}"
        for words in ("", "band g, ", "band r, ")
        for ccd in (0, 2)
    }


def test_a_survey_without_sets_is_not_touched_by_what_belongs_to_sets(tmp_path, granularity):
    survey = empty_survey(tmp_path / "s", TWO_NIGHTS, **granularity)
    survey.finish()
    assert not any(", set " in what for _, what in survey.plan("--forceall").jobs)
    made = {path.parent.name for path in survey.folder.glob("results/calibs/**/*.fits")}
    assert made == {"bias", "dark", "g", "r"}
    survey.write_settings(**survey.settings, calibs={"longitude": LONGITUDE, "flat": {"sets": {}}})
    assert survey.plan().planned_nothing
    # the column `sets` of the table is for people
    survey.rows = [row.model_copy(update={"sets": "bias=x"}) for row in survey.rows]
    survey.add()
    assert survey.plan().planned_nothing


def test_sets_that_are_named_as_they_were_found_redo_nothing(finished):
    nights = [
        {"name": "20240101", "last": datetime.date(2024, 1, 3)},
        {"name": "20240104", "first": datetime.date(2024, 1, 4)},
    ]
    calibs = EACH_NIGHT | {"sets": {"nights": nights}}
    finished.write_settings(**finished.settings | {"calibs": calibs})
    assert finished.plan().planned_nothing


# What is said


def test_an_exposure_without_a_set_stops_run_and_check_with_one_line(tmp_path):
    rows = [*TWO_NIGHTS, *science_of(THIRD, "r")]
    survey = empty_survey(tmp_path / "s", rows, calibs=EACH_NIGHT)
    for told in (survey.plan(), survey.coaddflow("check-config")):
        assert told.returncode != 0
        assert "no set of bias frames holds for exposure '60320r' of the night of 2024-01-11" in (
            told.text
        )
        assert "7 nights away. Add frames of this night" in told.text
        assert "Traceback" not in told.text


def test_table_status_and_check_show_which_set_each_exposure_takes(tmp_path):
    near = EACH_NIGHT | {"sets": {"gap": 0, "outside": "nearest"}}
    rows = [*TWO_NIGHTS, *science_of(THIRD, "r")]
    survey = empty_survey(tmp_path / "s", rows, calibs=near)
    first, third = "bias=20240101 flat=20240101", "bias=20240104(nearest) flat=20240104(nearest)"
    told = survey.coaddflow("ingest", "--sets").text
    assert "5 exposures of data/exposures.ecsv now show other sets" in told
    shown = {row.exposure: row.sets for row in read_exposures(survey / "data/exposures.ecsv")}
    assert (shown["60310g"], shown["60320r"]) == (first, third)
    assert {shown[row.exposure] for row in rows if row.kind != "science"} == {""}
    assert survey.coaddflow("ingest", "--sets").text.startswith("0 exposures")

    status = json.loads(survey.coaddflow("status", "--json").text)
    assert {one["exposure"]: one["sets"] for one in status["exposures"]} == {
        row.exposure: shown[row.exposure] for row in rows if row.kind == "science"
    }
    assert third in survey.coaddflow("status", "--all").text
    checked = survey.coaddflow("check-config").text
    assert "  flat g 20240104: 3 frames, taken by 1 exposure\n" in checked
    assert "take the nearest one: 60320r" in checked
