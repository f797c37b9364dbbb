"""Raw files give exactly the pixels that were written, or one clear reason why not."""

import bz2
import contextlib
import gzip
import re
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from coaddflow.errors import CcdFailure
from coaddflow.instrument.camera import Camera
from coaddflow.instrument.raw import read_raw_ccd

NX, NY, N_CCDS = 60, 50, 5


def make_camera(files="exposure", per_amplifier=False, **amplifier_keys):
    amplifier = {
        "name": "A",
        "data": [4, 0, 44, 40],
        "overscan": [44, 0, 56, 40],
        "target": [0, 0, 40, 40],
        "gain": 2.0,
        "read_noise": 5.0,
        "saturation": 60000.0,
        **amplifier_keys,
    }
    second = {**amplifier, "name": "B", "target": [40, 0, 80, 40]}
    key = {"keyword": "X"}
    return Camera.model_validate(
        {
            "name": "test",
            "description": "for tests",
            "pixel_scale": 1.0,
            "pixel_size": 0.015,
            "layout": {"files": files, "ccd_pattern": r"_(?P<ccd>\w+)\."},
            "header": dict.fromkeys(
                ["exposure", "kind", "band", "ra", "dec", "rotation", "mjd", "exposure_time"], key
            ),
            "detectors": [
                {
                    "id": i,
                    "name": f"S{i}",
                    "extension": f"CCD{i}",
                    "center": [0.0, 0.0],
                    "size": [80, 40],
                    "amplifiers": [
                        {**amplifier, "extension": f"CCD{i}A"},
                        {**second, "extension": f"CCD{i}B"},
                    ]
                    if per_amplifier
                    else [amplifier],
                }
                for i in range(N_CCDS)
            ],
        }
    )


@pytest.fixture
def pixels():
    rng = np.random.default_rng(1)
    return rng.integers(30000, 40000, (N_CCDS, NY, NX), dtype=np.uint16)


def write_mef(path, pixels, compressed=False, checksum=False, names="CCD{}", header=()):
    kind = fits.CompImageHDU if compressed else fits.ImageHDU
    primary = fits.PrimaryHDU()
    primary.header["EXPID"] = "e1"
    hdus = [kind(p, name=names.format(i)) for i, p in enumerate(pixels)]
    for hdu in hdus:
        hdu.header.update(header)
    fits.HDUList([primary, *hdus]).writeto(path, checksum=checksum)
    return path


def reason(path, camera, ccd=3, **keys):
    with pytest.raises(CcdFailure) as failure:
        read_raw_ccd(path, camera, camera.detector(ccd), **keys)
    assert str(path).split("{")[0] in failure.value.message
    return failure.value.reason


@pytest.mark.parametrize("suffix", [".fits", ".fits.gz", ".fits.bz2", ".fits.fz"])
def test_pixels_of_one_ccd_come_back_as_unsigned_integers(tmp_path, pixels, suffix):
    path = write_mef(tmp_path / f"a{suffix}", pixels, compressed=suffix.endswith("fz"))
    camera = make_camera()
    raw = read_raw_ccd(path, camera, camera.detector(3))
    assert raw.arrays[0].dtype == np.uint16
    np.testing.assert_array_equal(raw.arrays[0], pixels[3])
    assert raw.header["EXTNAME"] == "CCD3"
    assert raw.exposure_header["EXPID"] == "e1"


def test_what_follows_the_ccd_is_never_looked_at(tmp_path, pixels):
    path = write_mef(tmp_path / "a.fits", pixels)
    content = bytearray(path.read_bytes())
    behind = 4 * 4 * 2880  # four HDUs of a block of header and three of data
    content[-behind:] = b"\xff" * behind
    path.write_bytes(content)
    camera = make_camera()
    raw = read_raw_ccd(path, camera, camera.detector(0))
    np.testing.assert_array_equal(raw.arrays[0], pixels[0])
    assert reason(path, camera, ccd=1) == "missing_extension"
    content[-behind:] = bytes(behind)
    path.write_bytes(content)
    assert reason(path, camera, ccd=1) == "truncated_file"


def test_one_file_for_each_ccd(tmp_path, pixels):
    camera = make_camera(files="ccd")
    for i, p in enumerate(pixels):
        fits.PrimaryHDU(p).writeto(tmp_path / f"exp_CCD{i}.fits")
    raw = read_raw_ccd(tmp_path / "exp_{ccd}.fits", camera, camera.detector(2))
    np.testing.assert_array_equal(raw.arrays[0], pixels[2])
    assert raw.path == tmp_path / "exp_CCD2.fits"


def test_an_image_that_fpack_moved_out_of_the_primary_hdu(tmp_path, pixels):
    camera = make_camera(files="ccd")
    hdus = fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(pixels[0])])
    hdus.writeto(tmp_path / "exp_CCD0.fits.fz")
    raw = read_raw_ccd(tmp_path / "exp_{ccd}.fits.fz", camera, camera.detector(0))
    np.testing.assert_array_equal(raw.arrays[0], pixels[0])
    primary = make_camera(extension=0)
    raw = read_raw_ccd(tmp_path / "exp_CCD0.fits.fz", primary, primary.detector(0))
    np.testing.assert_array_equal(raw.arrays[0], pixels[0])


def test_each_amplifier_in_its_own_hdu(tmp_path, pixels):
    camera = make_camera(per_amplifier=True)
    primary = fits.PrimaryHDU()
    hdus = [fits.ImageHDU(pixels[1], name="CCD1A"), fits.ImageHDU(pixels[2], name="CCD1B")]
    fits.HDUList([primary, *hdus]).writeto(tmp_path / "a.fits")
    raw = read_raw_ccd(tmp_path / "a.fits", camera, camera.detector(1))
    np.testing.assert_array_equal(raw.arrays[0], pixels[1])
    np.testing.assert_array_equal(raw.arrays[1], pixels[2])


def test_header_values_replace_those_of_the_camera_file(tmp_path, pixels):
    path = write_mef(tmp_path / "a.fits", pixels, header={"GAINA": 3.5, "SATA": 50000})
    camera = make_camera(gain_keyword="GAINA", saturation_keyword="SATA")
    amplifier = read_raw_ccd(path, camera, camera.detector(1)).detector.amplifiers[0]
    assert (amplifier.gain, amplifier.read_noise, amplifier.saturation) == (3.5, 5.0, 50000)
    assert reason(path, make_camera(gain_keyword="NOGAIN")) == "missing_keyword"


@pytest.mark.parametrize("value", ["abc", 0.0, -1.0])
def test_a_gain_that_is_no_gain_is_refused(tmp_path, pixels, value):
    path = write_mef(tmp_path / "a.fits", pixels, header={"GAINA": value})
    assert reason(path, make_camera(gain_keyword="GAINA")) == "missing_keyword"


def test_missing_foreign_and_empty_files(tmp_path, pixels):
    camera = make_camera()
    assert reason(tmp_path / "no.fits", camera) == "missing_file"
    (tmp_path / "text.fits").write_text("SIMPLY not FITS " * 500)
    assert reason(tmp_path / "text.fits", camera) == "not_fits"
    with gzip.open(tmp_path / "text.fits.gz", "wt") as stream:
        stream.write("a letter " * 500)
    assert reason(tmp_path / "text.fits.gz", camera) == "not_fits"
    (tmp_path / "empty.fits").touch()
    assert reason(tmp_path / "empty.fits", camera) == "truncated_file"
    write_mef(tmp_path / "few.fits", pixels[:2])
    assert reason(tmp_path / "few.fits", camera) == "missing_extension"


@pytest.mark.parametrize("suffix", [".fits", ".fits.gz", ".fits.bz2", ".fits.fz"])
@pytest.mark.parametrize("part", [0.05, 0.3, 0.5, 0.72])
def test_a_file_that_ends_before_the_ccd_is_truncated(tmp_path, pixels, suffix, part):
    path = write_mef(tmp_path / f"a{suffix}", pixels, compressed=suffix.endswith("fz"))
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    assert reason(path, make_camera()) == "truncated_file"


@pytest.mark.parametrize("suffix", [".fits", ".fits.gz", ".fits.fz"])
def test_the_last_bytes_of_the_pixels_are_missed(tmp_path, pixels, suffix):
    path = write_mef(tmp_path / f"a{suffix}", pixels[:1], compressed=suffix.endswith("fz"))
    content = path.read_bytes()
    path.write_bytes(content[:-2881] if suffix != ".fits.gz" else content[:-1])
    assert reason(path, make_camera(), ccd=0) == "truncated_file"


def test_a_ccd_before_the_break_is_still_read(tmp_path, pixels):
    path = write_mef(tmp_path / "a.fits", pixels)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    camera = make_camera()
    np.testing.assert_array_equal(
        read_raw_ccd(path, camera, camera.detector(0)).arrays[0], pixels[0]
    )


def test_flipped_bits_are_found_by_gzip_and_by_datasum(tmp_path, pixels):
    path = write_mef(tmp_path / "a.fits.gz", pixels[:1])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert reason(path, make_camera(), ccd=0) == "damaged_file"
    path = write_mef(tmp_path / "b.fits", pixels[:1], checksum=True)
    content = bytearray(path.read_bytes())
    content[-5000] ^= 0xFF
    path.write_bytes(content)
    camera = make_camera()
    assert reason(path, camera, ccd=0) == "damaged_file"
    read_raw_ccd(path, camera, camera.detector(0), check=False)


def test_a_copy_that_ends_in_zero_bytes_is_truncated(tmp_path, pixels):
    path = write_mef(tmp_path / "a.fits", pixels[:1])
    content = bytearray(path.read_bytes())
    content[-4000:] = bytes(4000)
    path.write_bytes(content)
    camera = make_camera()
    assert reason(path, camera, ccd=0) == "truncated_file"
    read_raw_ccd(path, camera, camera.detector(0), check=False)


def test_images_without_content(tmp_path):
    camera = make_camera()
    write_mef(tmp_path / "nan.fits", np.full((1, NY, NX), np.nan, np.float32))
    assert reason(tmp_path / "nan.fits", camera, ccd=0) == "all_nan"
    write_mef(tmp_path / "zero.fits", np.zeros((1, NY, NX), np.int16))
    assert reason(tmp_path / "zero.fits", camera, ccd=0) == "all_zero"
    write_mef(tmp_path / "one.fits", np.ones((1, NY, NX), np.int16))
    assert reason(tmp_path / "one.fits", camera, ccd=0) == "constant_image"


def test_a_cube_of_one_plane_is_an_image(tmp_path, pixels):
    camera = make_camera()
    for number, axes in enumerate((1, 2)):
        planes = pixels.reshape(N_CCDS, *[1] * axes, NY, NX)
        for compressed in (False, True):
            path = tmp_path / f"{number}{compressed}.fits"
            write_mef(path, planes, compressed=compressed, checksum=True)
            raw = read_raw_ccd(path, camera, camera.detector(3))
            np.testing.assert_array_equal(raw.arrays[0], pixels[3])


@contextlib.contextmanager
def less_than(n_bytes):
    """Hold that the process takes no more memory beyond what it has."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is measured on Linux only")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here on

    def kilobytes(name):
        text = Path("/proc/self/status").read_text()
        return int(re.search(rf"{name}:\s*(\d+)", text)[1])

    before = kilobytes("VmRSS")
    yield
    assert 1024 * (kilobytes("VmHWM") - before) < n_bytes


def hostile(path, pixels, **changes):
    """Write a file whose second CCD has other values in its structural cards."""
    write_mef(path, pixels)
    content = path.read_bytes()
    at = content.index(b"XTENSION", content.index(b"XTENSION") + 80)
    for key, value in changes.items():
        place = content.index(key.encode().ljust(8), at)
        card = f"{key:<8}= {value:>20}".encode().ljust(80)
        content = content[:place] + card + content[place + 80 :]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"NAXIS1": -60}, "not_fits"),
        ({"NAXIS2": -1, "NAXIS1": -3000}, "not_fits"),
        ({"PCOUNT": -2881}, "not_fits"),
        ({"GCOUNT": "'x'"}, "not_fits"),
        ({"BITPIX": 1.5}, "not_fits"),
        ({"NAXIS": 999999999}, "not_fits"),
        ({"NAXIS1": 1e300}, "not_fits"),
        ({"NAXIS1": 10**18}, "not_fits"),
        ({"NAXIS1": 100000, "NAXIS2": 100000}, "wrong_shape"),
        ({"NAXIS1": "60.0"}, "not_fits"),
    ],
)
def test_sizes_are_compared_with_file_and_camera_before_pixels_are_read(
    tmp_path, pixels, changes, expected
):
    path = hostile(tmp_path / "a.fits", pixels, **changes)
    camera = make_camera()
    with less_than(20e6):
        # the CCD before the damaged one is whole
        raw = read_raw_ccd(path, camera, camera.detector(0))
        np.testing.assert_array_equal(raw.arrays[0], pixels[0])
        assert reason(path, camera, ccd=1) == expected
        assert reason(path, camera, ccd=2) in ("not_fits", "truncated_file")


def test_frames_of_another_binning_or_camera_are_named(tmp_path, pixels):
    path = write_mef(tmp_path / "a.fits", pixels[:, :25, :30], header={"CCDSUM": "2 2"})
    camera = make_camera()
    with pytest.raises(CcdFailure, match="CCDSUM says '2 2': it is binned") as failure:
        read_raw_ccd(path, camera, camera.detector(1))
    assert failure.value.reason == "wrong_shape"
    large = np.tile(pixels, (1, 2, 2))
    assert reason(write_mef(tmp_path / "b.fits", large), camera) == "wrong_shape"
    sized = make_camera()
    detectors = tuple(one.model_copy(update={"raw_size": (NX + 1, NY)}) for one in sized.detectors)
    sized = sized.model_copy(update={"detectors": detectors})
    assert reason(write_mef(tmp_path / "c.fits", pixels), sized) == "wrong_shape"


@pytest.mark.parametrize("bomb", ["gzip", "bzip2", "fpack"])
def test_bombs_take_no_memory(tmp_path, pixels, bomb):
    path = tmp_path / "a.fits"
    if bomb == "fpack":
        write_mef(path, pixels, compressed=True)
        content = path.read_bytes()
        for key in ("ZNAXIS1", "ZNAXIS2"):
            at = content.index(key.encode())
            content = (
                content[:at]
                + f"{key} =               100000".encode().ljust(80)
                + content[at + 80 :]
            )
        path.write_bytes(content)
    else:
        hostile(path, pixels[:2], NAXIS1=40000, NAXIS2=40000)
        compress = {"gzip": gzip.compress, "bzip2": bz2.compress}[bomb]
        zeros = compress(bytes(1 << 20))
        path.write_bytes(compress(path.read_bytes()) + zeros * 3000)
    camera = make_camera()
    start = time.process_time()
    with less_than(100e6):
        assert reason(path, camera, ccd=1 if bomb != "fpack" else 0) in ("not_fits", "wrong_shape")
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("keyword", ["HISTORY", "AB{}"])
def test_a_header_of_40_megabytes_takes_less_than_100(tmp_path, pixels, keyword):
    path = write_mef(tmp_path / "a.fits", pixels)
    content = path.read_bytes()
    cards = b"".join(
        (keyword.format(n).ljust(8) + "= 'some text of a card'").encode().ljust(80)
        for n in range(36 * 14000)
    )
    end = content.index(b"END".ljust(80))
    path.write_bytes(content[:end] + cards + content[end:])
    del content, cards
    camera = make_camera()
    with less_than(100e6):
        if keyword == "HISTORY":
            raw = read_raw_ccd(path, camera, camera.detector(1))
            np.testing.assert_array_equal(raw.arrays[0], pixels[1])
        else:
            assert reason(path, camera) == "not_fits"


def test_checksums_cover_header_cards_such_as_bzero(tmp_path, pixels):
    path = write_mef(tmp_path / "a.fits", pixels[:1], checksum=True)
    content = path.read_bytes()
    at = content.index(b"BZERO   =")
    path.write_bytes(
        content[:at] + b"BZERO   =                32769".ljust(80) + content[at + 80 :]
    )
    camera = make_camera()
    assert reason(path, camera, ccd=0) == "damaged_file"
    read_raw_ccd(path, camera, camera.detector(0), check=False)


@pytest.mark.parametrize("card", ["CCDSUM  = 1 1 / binning", "XBINNING= 1x1", "XBINNING= NaN"])
def test_a_badly_written_card_of_binning_that_nobody_needs_is_no_fault(tmp_path, pixels, card):
    path = write_mef(tmp_path / "a.fits", pixels, header={"DEGREE": "xxxx"})
    content = path.read_bytes().replace(b"DEGREE  = 'xxxx    '".ljust(80), card.encode().ljust(80))
    path.write_bytes(content)
    camera = make_camera()
    np.testing.assert_array_equal(
        read_raw_ccd(path, camera, camera.detector(2)).arrays[0], pixels[2]
    )


def test_zeros_at_the_end_of_data_with_a_right_checksum_were_read(tmp_path, pixels):
    """A dead amplifier at the end of an array is not a broken copy."""
    lower = pixels.astype(np.int32)
    lower[:, -3:] = 0
    whole = write_mef(tmp_path / "whole.fits", lower, checksum=True)
    camera = make_camera()
    raw = read_raw_ccd(whole, camera, camera.detector(0))
    assert np.count_nonzero(np.nan_to_num(raw.arrays[0])) > 0
    write_mef(tmp_path / "unknown.fits", lower)
    assert reason(tmp_path / "unknown.fits", camera, ccd=0) == "truncated_file"


def test_sections_must_lie_within_the_array(tmp_path, pixels):
    write_mef(tmp_path / "a.fits", pixels[:, :30])
    assert reason(tmp_path / "a.fits", make_camera()) == "wrong_shape"
    write_mef(tmp_path / "cube.fits", np.stack([pixels, pixels], axis=1))
    assert reason(tmp_path / "cube.fits", make_camera()) == "wrong_shape"


def test_headers_of_bad_style_are_read_without_a_warning(tmp_path, pixels):
    path = write_mef(tmp_path / "a.fits", pixels.astype(np.float32), header={"DEGREE": "xxxx"})
    content = path.read_bytes()
    content = content.replace(b"DEGREE  = 'xxxx    '", b"DEGREE  =23 \xb0C text ")
    content = content.replace(b"PCOUNT  =                    0", b"BLANK   =               -32768")
    path.write_bytes(content)
    camera = make_camera()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        raw = read_raw_ccd(path, camera, camera.detector(2))
    np.testing.assert_array_equal(raw.arrays[0], pixels[2].astype(np.float32))
