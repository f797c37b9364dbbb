"""After `coaddflow compile` no job of a survey compiles anything."""


def test_all_is_compiled_ahead(compiled_ahead, finished_survey, coarse_survey):
    said, folder, files = compiled_ahead
    number, rest = said.split(" ", 1)
    assert int(number) > 40
    assert rest.startswith(f"functions compiled; all are in {folder}")
    assert len(files) > 80
    assert sorted(folder.rglob("*.nb?")) == files
