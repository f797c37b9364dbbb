"""The workflow runs through to the coadds wherever it is put, with the same pixels."""

import shutil

from survey_run import COARSE, REPOSITORY, environment

AWKWARD = 'Ben\'s "deep" field é 星'


def test_in_a_folder_with_any_name_and_with_a_strict_umask(raw_survey, coarse_survey, tmp_path):
    survey = raw_survey.copy_to(tmp_path / AWKWARD)
    survey.write_settings(**COARSE)
    run = survey.run(umask=0o077)
    assert run.returncode == 0, run.text
    assert survey.pixels("results/coadd/**/*.fits") == coarse_survey.pixels(
        "results/coadd/**/*.fits"
    )
    products = [path for path in (survey / "results").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in products} == {0o600}
    assert survey.coaddflow("status").returncode == 0


def test_nothing_but_the_survey_can_be_written_to(raw_survey, finished_survey, tmp_path):
    """Neither the package, as on a cluster, nor HOME, nor TMPDIR."""
    package = tmp_path / "installed"
    for name in ("src", "rules", "scripts"):
        caches = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, package / name, ignore=caches)
    shutil.copy(REPOSITORY / "Snakefile", package)
    for folder in [path for path in package.rglob("*") if path.is_dir()]:
        (folder / "__pycache__").touch()  # nobody can make a folder there, not even root
    survey = raw_survey.copy_to(tmp_path / "survey")
    surroundings = {
        "HOME": "/dev/null",
        "XDG_CACHE_HOME": str(survey / ".cache"),  # Snakemake does not begin without one
        "TMPDIR": "/proc",
        "PYTHONPATH": str(package / "src"),
    }
    run = survey.run("--snakefile", str(package / "Snakefile"), env=environment() | surroundings)
    assert run.returncode == 0, run.text
    coadds = "results/coadd/**/*.fits"
    assert survey.pixels(coadds) == finished_survey.pixels(coadds)
