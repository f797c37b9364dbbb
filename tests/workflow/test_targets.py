"""What a user asks a run for by name, and how a run ends that cannot begin."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from survey_run import SNAKEFILE, environment
from test_plan import _in_folder, plan_of, science  # noqa: F401 - a fixture

from coaddflow.errors import InputError
from coaddflow.settings.refcat import RefcatSettings
from coaddflow.tables import paths
from coaddflow.workflow import catalogue
from coaddflow.workflow.stages import Product, targets
from coaddflow.workflow.targets import check_targets


@pytest.fixture
def plan():
    return plan_of([science("1001"), science("1002", "g", ra=150.2)])


def test_everything_that_a_run_makes_can_be_asked_for(plan):
    check_targets(plan, targets(plan))
    Path("there.txt").write_text("not a product, but there")
    check_targets(plan, ["there.txt", "logs/calexp/1001/3.log"])


def test_only_files_of_the_kind_that_is_asked_for_are_listed(plan, monkeypatch):
    listed = []
    files = Product.files
    monkeypatch.setattr(Product, "files", lambda one, plan: listed.append(one) or files(one, plan))
    check_targets(plan, ["results/summary/1001.ecsv", "results/summary/1002.ecsv"])
    assert [product.path for product in listed] == [paths.MANIFEST]


@pytest.mark.parametrize("granularity", ["fine", "coarse"])
@pytest.mark.parametrize(
    ("target", "fine", "coarse"),
    [
        (paths.CALEXP, paths.ROW, paths.MANIFEST),
        (paths.SOURCES, paths.ROW, paths.MANIFEST),
        (paths.COADD, paths.COADD, paths.COADD_TABLE),
        (paths.DEPTH, paths.DEPTH_TABLE, paths.DEPTH_TABLE),
    ],
)
def test_what_a_job_makes_beside_what_it_promises_is_asked_for_by_that(
    target, fine, coarse, granularity
):
    parallel = {"coadd": "tract", "calexp": "exposure"} if granularity == "coarse" else {}
    plan = plan_of([science("1001")], parallel=parallel)
    tract = plan.tracts[0]
    names = {"exposure": "1001", "ccd": plan.ccds_of("1001")[0], "band": "r", "tract": tract}
    names["patch"] = plan.patches_of("r", tract)[0]
    promised = (coarse if granularity == "coarse" else fine).format(**names)
    check_targets(plan, [promised])
    if promised == target.format(**names):
        return
    with pytest.raises(InputError, match=f"made alone, but by the job that makes {promised}"):
        check_targets(plan, [target.format(**names)])


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("results/summary/1003.ecsv", r"no exposure '1003' \(did you mean '100\d'\?\)"),
        ("results/warp/664004/nosuch.ecsv", "no exposure 'nosuch'"),
        ("results/calexp/1001/99.json", "no CCD '99'"),
        ("results/coadd/z/0/0_0.fits", "no band 'z'; there are g, r"),
        ("results/coadd/7.png", "no tract '7'"),
        ("results/coadd/r/664004/99_99.fits", "no exposure can touch patch '99_99'"),
        ("calxep", r"no target 'calxep' \(did you mean 'calexp'\?\)"),
    ],
)
def test_a_target_that_is_not_made_is_named_with_what_there_is(plan, target, said):
    with pytest.raises(InputError, match=said):
        check_targets(plan, [target])


def project(folder):
    """Write a project whose raw files are not there: it can be planned."""
    settings = {"camera": "mini", "exposures": "tables/exposures.ecsv"}
    plan_of([science("1001")])
    settings |= {"refcat": {"path": "stars.csv"}, "skymap": {"kind": "tangent"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


def snakemake(*arguments):
    """Return the command line of a dry run."""
    options = ["-s", str(SNAKEFILE), "--cores", "1", "-n"]
    return [sys.executable, "-m", "snakemake", *options, *arguments]


def test_snakemake_refuses_a_target_in_one_line(tmp_path):
    project(tmp_path)
    command = snakemake("--", "results/coadd/z/0/0_0.fits")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "coaddflow: error: this run does not make results/coadd/z/0/0_0.fits" in done.stderr


def test_ctrl_c_while_planning_is_one_line_and_130(tmp_path):
    project(tmp_path)
    table = tmp_path / "tables/exposures.ecsv"
    table.unlink()
    os.mkfifo(table)  # planning waits for the table
    run = subprocess.Popen(
        snakemake(), env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    with open(os.open(table, os.O_RDWR), "w"):  # noqa: PTH123 - a handle
        while time.monotonic() < deadline and not _waits(run.pid, table):
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=30)[1]
    assert run.returncode == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("coaddflow: interrupted while planning")


def _waits(pid, path):
    """Return whether a process has a file open."""
    found = Path(f"/proc/{pid}/fd").glob("*")
    try:
        return any(handle.resolve() == path.resolve() for handle in found)
    except OSError:
        return False


def test_a_damaged_catalogue_stops_a_run_before_its_first_job(plan, tmp_path):
    with pytest.raises(InputError, match=r"stars.csv: the reference catalogue has no star"):
        catalogue.check_before_run(plan)
    Path("stars.csv").write_text("ra,dec,mag\n150,2,garbage\n")
    with pytest.raises(InputError, match=r"stars.csv: column 'mag' .* not a column of numbers"):
        catalogue.check_before_run(plan)
    Path("stars.csv").write_text("ra,dec,mag\n150,2,15\n")
    catalogue.check_before_run(plan)
    assert catalogue.CHECKED.is_file()


def test_a_catalogue_that_has_not_changed_is_not_read_again(plan, monkeypatch):
    Path("stars.csv").write_text("ra,dec,mag\n150,2,15\n")
    catalogue.check_before_run(plan)
    calls = []
    monkeypatch.setattr("subprocess.run", lambda *a, **k: calls.append(a))
    catalogue.check_before_run(plan)
    assert not calls
    Path("stars.csv").write_text("ra,dec,mag\n150,2,16.5\n")
    with pytest.raises(AttributeError):
        catalogue.check_before_run(plan)
    assert len(calls) == 1
    assert RefcatSettings(path="stars.csv").files() == [Path("stars.csv")]
