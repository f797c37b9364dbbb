"""The reference catalogue: which stars a field gets, where they are, how bright they are."""

import gzip
import os

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from pydantic import ValidationError

from coaddflow.astrometry.refcat import ccd_cone, exposure_cone, load_refcat, stars_in_cone
from coaddflow.errors import CcdFailure, InputError
from coaddflow.geometry import sphere
from coaddflow.instrument.camera import load_camera
from coaddflow.settings.refcat import MagnitudeColumn, RefcatSettings

J2016 = 51544.5 + 16 * 365.25


def write(path, **columns):
    table = Table(columns)
    kind = {"fits": "fits", "csv": "ascii.csv", "ecsv": "ascii.ecsv"}[path.name.split(".")[1]]
    table.write(path, format=kind, overwrite=True)
    return path


def random_sky(n=4000, seed=1):
    """Return stars all over the sky, with magnitudes."""
    rng = np.random.default_rng(seed)
    ra, dec = sphere.from_vector(rng.normal(size=(n, 3)))
    return {"ra": ra, "dec": dec, "mag": rng.uniform(8.0, 20.0, n)}


@pytest.mark.parametrize("name", ["stars.fits", "stars.csv", "stars.ecsv", "stars.csv.gz"])
def test_formats_give_the_same_stars(tmp_path, name):
    sky = random_sky(500)
    path = write(tmp_path / name.removesuffix(".gz"), **sky)
    if name.endswith(".gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress((tmp_path / "stars.csv").read_bytes()))
    stars = load_refcat(RefcatSettings(path=str(path)), 100.0, 10.0, 30.0, "r", J2016)
    inside = sphere.separation(sky["ra"], sky["dec"], 100.0, 10.0) <= 30.0
    assert stars.colnames == ["ra", "dec", "mag", "mag_err"]
    assert len(stars) == inside.sum() > 10
    assert np.allclose(stars["mag"], np.sort(sky["mag"][inside]), atol=0, rtol=1e-12)
    assert np.isnan(stars["mag_err"]).all()


@pytest.mark.parametrize(
    ("ra", "dec", "radius"),
    [
        (0.0, 5.0, 12.0),
        (359.9, -5.0, 12.0),
        (180.0, 0.0, 90.0),
        (12.0, 90.0, 30.0),
        (9.0, -89, 9.0),
    ],
)
def test_cone_is_a_cone_at_ra_zero_and_the_poles(tmp_path, ra, dec, radius):
    sky = random_sky()
    path = write(tmp_path / "sky.fits", **sky)
    stars = load_refcat(RefcatSettings(path=str(path)), ra, dec, radius, "r", J2016)
    inside = sphere.separation(sky["ra"], sky["dec"], ra, dec) <= radius
    assert set(stars["mag"]) == set(sky["mag"][inside])
    assert inside.sum() > 20


def test_right_ascensions_below_zero_are_wrapped(tmp_path):
    path = write(tmp_path / "s.csv", ra=[-0.1, 0.1], dec=[0.0, 0.0], mag=[9.0, 10.0])
    stars = load_refcat(RefcatSettings(path=str(path)), 0.0, 0.0, 1.0, "r", J2016)
    assert stars["ra"].tolist() == pytest.approx([359.9, 0.1])


def test_files_folders_patterns_and_lists(tmp_path):
    sky = random_sky(600)
    (tmp_path / "chunks").mkdir()
    for i in range(3):
        part = {name: values[i * 200 : (i + 1) * 200] for name, values in sky.items()}
        write(tmp_path / "chunks" / f"part-{i}.fits", **part)
    (tmp_path / "chunks" / "README.md").write_text("not a catalogue")
    (tmp_path / "chunks" / ".part-0.fits.abc.fits").write_text("of an unfinished copy")
    folder = tmp_path / "chunks"
    for path in (
        str(folder),
        f"{folder}/part-*.fits",
        [f"{folder}/part-[01].fits", f"{folder}/part-2.fits"],
        [str(folder), f"{folder}/part-1.fits"],
    ):
        settings = RefcatSettings(path=path)
        assert [f.name for f in settings.files()] == ["part-0.fits", "part-1.fits", "part-2.fits"]
        stars = load_refcat(settings, 50.0, 50.0, 180.0, "r", J2016)
        assert sorted(stars["mag"]) == sorted(sky["mag"])


def test_stars_in_two_files_are_there_once(tmp_path):
    sky = random_sky(100)
    write(tmp_path / "a.fits", **sky)
    write(tmp_path / "b.fits", **{name: values[50:] for name, values in sky.items()})
    stars = load_refcat(RefcatSettings(path=str(tmp_path)), 0.0, 0.0, 180.0, "r", J2016)
    assert len(stars) == 100


def test_proper_motion_carries_stars_along_the_sky(tmp_path):
    # 3600 mas a year for ten years are 0.01 degrees; pm_ra already has cos(dec) in it
    path = write(
        tmp_path / "s.fits",
        ra=[359.999, 40.0, 40.0],
        dec=[60.0, 89.998, 10.0],
        mag=[10.0, 11.0, 12.0],
        pmra=[3600.0, 0.0, np.nan],
        pmdec=[0.0, 3600.0, np.nan],
    )
    settings = RefcatSettings(path=str(path), pm_ra="pmra", pm_dec="pmdec", epoch=2006.0)
    stars = load_refcat(settings, 0.0, 60.0, 90.0, "r", J2016)
    assert stars["ra"][0] == pytest.approx(-0.001 + 0.01 / np.cos(np.radians(60.0)), abs=1e-6)
    assert stars["dec"][0] == pytest.approx(60.0, abs=1e-5)
    # over the pole: 0.002 degrees up, then 0.008 down on the other side
    assert stars["ra"][1] == pytest.approx(220.0, abs=1e-4)
    assert stars["dec"][1] == pytest.approx(89.992, abs=1e-6)
    # not known counts as none
    assert (stars["ra"][2], stars["dec"][2]) == (pytest.approx(40.0), pytest.approx(10.0))


def test_epoch_of_each_star(tmp_path):
    columns = {"ra": [10.0, 20.0], "dec": [0.0, 0.0], "mag": [1.0, 2.0], "t": [2016.0, 2006.0]}
    path = write(tmp_path / "s.ecsv", **columns, a=[3600.0, 3600.0], d=[0.0, 0.0])
    settings = RefcatSettings(path=str(path), pm_ra="a", pm_dec="d", epoch_column="t")
    stars = load_refcat(settings, 15.0, 0.0, 20.0, "r", J2016)
    assert stars["ra"].tolist() == pytest.approx([10.0, 20.01])


def test_star_that_moves_into_the_cone_is_found(tmp_path):
    path = write(tmp_path / "s.csv", ra=[10.0], dec=[0.06], mag=[9.0], a=[0.0], d=[-10000.0])
    settings = RefcatSettings(path=str(path), pm_ra="a", pm_dec="d", epoch=2000.0)
    stars = load_refcat(settings, 10.0, 0.0, 0.02, "r", J2016)
    assert stars["dec"][0] == pytest.approx(0.06 - 16 * 10 / 3600.0, abs=1e-6)
    with pytest.raises(CcdFailure):
        load_refcat(settings, 10.0, 0.06, 0.02, "r", J2016)


def test_magnitudes_of_each_band(tmp_path):
    path = write(
        tmp_path / "s.fits",
        ra=[10.0, 10.1, 10.2],
        dec=[0.0, 0.0, 0.0],
        G=[15.0, 14.0, np.nan],
        BP=[15.5, 14.2, 16.0],
        RP=[14.5, 13.7, 15.0],
        G_err=[0.01, 0.02, 0.03],
    )
    settings = RefcatSettings(
        path=str(path),
        bands={
            "g": {
                "magnitude": "G",
                "error": "G_err",
                "color": ("BP", "RP"),
                "color_terms": (0.1, 0.5, 0.25),
            }
        },
        fallback={"magnitude": "RP"},
    )
    g = load_refcat(settings, 10.0, 0.0, 1.0, "g", J2016)
    # G + 0.1 + 0.5 (BP - RP) + 0.25 (BP - RP)^2; the star without G comes last
    assert g["mag"][:2].tolist() == pytest.approx([14.0 + 0.1 + 0.25 + 0.0625, 15.85])
    assert g["ra"].tolist() == pytest.approx([10.1, 10.0, 10.2])
    assert np.isnan(g["mag"][2])
    assert g["mag_err"].tolist() == pytest.approx([0.02, 0.01, 0.03], rel=1e-6)
    assert load_refcat(settings, 10.0, 0.0, 1.0, "z", J2016)["mag"][0] == 13.7
    with pytest.raises(InputError, match=r"band 'z'.*refcat.bands"):
        load_refcat(settings.model_copy(update={"fallback": None}), 10.0, 0.0, 1.0, "z", J2016)


def test_faint_stars_can_be_left_out(tmp_path):
    sky = random_sky(300)
    path = write(tmp_path / "s.fits", **sky)
    settings = RefcatSettings(path=str(path), faintest=15.0)
    stars = load_refcat(settings, 0.0, 0.0, 180.0, "r", J2016)
    assert len(stars) == np.sum(sky["mag"] <= 15.0)


def test_empty_fields_of_text_files_are_nan(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("# from somewhere\nra,dec,mag,name\n10,20,,a\n11,20,7,b\n,20,8,c\n")
    stars = load_refcat(RefcatSettings(path=str(path)), 10.0, 20.0, 5.0, "r", J2016)
    assert stars["ra"].tolist() == [11.0, 10.0]
    assert stars["mag"][0] == 7.0
    assert np.isnan(stars["mag"][1])


def test_field_without_a_star_is_a_failure_of_the_ccd(tmp_path):
    path = write(tmp_path / "s.csv", ra=[10.0], dec=[0.0], mag=[9.0])
    with pytest.raises(CcdFailure) as failure:
        load_refcat(RefcatSettings(path=str(path)), 200.0, 30.0, 1.0, "r", J2016)
    assert failure.value.reason == "refcat_misses_field"
    for part in (str(path), "RA 200.0000 Dec 30.0000", "refcat.path"):
        assert part in failure.value.message


def test_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "s.csv", ra=[10.0], dec=[0.0], mag=[9.0])
    settings = RefcatSettings(path=str(path))
    assert load_refcat(settings, 10.0, 0.0, 1.0, "r", J2016)["mag"][0] == 9.0
    write(path, ra=[10.0], dec=[0.0], mag=[8.0])
    os.utime(path, ns=(1, 1))
    assert load_refcat(settings, 10.0, 0.0, 1.0, "r", J2016)["mag"][0] == 8.0


def load(path, **settings):
    return load_refcat(RefcatSettings(path=str(path), **settings), 0.0, 0.0, 1.0, "r", J2016)


def test_missing_catalogues_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, cause in (
        (tmp_path / "no.fits", "does not exist"),
        (tmp_path / "empty", "no catalogue file"),
        (tmp_path / "*.fits", "no file matches"),
    ):
        with pytest.raises(InputError, match=cause) as error:
            load(path)
        assert str(path) in str(error.value)
    with pytest.raises(InputError, match=r"refcat\.path"):
        load_refcat(RefcatSettings(), 0.0, 0.0, 1.0, "r", J2016)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s.fits", b"no FITS at all"),
        ("s.fits", b""),
        ("s.csv", b"\xff\xfe\x00 binary"),
        ("s.csv", b"ra,dec,mag\n1,2\n1,2,3,4\n"),
        ("s.ecsv", b"# %ECSV 1.0\n# ---\n# datatype: [\nra dec\n1 2\n"),
        ("s.txt", b"ra,dec,mag\n"),
    ],
)
def test_unreadable_catalogues_are_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load(path)
    assert str(path) in str(error.value)


def test_truncated_and_imageless_fits_are_named(tmp_path):
    path = write(tmp_path / "s.fits", **random_sky(5000))
    path.write_bytes(path.read_bytes()[:60000])
    with pytest.raises(InputError, match="truncated"):
        load(path)
    fits.PrimaryHDU(np.zeros((4, 4))).writeto(tmp_path / "i.fits")
    with pytest.raises(InputError, match="no table"):
        load(tmp_path / "i.fits")


def test_wrong_columns_are_named(tmp_path):
    path = write(tmp_path / "s.csv", ra=[1.0], dec=[2.0], V=[3.0], name=["a"])
    with pytest.raises(InputError, match=r"no column 'mag'; it has ra, dec, V, name"):
        load(path)
    with pytest.raises(InputError, match=r"'name' .* not a column of numbers"):
        load(path, fallback=MagnitudeColumn(magnitude="name"))
    with pytest.raises(InputError, match=r"'RA'"):
        load(path, ra="RA", fallback=MagnitudeColumn(magnitude="V"))
    wild = write(tmp_path / "w.csv", ra=[1.0], dec=[123.0], mag=[3.0])
    with pytest.raises(InputError, match=r"'dec' has values outside"):
        load(wild)
    sexagesimal = write(tmp_path / "x.csv", ra=["07:23:28"], dec=[1.0], mag=[3.0])
    with pytest.raises(InputError, match=r"'ra'.*decimal degrees"):
        load(sexagesimal)


def test_units_other_than_degrees_are_refused(tmp_path):
    table = Table({"ra": [1.0], "dec": [0.1], "mag": [3.0]}, units={"ra": "rad", "dec": "rad"})
    for name, kind in (("s.fits", "fits"), ("s.ecsv", "ascii.ecsv")):
        table.write(tmp_path / name, format=kind)
        with pytest.raises(InputError, match="is in rad"):
            load(tmp_path / name)


def test_settings_that_do_not_fit_together():
    with pytest.raises(ValidationError, match="both or none"):
        RefcatSettings(pm_ra="pmra", epoch=2016.0)
    with pytest.raises(ValidationError, match="epoch"):
        RefcatSettings(pm_ra="pmra", pm_dec="pmdec")
    with pytest.raises(ValidationError, match="color"):
        MagnitudeColumn(magnitude="G", color_terms=(0.0, 1.0))


@pytest.mark.parametrize("pm", [False, True])
def test_the_stars_of_a_ccd_are_found_among_those_of_its_exposure(tmp_path, pm):
    rng = np.random.default_rng(5)
    sky = {"ra": rng.uniform(148.5, 151.5, 3000), "dec": rng.uniform(0.5, 3.5, 3000)}
    sky["mag"] = np.where(rng.random(3000) < 0.1, np.nan, rng.integers(14, 20, 3000))
    if pm:
        sky["pm_ra"], sky["pm_dec"] = rng.normal(0.0, 100.0, (2, 3000))
    path = str(write(tmp_path / "stars.fits", **sky))
    motion = {"pm_ra": "pm_ra", "pm_dec": "pm_dec", "epoch": 2016.0} if pm else {}
    settings = RefcatSettings(path=path, **motion)
    camera, pointing = load_camera("decam"), (150.0, 2.0, 20.0, 0.2)
    mjd = J2016 + 3000.0
    cone = exposure_cone(camera, camera.detectors[::10], *pointing)
    field = load_refcat(settings, *cone, "r", mjd)
    for detector in camera.detectors[::10]:
        cone = ccd_cone(camera, detector, *pointing)
        alone = load_refcat(settings, *cone, "r", mjd)
        among = field[stars_in_cone(field, *cone)]
        assert 10 < len(alone) < len(field)
        for name in alone.colnames:
            assert np.array_equal(alone[name], among[name], equal_nan=True)
