"""The corner database: overlaps, queries anywhere on the sky, updates of what changed only."""

import hashlib
import json
import shutil
import sqlite3
import subprocess
from pathlib import Path

import numpy as np
import pytest
from regions import tracts_touching

from coaddflow.corners import build
from coaddflow.corners import schema as corner_schema
from coaddflow.corners import survey as survey_module
from coaddflow.corners.build import build_tract_database
from coaddflow.corners.database import CornerDatabase
from coaddflow.corners.survey import (
    build_survey_database,
    update_survey_database,
)
from coaddflow.errors import InputError
from coaddflow.files import sha256_of
from coaddflow.geometry import polygon, sphere
from coaddflow.settings.selection import SelectionSettings
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.maps import make_skymap
from coaddflow.tables.manifest import CcdRow, write_manifest

HALF = 0.1
"""Half the side of a CCD, degrees."""


@pytest.fixture(scope="module")
def skymap():
    return make_skymap(SkymapSettings())


def outline(ra, dec, turn=0.0, bow=0.0, half=HALF):
    """Return the outline of a CCD, 8 points an edge, edges bowed outwards by a fraction."""
    t = np.arange(8) / 8
    one = np.ones(8)
    out = one + bow * 4 * t * (1 - t)
    x = half * np.concatenate([2 * t - 1, out, 1 - 2 * t, -out])
    y = half * np.concatenate([-out, 2 * t - 1, out, 1 - 2 * t])
    cos, sin = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    return sphere.tan_deproject(cos * x - sin * y, sin * x + cos * y, ra, dec)


def ccd_row(exposure, ccd, ra, dec, **kwargs):
    shape = {k: kwargs.pop(k) for k in list(kwargs) if k in ("turn", "bow", "half")}
    footprint_ra, footprint_dec = (angle.tolist() for angle in outline(ra, dec, **shape))
    values = {
        "band": "r",
        "mjd": 58000.25,
        "exposure_time": 100.0,
        "state": "done",
        "path": f"results/calexp/{exposure}/{ccd}.fits",
        "sha256": "0" * 64,
        "nx": 2048,
        "ny": 2048,
        "seeing": 0.7,
        "zero_point": 32.0,
        "footprint_ra": footprint_ra,
        "footprint_dec": footprint_dec,
    }
    return CcdRow(exposure=exposure, ccd=ccd, **(values | kwargs))


def failed_row(exposure, ccd, reason="no_stars"):
    return CcdRow(
        exposure=exposure,
        ccd=ccd,
        band="r",
        mjd=58000.25,
        exposure_time=100.0,
        state="failed",
        reason=reason,
        message="there are no stars",
    )


def exposure_rows(exposure, ra, dec, n=2, failed=(), **kwargs):
    """Return n x n CCDs around a position."""
    rows = []
    for ccd in range(n * n):
        if ccd in failed:
            rows.append(failed_row(exposure, ccd))
            continue
        xi, eta = 2.2 * HALF * (np.array(divmod(ccd, n)) - (n - 1) / 2)
        rows.append(ccd_row(exposure, ccd, *sphere.tan_deproject(xi, eta, ra, dec), **kwargs))
    return rows


def manifest(folder, rows):
    path = Path(folder) / f"{rows[0].exposure}.ecsv"
    write_manifest(path, rows)
    return path


def content(path):
    """Return all rows of all tables, ordered."""
    with sqlite3.connect(path) as connection:
        tables = {
            name: sorted(connection.execute(f"SELECT * FROM {name}"), key=repr)  # noqa: S608
            for name in (table.name for table in corner_schema.TABLES)
        }
    connection.close()
    return tables


def tracts_of(database):
    return [row["tract"] for row in database.query("SELECT tract FROM tracts ORDER BY tract")]


def checksums_of(database):
    """Return the checksums of the manifests, by exposure, in order."""
    query = "SELECT exposure, manifest_sha256 FROM exposures ORDER BY exposure"
    return dict(map(tuple, database.query(query)))


@pytest.fixture(scope="module")
def survey(tmp_path_factory, skymap):
    """Return manifests of five exposures, across RA 0, at a pole and on a border of tracts."""
    folder = tmp_path_factory.mktemp("survey")
    border = skymap.tract(9813).ra + 180.0 / 242
    manifests = [
        manifest(folder, exposure_rows("zero", 0.0, 0.0)),
        manifest(folder, exposure_rows("pole", 0.0, 89.95, failed=[2])),
        manifest(folder, exposure_rows("cosmos", 150.1, 2.2)),
        manifest(folder, exposure_rows("cosmos2", 150.15, 2.25, band="i", turn=30.0)),
        manifest(folder, exposure_rows("border", border, 2.2)),
    ]
    path = folder / "corners.sqlite"
    build_survey_database(path, manifests, skymap)
    return path, manifests


class TestOverlaps:
    @pytest.mark.parametrize(
        ("ra", "dec", "turn", "bow"),
        [
            (150.3, 2.3, 0.0, 0.0),
            (150.0, 2.0, 33.0, 0.01),
            (0.02, 0.0, 10.0, -0.01),
            (77.0, 89.97, 5.0, 0.01),
            (0.0, -90.0, 45.0, 0.0),
        ],
    )
    def test_fractions_agree_with_counting_points(self, skymap, ra, dec, turn, bow):
        footprint = outline(ra, dec, turn, bow)
        tract = skymap.tract(skymap.find_tract(ra, dec))
        # throw points uniformly onto the tract's plane around the CCD
        rng = np.random.default_rng(12)
        x0, y0 = tract.sky_to_pixel(ra, dec)
        reach = 1.6 * HALF * 3600 / tract.pixel_scale
        x, y = rng.uniform(-reach, reach, (2, 60000)) + np.array([[x0], [y0]])
        shape = np.stack(sphere.tan_project(*footprint, ra, dec), axis=-1)
        sky = tract.pixel_to_sky(x, y)
        inside = polygon.contains(shape, *sphere.tan_project(*sky, ra, dec))
        overlaps = tract.patch_overlaps(*footprint)
        found = {patch for patch, _, _ in overlaps}
        for patch in tract.patches():
            bx0, by0, bx1, by1 = (edge - 0.5 for edge in patch.outer_box)
            hits = np.mean(inside & (x > bx0) & (x < bx1) & (y > by0) & (y < by1))
            expected = hits * (2 * reach) ** 2
            area = (bx1 - bx0) * (by1 - by0)
            if patch.id not in found:
                assert expected == 0.0
                continue
            _, patch_fraction, ccd_fraction = next(o for o in overlaps if o[0] == patch.id)
            assert patch_fraction == pytest.approx(expected / area, abs=0.01)
            assert ccd_fraction == pytest.approx(hits / inside.mean(), abs=0.015)
        assert found

    def test_a_ccd_around_a_patch_and_one_inside(self):
        tract = make_skymap(
            SkymapSettings(
                kind="tangent",
                tangent={"ra": 20, "dec": -30, "width": 1, "height": 1},
                pixel_scale=1.0,
                patch_inner_size=400,
                patch_border=0,
            )
        ).tract(0)
        patch = tract.patch("4_4")
        middle = tract.pixel_to_sky(
            (patch.inner_box[0] + patch.inner_box[2] - 1) / 2,
            (patch.inner_box[1] + patch.inner_box[3] - 1) / 2,
        )
        around = {o[0]: o[1:] for o in tract.patch_overlaps(*outline(*middle, half=0.1))}
        assert around["4_4"][0] == pytest.approx(1.0)
        size = tract.patch_inner_size[0]
        assert around["4_4"][1] == pytest.approx((size / 720) ** 2, rel=1e-3)
        assert sum(o[1] for o in around.values()) == pytest.approx(1.0, rel=1e-6)
        inside = tract.patch_overlaps(*outline(*middle, half=0.04))
        assert [o[0] for o in inside] == ["4_4"]
        assert inside[0][1] == pytest.approx((288 / size) ** 2, rel=1e-3)
        assert inside[0][2] == 1.0
        assert tract.patch_overlaps(*outline(200.0, 30.0)) == []
        # half over the edge of the tract, at a corner: a quarter of the CCD is on it
        corner = tract.patch_overlaps(*outline(*tract.pixel_to_sky(-0.5, -0.5), half=0.04))
        assert corner[0] == (
            "0_0",
            pytest.approx((144 / size) ** 2, rel=1e-3),
            pytest.approx(0.25, rel=1e-3),
        )


class TestTractDatabase:
    def test_what_a_tract_holds(self, tmp_path, skymap, survey):
        _, manifests = survey
        tract = skymap.tract(9813)
        path = tmp_path / "9813.sqlite"
        build_tract_database(path, manifests, tract)
        with CornerDatabase(path) as database:
            assert database.meta() == {"kind": "tract"}
            assert tracts_of(database) == [9813]
            assert checksums_of(database) == {m.stem: sha256_of(m) for m in sorted(manifests)}
            found = database.query_patch(9813, "5_4")
            assert found == sorted(found, key=lambda o: (o.ccd.exposure, o.ccd.ccd))
            assert {o.ccd.exposure for o in found} == {"cosmos", "cosmos2"}
            assert {o.ccd.exposure for o in database.query_patch(9813, "5_4", "i")} == {"cosmos2"}
            total = sum(o.ccd_fraction for o in found if o.ccd.exposure == "cosmos")
            assert 0.5 < total < 4
            assert {o.ccd.exposure for o in database.query_patch(9813, "0_4")} == {"border"}
        with sqlite3.connect(path) as connection:
            assert connection.execute("SELECT count(*) FROM patches").fetchone() == (81,)
        connection.close()

    def test_rows_come_back_as_the_manifest_had_them(self, tmp_path, skymap):
        rows = exposure_rows("e", 150.1, 2.2, failed=[1], n_matched=17, depth=25.125)
        path = tmp_path / "t.sqlite"
        build_tract_database(path, [manifest(tmp_path, rows)], skymap.tract(9813))
        with CornerDatabase(path) as database:
            assert database.ccds("e") == rows
            assert database.ccds() == rows
            assert database.ccds("other") == []

    def test_same_manifests_same_bytes(self, tmp_path, skymap, survey):
        """So a tract whose manifests did not change is not coadded again."""
        _, manifests = survey
        tract = skymap.tract(9813)
        build_tract_database(tmp_path / "a.sqlite", manifests, tract)
        build_tract_database(tmp_path / "b.sqlite", manifests[::-1], tract)
        assert (tmp_path / "a.sqlite").read_bytes() == (tmp_path / "b.sqlite").read_bytes()

    def test_no_other_file_is_left(self, tmp_path, skymap, survey):
        path = tmp_path / "9813.sqlite"
        build_tract_database(path, survey[1], skymap.tract(9813))
        with CornerDatabase(path) as database:
            database.query_point(150.1, 2.2)
            assert [p.name for p in tmp_path.iterdir()] == ["9813.sqlite"]

    def test_a_tract_without_exposures_is_whole(self, tmp_path, skymap):
        path = tmp_path / "5.sqlite"
        build_tract_database(path, [], skymap.tract(5))
        with CornerDatabase(path) as database:
            assert database.query_patch(5, "0_0") == []
            assert database.query_point(0.0, 0.0) == []

    def test_failed_ccds_have_their_reason_and_no_footprint(self, survey):
        with sqlite3.connect(survey[0]) as connection:
            rows = connection.execute(
                "SELECT exposure, ccd, reason, footprint, ra FROM ccds WHERE state = 'failed'"
            ).fetchall()
            boxes = connection.execute("SELECT count(*) FROM ccd_boxes").fetchone()[0]
        connection.close()
        assert rows == [("pole", 2, "no_stars", None, None)]
        assert boxes == 19

    def test_a_failed_ccd_is_named_where_it_would_lie(self, tmp_path, skymap):
        good = ccd_row("a", 0, 150.1, 2.2)
        place = {"footprint_ra": good.footprint_ra, "footprint_dec": good.footprint_dec}
        bad = failed_row("b", 3).model_copy(update=place)
        path = tmp_path / "s.sqlite"
        build_survey_database(path, [manifest(tmp_path, [row]) for row in (good, bad)], skymap)
        with CornerDatabase(path) as database:
            rows = database.query("SELECT tract, patch FROM ccd_patches")
            assert rows
            for tract, patch in rows:
                found = database.select(tract, patch, "r", SelectionSettings())
                assert [one.ccd.exposure for one in found.selected] == ["a"]
                assert not found.rejected
                (failed,) = found.failed
                assert failed.reasons == ("failed: no_stars",)
                assert failed.overlap.ccd.ccd == 3
                assert failed.overlap.ccd_fraction == found.selected[0].ccd_fraction
            assert [row.exposure for row in database.query_point(150.1, 2.2)] == ["a"]
        mended = ccd_row("b", 3, 40.0, 2.2)
        update_survey_database(path, [manifest(tmp_path, [row]) for row in (good, mended)], skymap)
        rebuilt = tmp_path / "again.sqlite"
        build_survey_database(
            rebuilt, [manifest(tmp_path, [row]) for row in (good, mended)], skymap
        )
        for query in ("SELECT * FROM tracts ORDER BY 1", "SELECT * FROM failed_ccd_patches"):
            with CornerDatabase(path) as one, CornerDatabase(rebuilt) as other:
                assert [*map(tuple, one.query(query))] == [*map(tuple, other.query(query))]

    def test_an_exposure_of_which_all_ccds_failed(self, tmp_path, skymap):
        rows = [failed_row("bad", 0), failed_row("bad", 1)]
        path = tmp_path / "t.sqlite"
        build_tract_database(path, [manifest(tmp_path, rows)], skymap.tract(0))
        with CornerDatabase(path) as database:
            assert list(checksums_of(database)) == ["bad"]
            assert database.ccds() == rows


class TestQueryPoint:
    def test_on_both_sides_of_ra_0(self, survey):
        """CCDs 0.02 degrees apart around RA 0: one on each side, none at RA 0 itself."""
        with CornerDatabase(survey[0]) as database:
            west = database.query_point(359.98, 0.1)
            east = database.query_point(0.02, 0.1)
            assert [(c.exposure, c.ccd) for c in west] == [("zero", 1)]
            assert [(c.exposure, c.ccd) for c in east] == [("zero", 3)]
            assert database.query_point(0.0, 0.1) == []
            assert database.query_point(-0.02, 0.1) == west
            assert database.query_point(360.02, 0.1) == east

    def test_a_ccd_across_ra_0_and_one_around_the_pole(self, tmp_path, skymap):
        path = tmp_path / "s.sqlite"
        rows = [ccd_row("x", 0, 0.0, 30.0), ccd_row("x", 1, 0.0, 90.0), ccd_row("x", 2, 9.0, -90.0)]
        build_survey_database(path, [manifest(tmp_path, rows)], skymap)
        with CornerDatabase(path) as database:

            def ccds(ra, dec):
                return [c.ccd for c in database.query_point(ra, dec)]

            assert ccds(359.99, 30.0) == ccds(0.01, 30.0) == ccds(0.0, 30.0) == [0]
            assert ccds(123.0, 90.0) == ccds(200.0, 89.95) == [1]
            assert ccds(0.0, -90.0) == ccds(77.0, -89.95) == [2]
            assert ccds(200.0, 89.8) == []

    def test_agrees_with_looking_at_every_footprint(self, tmp_path, skymap):
        rng = np.random.default_rng(3)
        centres = [(0.0, 0.0), (45.0, 89.9), (250.0, -60.0)]
        rows, manifests = [], []
        for i in range(9):
            ra, dec = centres[i % 3]
            at = sphere.tan_deproject(*rng.uniform(-0.1, 0.1, 2), ra, dec)
            mine = exposure_rows(f"e{i}", *at, n=2, turn=rng.uniform(0, 90), bow=0.02)
            rows += mine
            manifests.append(manifest(tmp_path, mine))
        path = tmp_path / "s.sqlite"
        build_survey_database(path, manifests, skymap)
        n_found = 0
        with CornerDatabase(path) as database:
            for ra, dec in centres * 25:
                at = tuple(map(float, sphere.tan_deproject(*rng.uniform(-0.4, 0.4, 2), ra, dec)))
                expected = []
                for row in rows:
                    if sphere.separation(row.footprint_ra[0], row.footprint_dec[0], *at) > 5:
                        continue
                    # in the plane of the CCD, not in that of the position
                    plane = row.footprint_ra[0], row.footprint_dec[0]
                    shape = sphere.tan_project(row.footprint_ra, row.footprint_dec, *plane)
                    where = sphere.tan_project(*at, *plane)
                    if polygon.contains(np.stack(shape, axis=1), *where):
                        expected.append((row.exposure, row.ccd))
                found = [(c.exposure, c.ccd) for c in database.query_point(*at)]
                assert found == sorted(expected)
                n_found += len(found)
        assert n_found > 30

    def test_the_box_holds_the_whole_footprint(self):
        """Also where the sphere bulges beyond the vertices, as in a CCD around a pole."""
        for ra, dec in [(0.0, 90.0), (0.0, 0.0), (90.0, 0.0), (33.0, -45.0)]:
            vectors = sphere.to_vector(*outline(ra, dec, turn=20.0, half=0.5))
            _, radius = polygon.bounding_cap(vectors[None])
            box = build.vector_boxes(vectors[None], radius).reshape(3, 2)
            grid = np.linspace(-0.49, 0.49, 21)
            cos, sin = np.cos(np.radians(20.0)), np.sin(np.radians(20.0))
            x, y = np.meshgrid(grid, grid)
            inside = sphere.to_vector(
                *sphere.tan_deproject(cos * x - sin * y, sin * x + cos * y, ra, dec)
            )
            assert (inside >= box[:, 0]).all()
            assert (inside <= box[:, 1]).all()

    @pytest.mark.parametrize(
        ("ra", "dec"), [(10.0, 91.0), (float("nan"), 0.0), (0.0, float("nan"))]
    )
    def test_not_a_position(self, survey, ra, dec):
        with CornerDatabase(survey[0]) as database, pytest.raises(InputError, match="position"):
            database.query_point(ra, dec)


class TestSurveyDatabase:
    def test_tracts_are_those_that_ccds_overlap(self, survey, skymap):
        with CornerDatabase(survey[0]) as database:
            expected = set()
            for row in database.ccds():
                if row.state == "done":
                    expected |= set(tracts_touching(skymap, row.footprint_ra, row.footprint_dec))
            assert tracts_of(database) == sorted(expected)
            assert {9813, 9814, skymap.n_tracts - 1} <= expected
            # an exposure on the border of two tracts stands in both
            for tract, patch in [(9813, "0_4"), (9814, "8_4")]:
                assert {o.ccd.exposure for o in database.query_patch(tract, patch)} == {"border"}

    def test_it_agrees_with_the_tract_database(self, tmp_path, survey, skymap):
        build_tract_database(tmp_path / "t.sqlite", survey[1], skymap.tract(9813))
        with CornerDatabase(survey[0]) as whole, CornerDatabase(tmp_path / "t.sqlite") as part:
            for patch in skymap.tract(9813).patch_ids():
                assert whole.query_patch(9813, patch) == part.query_patch(9813, patch)

    def test_update_touches_only_what_changed(self, tmp_path, skymap, survey, monkeypatch):
        manifests = [Path(shutil.copy(m, tmp_path)) for m in survey[1]]
        path = tmp_path / "corners.sqlite"
        first = update_survey_database(path, manifests, skymap)
        assert first.added == sorted(m.stem for m in manifests)
        zero, _, cosmos, cosmos2, border = manifests
        # one is redone with another seeing, one is dropped, one is added
        manifest(tmp_path, exposure_rows("cosmos", 150.1, 2.2, seeing=1.1))
        new = manifest(tmp_path, exposure_rows("new", 10.0, -40.0))
        inserted, deleted, read = [], [], []
        spy(
            monkeypatch,
            survey_module,
            "insert_exposures",
            lambda _, manifests, __: inserted.extend(one.exposure for one in manifests),
        )
        spy(
            monkeypatch, survey_module, "_delete_exposure", lambda _, name, __: deleted.append(name)
        )
        spy(monkeypatch, build, "rows_of_manifest", lambda path, _: read.append(Path(path).stem))
        now = [zero, cosmos, cosmos2, border, new]
        update = update_survey_database(path, now, skymap)
        assert (update.added, update.redone, update.dropped) == (["new"], ["cosmos"], ["pole"])
        assert update.unchanged == ["border", "cosmos2", "zero"]
        assert inserted == ["cosmos", "new"]
        assert deleted == ["cosmos", "pole"]
        assert sorted(read) == ["cosmos", "new"]
        build_survey_database(tmp_path / "anew.sqlite", now, skymap)
        assert content(path) == content(tmp_path / "anew.sqlite")
        with CornerDatabase(path) as database:
            assert database.query_point(150.05, 2.15)[0].seeing == 1.1
            assert database.query_point(0.0, 89.9) == []
            assert skymap.n_tracts - 1 not in tracts_of(database)

    def test_nothing_changed(self, tmp_path, skymap, survey):
        path = tmp_path / "corners.sqlite"
        shutil.copy(survey[0], path)
        update = update_survey_database(path, survey[1], skymap)
        assert (update.added, update.redone, update.dropped) == ([], [], [])
        assert content(path) == content(survey[0])

    def test_a_file_of_no_use_is_made_anew(self, tmp_path, skymap, survey):
        path = tmp_path / "corners.sqlite"
        whole = survey[0].read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2 : len(whole) // 2 + 6000] = b"\xff" * 6000
        for content_before in (b"", b"not a database" * 300, whole[: len(whole) // 2], damaged):
            path.write_bytes(content_before)
            assert len(update_survey_database(path, survey[1], skymap).added) == 5
            assert content(path) == content(survey[0])
        other = make_skymap(SkymapSettings(patch_inner_size=3000))
        assert len(update_survey_database(path, survey[1], other).added) == 5
        build_tract_database(path, survey[1], skymap.tract(9813))
        assert len(update_survey_database(path, survey[1], skymap).added) == 5

    def test_a_failed_update_leaves_the_old_file(self, tmp_path, skymap, survey, monkeypatch):
        path = tmp_path / "corners.sqlite"
        shutil.copy(survey[0], path)
        before = path.read_bytes()
        new = manifest(tmp_path, exposure_rows("new", 10.0, -40.0))

        def fail(*_):
            raise sqlite3_full()

        monkeypatch.setattr(survey_module, "insert_exposures", fail)
        with pytest.raises(InputError, match="No space left on device"):
            update_survey_database(path, [*survey[1], new], skymap)
        assert path.read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["corners.sqlite", "new.ecsv"]


def spy(monkeypatch, module, name, note):
    real = getattr(module, name)

    def noted(*args):
        note(*args)
        return real(*args)

    monkeypatch.setattr(module, name, noted)


def sqlite3_full():
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error


class TestSelection:
    def test_selected_and_rejected_with_reasons(self, tmp_path, skymap):
        rows = {
            "good": {},
            "blurred": {"seeing": 1.4},
            "unknown": {"seeing": None},
            "cloudy": {"zero_point": 31.2, "seeing": 1.3},
        }
        manifests = [
            manifest(tmp_path, exposure_rows(name, 150.1, 2.2, **values))
            for name, values in rows.items()
        ]
        manifests.append(manifest(tmp_path, exposure_rows("other", 150.1, 2.2, band="g")))
        build_tract_database(tmp_path / "t.sqlite", manifests, skymap.tract(9813))
        with CornerDatabase(tmp_path / "t.sqlite") as database:
            everything = database.query_patch(9813, "5_4", "r")
            no_cut = database.select(9813, "5_4", "r", SelectionSettings())
            assert no_cut.selected == everything
            assert no_cut.rejected == []
            settings = SelectionSettings(max_seeing=1.2, max_zero_point_loss=0.5)
            chosen = database.select(9813, "5_4", "r", settings)
        assert {o.ccd.exposure for o in chosen.selected} == {"good"}
        assert len(chosen.selected) + len(chosen.rejected) == len(everything)
        reasons = {r.overlap.ccd.exposure: r.reasons for r in chosen.rejected}
        assert reasons == {
            "blurred": ("seeing 1.4 > 1.2 arcsec",),
            "unknown": ("seeing is not known",),
            "cloudy": (
                "seeing 1.3 > 1.2 arcsec",
                "zero-point 0.8 below the median > 0.5 mag",
            ),
        }


class TestBadInput:
    def test_missing_database(self, tmp_path):
        with pytest.raises(InputError, match="no corner database"):
            CornerDatabase(tmp_path / "none.sqlite")

    def test_not_a_database(self, tmp_path):
        path = tmp_path / "x.sqlite"
        path.write_text("SIMPLE  =                    T" * 100)
        with pytest.raises(InputError, match="not a readable corner database"):
            CornerDatabase(path)
        connection = sqlite3.connect(tmp_path / "y.sqlite")
        connection.execute("CREATE TABLE t (x)")
        connection.close()
        with pytest.raises(InputError, match="is not a corner database"):
            CornerDatabase(tmp_path / "y.sqlite")

    def test_other_schema_version(self, tmp_path, survey):
        path = tmp_path / "old.sqlite"
        shutil.copy(survey[0], path)
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version = 99")
        connection.close()
        with pytest.raises(InputError, match="schema version 99"):
            CornerDatabase(path)

    def test_it_cannot_be_written_through_a_reader(self, survey):
        with CornerDatabase(survey[0]) as database, pytest.raises(InputError, match="readonly"):
            database.query("DELETE FROM ccds")

    def test_unknown_tract_and_patch(self, survey):
        with CornerDatabase(survey[0]) as database:
            with pytest.raises(InputError, match="no tract 17"):
                database.query_patch(17, "0_0")
            with pytest.raises(InputError, match="no patch '9_9'"):
                database.query_patch(9813, "9_9")
            with pytest.raises(InputError, match="no patch"):
                database.select(9813, "' OR 1=1 --", "r", SelectionSettings())

    def test_two_manifests_of_an_exposure(self, tmp_path, skymap, survey):
        again = Path(shutil.copy(survey[1][0], tmp_path / "again.ecsv"))
        with pytest.raises(InputError, match="zero has another manifest"):
            build_survey_database(tmp_path / "s.sqlite", [*survey[1], again], skymap)
        assert not (tmp_path / "s.sqlite").exists()
        path = tmp_path / "corners.sqlite"
        shutil.copy(survey[0], path)
        with pytest.raises(InputError, match="zero has another manifest"):
            update_survey_database(path, [*survey[1], again], skymap)

    def test_missing_and_broken_manifests(self, tmp_path, skymap):
        path = tmp_path / "s.sqlite"
        with pytest.raises(InputError, match="cannot be read"):
            build_survey_database(path, [tmp_path / "none.ecsv"], skymap)
        row = ccd_row("e", 3, 0.0, 0.0).model_copy(update={"footprint_ra": []})
        with pytest.raises(InputError, match="CCD 3 is done but has no footprint"):
            build_survey_database(path, [manifest(tmp_path, [row])], skymap)

    def test_sqlite_without_rtree(self, tmp_path, skymap, monkeypatch):
        class WithoutRtree:
            def execute(self, _):
                raise sqlite3.OperationalError("no such module: rtree")

            def close(self):
                pass

        real = sqlite3.connect
        monkeypatch.setattr(
            sqlite3, "connect", lambda p, **k: WithoutRtree() if p == ":memory:" else real(p, **k)
        )
        with pytest.raises(InputError, match=r"no R\*Tree module"):
            build_tract_database(tmp_path / "t.sqlite", [], skymap.tract(1))


class TestSchema:
    def test_a_change_of_the_schema_needs_a_new_version(self):
        """If this fails: raise SCHEMA_VERSION, then put the new digest here."""
        made = (*corner_schema.TABLES, *corner_schema.SURVEY_TABLES, *corner_schema.VIEWS)
        statements = [*(one.sql for one in made), *corner_schema.INDEXES]
        digest = hashlib.sha256("\n".join(statements).encode()).hexdigest()[:12]
        assert (corner_schema.SCHEMA_VERSION, digest) == (3, "7b76b6a0ab9a")

    def test_documentation_names_everything(self):
        text = corner_schema.schema_markdown()
        for table in corner_schema.TABLES:
            assert f"### {table.name}\n" in text
            for column in table.columns:
                assert f"| `{column.name}` |" in text
        for view in corner_schema.VIEWS:
            assert f"### {view.name}\n" in text
        for name in CcdRow.model_fields:
            assert name.startswith("footprint_") or f"| `{name}` |" in text

    def test_views_and_examples_run_in_the_database(self, survey):
        with CornerDatabase(survey[0]) as database:
            rows = database.query("SELECT * FROM v_ccd")
            assert len(rows) == 19
            by_key = {(c.exposure, c.ccd): c for c in database.ccds()}
            for row in rows:
                ccd = by_key[row["exposure"], row["ccd"]]
                for corner in range(4):
                    assert row[f"ra_{corner}"] == ccd.footprint_ra[8 * corner]
                    assert row[f"dec_{corner}"] == ccd.footprint_dec[8 * corner]
            depth = database.query(
                "SELECT * FROM v_patch_depth WHERE tract = 9813 AND patch = '5_4' AND band = 'r'"
            )
            found = database.query_patch(9813, "5_4", "r")
            assert depth[0]["n_exposures"] == 1
            assert depth[0]["n_ccds"] == len(found)
            assert depth[0]["mean_exposures"] == pytest.approx(sum(o.patch_fraction for o in found))
            assert len(database.query("SELECT * FROM v_exposure")) == 5
            assert [r["ccd"] for r in database.query("SELECT * FROM v_failed")] == [2]
            answers = [database.query(query) for _, query in corner_schema.EXAMPLES]
            assert {r["exposure"] for r in answers[2]} >= {"cosmos2"}
            # no CCD of the survey failed on that patch
            assert all(answers[:-1])
            assert answers[-1] == []

    @pytest.mark.skipif(shutil.which("sqlite3") is None, reason="no sqlite3 program")
    def test_usable_from_the_sqlite3_program(self, survey):
        query = "SELECT exposure, ccd FROM v_ccd_patch WHERE tract = 9814 AND patch = '8_4'"
        result = subprocess.run(
            ["sqlite3", "-readonly", "-json", str(survey[0]), query],
            capture_output=True,
            text=True,
            check=True,
        )
        assert {row["exposure"] for row in json.loads(result.stdout)} == {"border"}
