"""The reference catalogue: which stars a field gets, where they are, how bright they are."""

import gzip
import os
import sys

import numpy as np
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.table import Table
from pydantic import ValidationError

from coaddflow.astrometry.refcat import (
    ccd_cone,
    count_stars,
    exposure_cone,
    load_refcat,
    stars_in_cone,
)
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
    assert stars.colnames == ["ra", "dec", "mag", "mag_err", "motion_known"]
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
        ("s.txt", b"# nothing\n"),
        ("s.vot", b"<?xml version='1.0'?><VOTABLE><RESOURCE><TABLE>"),
        ("s.vot", b"<?xml version='1.0'?><html/>"),
        ("s.csv.gz", gzip.compress(b"ra,dec,mag\n1,2,3\n" * 1000)[:-9]),
        ("s.parquet", b"PAR1 and no more"),
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
    with pytest.raises(InputError, match=r"'deg' \(did you mean 'dec'\?\)"):
        load(path, dec="deg", fallback=MagnitudeColumn(magnitude="V"))
    wild = write(tmp_path / "w.csv", ra=[1.0], dec=[123.0], mag=[3.0])
    with pytest.raises(InputError, match=r"'dec' has values outside"):
        load(wild)
    sexagesimal = write(tmp_path / "x.csv", ra=["07:23:28"], dec=[1.0], mag=[3.0])
    with pytest.raises(InputError, match=r"'ra'.*decimal numbers"):
        load(sexagesimal)


STARS = {
    "ra": np.array([10.0, 10.2, 10.4, 10.6]),
    "dec": np.array([-1.0, -0.5, 0.5, 1.0]),
    "mag": np.array([14.0, 15.0, 16.0, 17.0]),
}


def read_near(path, **settings):
    return load_refcat(RefcatSettings(path=str(path), **settings), 10.3, 0.0, 2.0, "g", J2016)


def assert_same_stars(stars, without=()):
    """The stars are all of `STARS`, brightest first; some have no magnitude and come last."""
    kept = [i for i in range(4) if i not in without]
    assert stars["ra"].tolist() == pytest.approx(STARS["ra"][[*kept, *without]], abs=1e-9)
    assert stars["dec"].tolist() == pytest.approx(STARS["dec"][[*kept, *without]], abs=1e-9)
    assert stars["mag"][: len(kept)].tolist() == pytest.approx(
        STARS["mag"][kept].tolist(), abs=1e-4
    )
    assert np.isnan(stars["mag"][len(kept) :]).all()


@pytest.mark.parametrize(("name", "unit"), [("ra", "rad"), ("ra", "radian"), ("ra", "arcsec")])
@pytest.mark.parametrize("ending", ["fits", "ecsv", "vot"])
def test_units_of_positions_are_those_of_the_file(tmp_path, name, unit, ending):
    scale = u.deg.to(u.Unit(unit))
    angles = {key: STARS[key] * scale for key in ("ra", "dec")}
    table = Table({**angles, "mag": STARS["mag"]}, units={"ra": unit, "dec": unit})
    kinds = {"fits": "fits", "ecsv": "ascii.ecsv", "vot": "votable"}
    table.write(tmp_path / f"s.{ending}", format=kinds[ending])
    assert_same_stars(read_near(tmp_path / f"s.{ending}"))


def test_right_ascension_in_hours(tmp_path):
    hours = {"ra": STARS["ra"] / 15.0, "dec": STARS["dec"], "mag": STARS["mag"]}
    for unit in ("hourangle", "h"):
        Table(hours, units={"ra": unit, "dec": "deg"}).write(tmp_path / f"{unit}.ecsv")
        assert_same_stars(read_near(tmp_path / f"{unit}.ecsv"))


def test_unit_of_positions_from_the_settings(tmp_path):
    path = write(
        tmp_path / "s.csv",
        ra=np.radians(STARS["ra"]),
        dec=np.radians(STARS["dec"]),
        mag=STARS["mag"],
    )
    assert_same_stars(read_near(path, position_unit="rad"))
    with pytest.raises(InputError, match=r"in 'm'.*position_unit"):
        Table(STARS, units={"ra": "m"}).write(tmp_path / "m.ecsv")
        read_near(tmp_path / "m.ecsv")


def test_shard_of_lsst_has_radians_and_nanojansky(tmp_path):
    flux = 10.0 ** (-0.4 * (STARS["mag"] - 31.4))
    columns = {
        "coord_ra": np.radians(STARS["ra"]),
        "coord_dec": np.radians(STARS["dec"]),
        "g_flux": np.where(STARS["mag"] > 16.5, -3.0, flux),
        "g_fluxErr": 0.01 * flux,
        "pm_ra": np.full(4, 3600.0) * u.mas.to(u.rad),
        "pm_dec": np.zeros(4),
        "epoch": np.full(4, 51544.5 + 6 * 365.25),
    }
    units = {"coord_ra": "rad", "coord_dec": "rad", "g_flux": "nJy", "g_fluxErr": "nJy"}
    names = {"ra": "coord_ra", "dec": "coord_dec"}
    band = {"magnitude": "g_flux", "error": "g_fluxErr"}
    for name, of_columns in (("plain.fits", {}), ("units.fits", {**units, "pm_ra": "rad"})):
        Table(columns, units=of_columns).write(tmp_path / name)
        stars = read_near(tmp_path / name, **names, fallback=band)
        assert_same_stars(stars, without=[3])
        assert stars["mag_err"][0] == pytest.approx(0.010857, rel=1e-3)
        motion = {"pm_ra": "pm_ra", "pm_dec": "pm_dec", "epoch_column": "epoch"}
        moved = read_near(tmp_path / name, **names, fallback=band, **motion)
        assert moved["ra"][0] == pytest.approx(10.01, abs=1e-5)


def test_fluxes_whose_unit_is_not_known_are_refused(tmp_path):
    path = write(tmp_path / "s.csv", **STARS, phot_g_mean_flux=[1e4, 2e4, 3e4, 4e4])
    band = {"magnitude": "phot_g_mean_flux"}
    with pytest.raises(InputError, match=r"flux without a unit.*`unit` beside `magnitude`"):
        read_near(path, fallback=band)
    # 31.4 - 2.5 log10(40000 nJy)
    assert read_near(path, fallback={**band, "unit": "nJy"})["mag"][0] == pytest.approx(
        19.895, 1e-4
    )
    Table({**STARS, "flux": [1.0] * 4}, units={"flux": "electron / s"}).write(tmp_path / "e.ecsv")
    with pytest.raises(InputError, match=r"flux in 'electron / s'"):
        read_near(tmp_path / "e.ecsv", fallback={"magnitude": "flux"})


@pytest.mark.parametrize("sentinel", [-999.0, -99.0, 0.0, 99.0, 999.0, 1e20, np.inf])
def test_sentinels_are_missing_magnitudes_and_not_bright_stars(tmp_path, sentinel):
    magnitude = np.where(np.arange(4) == 1, sentinel, STARS["mag"])
    path = write(tmp_path / "s.csv", **{**STARS, "mag": magnitude})
    assert_same_stars(read_near(path), without=[1])


def test_rows_without_a_position_are_left_out(tmp_path):
    columns = {name: np.append(values, -999.0) for name, values in STARS.items()}
    assert_same_stars(read_near(write(tmp_path / "s.csv", **columns)))


def test_stars_without_a_proper_motion_stay_and_say_so(tmp_path):
    for index, missing in enumerate((np.nan, -9999.0, 1e20)):
        motion = [3600.0, missing, 0.0, 0.0]
        name = f"{index}.fits"
        path = write(tmp_path / name, **STARS, a=motion, d=[0.0, 3600.0, 0.0, 0.0])
        stars = read_near(path, pm_ra="a", pm_dec="d", epoch=2006.0)
        assert stars["ra"][:2].tolist() == pytest.approx([10.01, 10.2], abs=1e-4)
        # neither component is applied without the other
        assert stars["dec"][1] == pytest.approx(-0.5, abs=1e-9)
        assert stars["motion_known"].tolist() == [True, False, True, True]


def test_masked_integers_of_fits_are_missing(tmp_path):
    null = fits.Column("mag", "J", array=[14, -1, 16, 17], null=-1)
    position = [fits.Column(name, "D", array=STARS[name]) for name in ("ra", "dec")]
    fits.BinTableHDU.from_columns([*position, null]).writeto(tmp_path / "s.fits")
    assert_same_stars(read_near(tmp_path / "s.fits"), without=[1])


def test_bulk_files_of_gaia(tmp_path):
    header = (
        "# %ECSV 1.0\n# ---\n# delimiter: ','\n# datatype:\n"
        "# - {name: source_id, datatype: int64, description: 'a, b'}\n"
        + "".join(f"# - {{name: {n}, datatype: float64, unit: deg}}\n" for n in ("ra", "dec"))
        + "# - {name: mag, datatype: float32, unit: mag}\n# meta: !astropy.units.Unit {unit: s}\n"
    )
    rows = [
        f"{i},{ra!r},{dec!r},{'null' if i == 2 else mag}"
        for i, (ra, dec, mag) in enumerate(
            zip(*map(np.ndarray.tolist, STARS.values()), strict=True)
        )
    ]
    text = header + "source_id,ra,dec,mag\n" + "\n".join(rows) + "\n"
    (tmp_path / "GaiaSource_1.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert_same_stars(read_near(tmp_path / "GaiaSource_1.csv.gz"), without=[2])
    assert_same_stars(read_near(tmp_path), without=[2])


def test_tables_of_vizier(tmp_path):
    rows = [
        f"{ra:.6f}\t{dec:.6f}\t{'      ' if mag == 15.0 else f'{mag:6.3f}'}"
        for ra, dec, mag in zip(*STARS.values(), strict=True)
    ]
    lines = ["#RESOURCE=yCat_1355", "#Column\tGmag", "", "RA_ICRS\tDE_ICRS\tGmag"]
    lines += ["deg\tdeg\tmag", "----------\t----------\t------", *rows]
    (tmp_path / "vizier.tsv").write_text("\n".join(lines) + "\n\n")
    names = {"ra": "ra_icrs", "dec": "DE_ICRS", "fallback": {"magnitude": "gmag"}}
    assert_same_stars(read_near(tmp_path / "vizier.tsv", **names), without=[1])
    (tmp_path / "v2.txt").write_text("\n".join(lines).replace("\t", ";"))
    assert_same_stars(read_near(tmp_path / "v2.txt", **names), without=[1])


def test_votable_with_missing_values(tmp_path):
    table = Table(STARS, masked=True)
    table["mag"].mask[1] = True
    for kind in ("tabledata", "binary2"):
        table.write(tmp_path / f"{kind}.vot", format="votable", tabledata_format=kind)
        assert_same_stars(read_near(tmp_path / f"{kind}.vot"), without=[1])
    text = (tmp_path / "tabledata.vot").read_text()
    info = '<INFO name="QUERY_STATUS" value="OVERFLOW"/></RESOURCE>'
    (tmp_path / "cut.vot").write_text(text.replace("</RESOURCE>", info))
    with pytest.raises(InputError, match="row limit"):
        read_near(tmp_path / "cut.vot")


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    table = Table(STARS, units={"ra": "deg", "dec": "deg"})
    table.write(tmp_path / "s.parquet", format="parquet")
    assert_same_stars(read_near(tmp_path / "s.parquet"))


def test_parquet_without_its_package_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "s.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"pip install 'coaddflow\[parquet\]'"):
        read_near(tmp_path / "s.parquet")


def test_format_is_what_the_file_holds_and_not_its_name(tmp_path):
    write(tmp_path / "s.fits", **STARS).rename(tmp_path / "s.csv")
    assert_same_stars(read_near(tmp_path / "s.csv"))


def test_table_that_says_it_is_larger_than_its_file_is_refused_unread(tmp_path):
    content = write(tmp_path / "s.fits", **STARS).read_bytes()
    at = content.index(b"NAXIS2  =")
    card = f"NAXIS2  = {10**12:>20}".encode()
    (tmp_path / "s.fits").write_bytes(content[:at] + card + content[at + len(card) :])
    with pytest.raises(InputError, match="is not a readable fits catalogue"):
        read_near(tmp_path / "s.fits")


def test_stars_in_fields_are_counted(tmp_path):
    motion = {"a": [1.0, np.nan, 1.0, 1.0], "d": [0.0] * 4}
    path = write(tmp_path / "s.csv", **{**STARS, "mag": [14.0, 99.0, 16.0, 17.0]}, **motion)
    settings = RefcatSettings(path=str(path), pm_ra="a", pm_dec="d", epoch=2016.0)
    fields = [(10.3, 0.0, 2.0, "g"), (10.0, -1.0, 0.1, "g"), (100.0, 0.0, 1.0, "r")]
    assert count_stars(settings, fields) == [(4, 3, 1), (1, 1, 0), (0, 0, 0)]


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
