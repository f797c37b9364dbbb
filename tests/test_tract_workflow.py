"""The workflow with a tract as one job: the same coadds, and nothing else is done again."""

from collections import Counter

from test_workflow import plan_of

from coaddflow.files import sha256_of


def coadds(survey):
    """Return the checksums of all coadds."""
    paths = survey.folder.glob("results/coadd/*/*/*.fits")
    return {str(path.relative_to(survey.folder)): sha256_of(path) for path in paths}


def test_tracts_as_single_jobs_and_back(survey):
    expected, plan = coadds(survey), plan_of(survey)
    tracts = sum(bool(plan.patches_of(b, t)) for b in plan.bands for t in plan.tracts)
    survey.write_settings(parallel={"coadd": "tract", "workers": 2})
    run = survey.run()
    assert run.returncode == 0, run.text
    assert run.rules == Counter(tract=tracts, picture=len(plan.tracts))
    assert coadds(survey) == expected
    assert not list(survey.folder.glob("results/warp/*/*"))
    assert survey.plan().planned_nothing
    # a cut of the selection redoes the tracts, and no calexp
    survey.write_settings(parallel={"coadd": "tract"}, selection={"max_seeing": 3.0})
    assert survey.plan().rules == Counter(tract=tracts, picture=len(plan.tracts))
    # warps are gone, so all of them and their coadds are made again
    survey.write_settings()
    planned = survey.plan().rules
    assert planned["coadd"] == len(expected)
    assert planned["warp"] == sum(len(plan.overlaps[e]) for e in plan.exposures)
    assert set(planned) == {"warp", "coadd", "picture"}
