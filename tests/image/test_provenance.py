"""Products say what they were made from, and say the same when made again."""

from astropy.io import fits

from coaddflow.image.provenance import provenance_header, settings_hash


def test_hash_depends_on_values_and_not_on_their_order():
    one = settings_hash({"warp": {"kernel": "lanczos3", "grid_step": 32}})
    assert one == settings_hash({"warp": {"grid_step": 32, "kernel": "lanczos3"}})
    assert one != settings_hash({"warp": {"kernel": "lanczos5", "grid_step": 32}})


def test_names_survive_a_file_whatever_they_are(tmp_path):
    names = ["raw/a.fits", "raw/" + "x" * 200 + ".fits", "raw/ü 'quoted'\n.fits"]
    header = provenance_header({}, names)
    fits.PrimaryHDU(header=header).writeto(tmp_path / "a.fits")
    back = fits.getheader(tmp_path / "a.fits")
    assert back["NINPUT"] == 3
    assert [back[f"INP{i:05d}"] for i in (1, 2)] == names[:2]
    assert back["INP00003"] == "raw/? 'quoted'?.fits"
