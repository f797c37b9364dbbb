"""World coordinates: what a header says is what the sky gets, and back."""

import warnings

import numpy as np
import pytest
from astropy.coordinates import FK4, FK5, SkyCoord
from astropy.io import fits
from astropy.wcs import WCS, FITSFixedWarning

from coaddflow.astrometry.prediction import predicted_wcs
from coaddflow.errors import InputError
from coaddflow.geometry import sphere
from coaddflow.geometry.wcs import (
    fit_tan_sip,
    inverse_sip,
    make_tan_sip,
    pixel_to_sky,
    sky_to_pixel,
)
from coaddflow.geometry.wcs_header import read_wcs, wcs_to_header
from coaddflow.instrument.camera import load_camera

SHAPE = (400, 300)
SCALE = 0.27 / 3600.0

# chip S9 of a DECam exposure of 2018-12-14, as the observatory's pipeline solved it
DECAM = """
CTYPE1 RA---TPV
CTYPE2 DEC--TPV
CRPIX1 2559.60000000001
CRPIX2 6972.00000000001
CRVAL1 110.8651436106
CRVAL2 23.73809083757
CD1_1 8.921722553653E-09
CD1_2 7.28641970026E-05
CD2_1 -7.288803847284E-05
CD2_2 3.725176199542E-08
PV1_0 0.0009840916570869
PV1_1 1.006347481282
PV1_2 4.352556355714E-05
PV1_4 0.002004767538163
PV1_5 -0.001098979960278
PV1_6 -7.805231275903E-05
PV1_7 -0.002025834713866
PV1_8 -0.001505543980228
PV1_9 -0.003295012610709
PV1_10 -1.209881436812E-05
PV2_0 -0.0006307183596769
PV2_1 1.005029315532
PV2_2 -0.0002792327546111
PV2_4 0.003117465967798
PV2_5 0.0009334607576847
PV2_6 -0.000301077463776
PV2_7 -0.008712940793272
PV2_8 -0.001622944565154
PV2_9 -0.00314445782943
PV2_10 -0.0002801230224966
"""


def header_of(text="", shape=SHAPE, **cards):
    header = fits.Header()
    header["NAXIS"] = 2
    header["NAXIS1"], header["NAXIS2"] = shape[1], shape[0]
    for line in text.strip().splitlines():
        key, value = line.split()
        header[key] = value if key.startswith("CTYPE") else float(value)
    header.update(cards)
    return header


def plain(**cards):
    """Return the header of a tangent projection, with changes; None removes a card."""
    text = "CTYPE1 RA---TAN\nCTYPE2 DEC--TAN\nCRVAL1 150.1\nCRVAL2 2.2\nCRPIX1 150\nCRPIX2 200\n"
    text += f"CD1_1 {-SCALE}\nCD1_2 0\nCD2_1 0\nCD2_2 {SCALE}"
    header = header_of(text)
    for key, value in cards.items():
        if value is None:
            del header[key]
        else:
            header[key] = value
    return header


def astropy_wcs(header):
    """Return what astropy itself makes of a header."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FITSFixedWarning)
        return WCS(header)


def grid(shape=SHAPE, margin=0):
    y, x = np.mgrid[-margin : shape[0] + margin : 9j, -margin : shape[1] + margin : 9j]
    return x.ravel(), y.ravel()


def distance_in_pixels(sky, other, scale=SCALE):
    return sphere.separation(*sky, *other).max() / scale


def sip_wcs(order, ra=351.5, dec=-5.3, shape=(4096, 2048), seed=1):
    """Return a distorted WCS; each order moves the corners by some pixels."""
    rng = np.random.default_rng(seed)
    a, b = np.zeros((2, order + 1, order + 1))
    for n in range(2, order + 1):
        for q in range(n + 1):
            a[n - q, q], b[n - q, q] = rng.normal(0.0, 4.0, 2) / 2300.0**n
    angle = np.radians(30.0 + 100.0 * seed)
    cd = SCALE * np.array([[-np.cos(angle), np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return make_tan_sip((ra, dec), ((shape[1] - 1) / 2, (shape[0] - 1) / 2), cd, a, b, shape)


@pytest.mark.parametrize("order", [2, 3, 4, 5, 7])
def test_tpv_header_is_the_same_mapping_as_sip(order):
    wcs = sip_wcs(order, seed=order)
    header = wcs_to_header(wcs)
    assert header["CTYPE1"] == "RA---TPV"
    # as it stands in a file, read by astropy alone
    read = astropy_wcs(fits.Header.fromstring(header.tostring()))
    pixels = grid(wcs.array_shape, margin=100)
    sky = pixel_to_sky(wcs, *pixels)
    assert distance_in_pixels(sky, read.all_pix2world(*pixels, 0)) < 1e-6
    assert distance_in_pixels(sky, pixel_to_sky(read_wcs(header), *pixels)) < 1e-6


def test_distortion_of_the_test_is_strong():
    wcs = sip_wcs(3)
    x, y = grid(wcs.array_shape)
    shift = np.hypot(*(wcs.sip_pix2foc(x, y, 0) - np.stack([x, y]) + wcs.wcs.crpix[:, None] - 1))
    assert 3.0 < shift.max() < 100.0


def test_header_is_stable_when_written_again():
    header = wcs_to_header(sip_wcs(4))
    again = wcs_to_header(read_wcs(header))
    for key, value in header.items():
        assert again[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-10))


def test_real_decam_header_is_read_as_astropy_reads_it():
    header = header_of(DECAM, shape=(4096, 2048))
    header["DATE-OBS"], header["MJD-OBS"] = "2018-12-14T05:08:44.518297", 58466.2
    wcs = read_wcs(header)
    pixels = grid((4096, 2048))
    truth = astropy_wcs(header).all_pix2world(*pixels, 0)
    assert distance_in_pixels(pixel_to_sky(wcs, *pixels), truth) < 1e-6
    # its distortion is not small: without it the sky is far off
    without = "\n".join(line for line in DECAM.splitlines() if not line.startswith("PV"))
    linear = pixel_to_sky(read_wcs(header_of(without.replace("TPV", "TAN"))), *pixels)
    assert distance_in_pixels(linear, truth) > 10.0


def test_radial_terms_of_tpv_are_fitted():
    header = header_of(DECAM, shape=(4096, 2048), PV1_3=2e-4, PV2_3=-1e-4, PV1_11=1e-4)
    pixels = grid((4096, 2048))
    truth = astropy_wcs(header).all_pix2world(*pixels, 0)
    assert distance_in_pixels(pixel_to_sky(read_wcs(header), *pixels), truth) < 1e-3


def test_scamp_writes_tpv_under_the_name_of_tan():
    header = header_of(DECAM)
    as_scamp = header_of(DECAM.replace("TPV", "TAN"))
    pixels = grid()
    sky, scamp = (pixel_to_sky(read_wcs(h), *pixels) for h in (header, as_scamp))
    assert distance_in_pixels(sky, scamp) == 0.0


def said(header):
    """Return the WCS of a header, and which contradictions were said."""
    sentences = []
    return read_wcs(header, say=sentences.append), sentences


def test_ctype_decides_whether_sip_counts():
    wcs = sip_wcs(3)
    header = wcs.to_header(relax=True)
    header["NAXIS1"], header["NAXIS2"] = 2048, 4096
    pixels = grid((4096, 2048))
    for names in (("-SIP", "-SIP"), ("-SIP", "")):
        header["CTYPE1"], header["CTYPE2"] = f"RA---TAN{names[0]}", f"DEC--TAN{names[1]}"
        found, sentences = said(header)
        assert distance_in_pixels(pixel_to_sky(found, *pixels), pixel_to_sky(wcs, *pixels)) < 1e-4
        assert bool(sentences) == (names[1] == "")
    # what is left over from before the image was resampled
    header["CTYPE1"], header["CTYPE2"] = "RA---TAN", "DEC--TAN"
    found, sentences = said(header)
    header["CTYPE1"] = "RA---TAN-SIP"
    del header["B_ORDER"]
    with pytest.raises(InputError, match="B_ORDER"):
        read_wcs(header)
    for key in [key for key in header if key.startswith(("A_", "B_", "AP_", "BP_"))]:
        del header[key]
    header["CTYPE1"] = "RA---TAN"
    linear = pixel_to_sky(read_wcs(header), *pixels)
    assert distance_in_pixels(pixel_to_sky(found, *pixels), linear) < 1e-9
    assert "SIP cards (A_ORDER, ...) are not used" in sentences[0]


def test_ctype_decides_between_pv_and_sip():
    sip = {"A_ORDER": 2, "B_ORDER": 2, "A_2_0": 3e-5, "B_0_2": 3e-5}
    pv = {"PV1_1": 1.001, "PV1_4": 1e-3, "PV2_1": 1.001, "PV2_4": 1e-3}
    for ctype, counts, other in (("TAN", pv, sip), ("TPV", pv, sip), ("TAN-SIP", sip, pv)):
        names = {"CTYPE1": f"RA---{ctype}", "CTYPE2": f"DEC--{ctype}"}
        right, nothing = said(plain(**names, **counts))
        both, sentences = said(plain(**names, **counts, **other))
        assert not nothing and len(sentences) == 1
        assert distance_in_pixels(pixel_to_sky(right, *grid()), pixel_to_sky(both, *grid())) == 0.0
        # and each of them moves pixels
        linear = pixel_to_sky(read_wcs(plain()), *grid())
        assert distance_in_pixels(pixel_to_sky(right, *grid()), linear) > 0.1


@pytest.mark.parametrize(
    ("projection", "order"), [("TAN", 8), ("TAN", 9), ("ZEA", 2), ("SIN", 3), ("STG", 9)]
)
def test_sip_that_tpv_cannot_say_is_fitted_to_a_thousandth_of_a_pixel(projection, order):
    header = plain(CTYPE1=f"RA---{projection}-SIP", CTYPE2=f"DEC--{projection}-SIP")
    header.update({"A_ORDER": order, "B_ORDER": order, "A_2_0": 1e-4, "B_0_2": -1e-4})
    header[f"A_{order}_0"] = 0.1 / 200.0**order
    pixels = grid()
    truth = astropy_wcs(header).all_pix2world(*pixels, 0)
    wcs = read_wcs(header)
    written = wcs_to_header(wcs)
    for found in (wcs, read_wcs(written)):
        assert distance_in_pixels(pixel_to_sky(found, *pixels), truth) < 1e-3


def test_a_distortion_that_no_fit_follows_is_refused():
    header = plain(CTYPE1="RA---TAN-SIP", CTYPE2="DEC--TAN-SIP", A_ORDER=9, B_ORDER=9)
    header["A_9_0"] = 300.0 / 200.0**9
    with pytest.raises(InputError, match=r"SIP of order 9 cannot be written.*lower order"):
        read_wcs(header)
    del header["NAXIS1"]
    with pytest.raises(InputError, match="NAXIS1"):
        read_wcs(header)


@pytest.mark.parametrize(
    ("cards", "frame"),
    [
        ({"EQUINOX": 1950.0}, FK4(equinox="B1950")),
        ({"EQUINOX": "B1950"}, FK4(equinox="B1950")),
        ({"EPOCH": 1950.0}, FK4(equinox="B1950")),
        ({"RADESYS": "FK4"}, FK4(equinox="B1950")),
        ({"RADECSYS": "FK4", "EQUINOX": 1975.0}, FK4(equinox="B1975")),
        ({"RADESYS": "FK5", "EQUINOX": 1950.0}, FK5(equinox="J1950")),
        ({"EQUINOX": 2017.9}, FK5(equinox="J2017.9")),
        ({"EQUINOX": "J2000"}, None),
        ({"EQUINOX": "2000.0"}, None),
        ({"EPOCH": 2000.0}, None),
        ({"RADECSYS": "FK5/J2000"}, None),
        ({"RADESYS": "FK5", "EQUINOX": 2000}, None),
        ({"RADESYS": "ICRS", "EQUINOX": "NOW"}, None),
        ({"RADESYS": "icrs", "EPOCH": 2017.3}, None),
        ({"EQUINOX": "NaN"}, None),
    ],
)
def test_equinoxes_in_all_dialects(cards, frame):
    x, y = grid()
    axes = pixel_to_sky(read_wcs(plain()), x, y)
    truth = SkyCoord(*axes, unit="deg", frame="icrs" if frame is None else frame).icrs
    wcs, sentences = said(plain(**cards))
    assert distance_in_pixels(pixel_to_sky(wcs, x, y), (truth.ra.deg, truth.dec.deg)) < 1e-3
    assert [frame is not None] == [bool(sentences)]
    assert wcs.wcs.radesys == "ICRS"


def test_cards_that_astropy_cannot_parse():
    text = plain(EQUINOX=2000.0, CROTA2=0.0).tostring()

    def with_nan(key):
        at = text.index(f"{key:<8}=")
        return fits.Header.fromstring(text[:at] + f"{key:<8}=  NaN".ljust(80) + text[at + 80 :])

    truth = pixel_to_sky(read_wcs(plain()), *grid())
    for key in ("EQUINOX", "CROTA2"):
        assert distance_in_pixels(pixel_to_sky(read_wcs(with_nan(key)), *grid()), truth) == 0.0
    with pytest.raises(InputError, match="CRVAL1 is 'NaN'"):
        read_wcs(with_nan("CRVAL1"))


def test_units_of_the_axes():
    truth = pixel_to_sky(read_wcs(plain()), *grid())
    for unit, size in (("rad", np.radians(1.0)), ("arcsec", 3600.0), ("Degrees", 1.0)):
        names = ("CRVAL1", "CRVAL2", "CD1_1", "CD2_2")
        cards = {key: plain()[key] * size for key in names} | {"CUNIT1": unit, "CUNIT2": unit}
        assert distance_in_pixels(pixel_to_sky(read_wcs(plain(**cards)), *grid()), truth) < 1e-6


def test_numbers_in_quotes_and_old_names_of_the_matrix():
    truth = pixel_to_sky(read_wcs(plain()), *grid())
    quoted = plain(CRVAL1="150.1", CRVAL2="2.2 deg", CRPIX1="1.50D+02", CD1_1=str(-SCALE))
    assert distance_in_pixels(pixel_to_sky(read_wcs(quoted), *grid()), truth) < 1e-7
    none = {"CD1_1": None, "CD1_2": None, "CD2_1": None, "CD2_2": None}
    old = plain(**none, CDELT1=-SCALE, CDELT2=SCALE, PC001001=1.0, PC001002=0.0, PC002001=0.0)
    assert distance_in_pixels(pixel_to_sky(read_wcs(old), *grid()), truth) < 1e-7


def test_ways_to_write_the_matrix_that_contradict_each_other():
    truth = pixel_to_sky(read_wcs(plain()), *grid())
    for cards, sentence in (
        ({"CDELT1": -2 * SCALE, "CDELT2": 2 * SCALE}, "different pixel scales: CD counts"),
        ({"PC1_1": 0.5, "PC2_2": 1.0}, "CD and PC cards: CD counts"),
        ({"CDELT1": -SCALE, "CDELT2": SCALE}, ""),
        ({"CDELT1": 1.0, "CDELT2": 1.0}, ""),
    ):
        wcs, sentences = said(plain(**cards))
        assert distance_in_pixels(pixel_to_sky(wcs, *grid()), truth) < 1e-9
        assert (sentence in sentences[0]) if sentence else not sentences


@pytest.mark.parametrize("projection", ["SIN", "TAN", "ARC", "STG", "ZEA"])
def test_other_projections_survive(projection):
    header = plain(
        CTYPE1=f"RA---{projection}", CTYPE2=f"DEC--{projection}", CD1_1=-0.01, CD2_2=0.01
    )
    wcs = read_wcs(header)
    pixels = grid()
    truth = astropy_wcs(header).all_pix2world(*pixels, 0)
    assert distance_in_pixels(pixel_to_sky(wcs, *pixels), truth, 0.01) < 1e-9
    written = wcs_to_header(wcs)
    assert written["CTYPE1"] == f"RA---{projection}"
    assert distance_in_pixels(astropy_wcs(written).all_pix2world(*pixels, 0), truth, 0.01) < 1e-9
    # two degrees from the centre the projections differ by much more than that
    if projection != "TAN":
        tan = read_wcs(plain(CD1_1=-0.01, CD2_2=0.01))
        assert distance_in_pixels(pixel_to_sky(tan, *pixels), truth, 0.01) > 0.01


def test_slanted_sin_keeps_its_parameters():
    header = plain(CTYPE1="RA---SIN", CTYPE2="DEC--SIN", PV2_1=0.02, PV2_2=-0.03)
    pixels = grid()
    truth = astropy_wcs(header).all_pix2world(*pixels, 0)
    for wcs in (read_wcs(header), read_wcs(wcs_to_header(read_wcs(header)))):
        assert distance_in_pixels(pixel_to_sky(wcs, *pixels), truth) < 1e-7


def test_all_ways_to_write_the_pixel_matrix():
    pixels = grid()
    cd = {"CD1_1": None, "CD1_2": None, "CD2_1": None, "CD2_2": None}
    sin, cos = np.sin(np.radians(30.0)), np.cos(np.radians(30.0))
    steps = {"CDELT1": -SCALE, "CDELT2": 2 * SCALE}
    matrix = {"PC1_1": cos, "PC1_2": -sin, "PC2_1": sin, "PC2_2": cos}
    for cards in (steps, {**steps, "CROTA2": 30.0}, {**steps, **matrix}):
        header = plain(**cd, **cards)
        truth = astropy_wcs(header).all_pix2world(*pixels, 0)
        assert distance_in_pixels(pixel_to_sky(read_wcs(header), *pixels), truth) < 1e-7


def test_declination_may_come_first():
    header = plain(CTYPE1="DEC--TAN", CTYPE2="RA---TAN", CRVAL1=2.2, CRVAL2=150.1)
    dec, ra = astropy_wcs(header).all_pix2world(*grid(), 0)
    assert distance_in_pixels(pixel_to_sky(read_wcs(header), *grid()), (ra, dec)) < 1e-7


@pytest.mark.parametrize(
    ("cards", "named"),
    [
        ({"CTYPE1": None}, "CTYPE1"),
        ({"CTYPE1": "GLON-TAN", "CTYPE2": "GLAT-TAN"}, "GLON-TAN"),
        ({"CTYPE1": "RA---TNX", "CTYPE2": "DEC--TNX"}, "TNX"),
        ({"CRVAL1": None}, "CRVAL1"),
        ({"CRVAL1": "07:23:28"}, "CRVAL1"),
        ({"CRVAL2": 97.0}, "declination"),
        ({"CRPIX2": None}, "CRPIX2"),
        ({"CD1_1": 0.0}, "singular"),
        ({"CRVAL1": None, "CRPIX2": None}, "CRVAL1, CRPIX2 are missing"),
        ({"CD1_1": None, "CD1_2": None, "CD2_1": None, "CD2_2": None}, "CDELT1 and CDELT2"),
        ({"CRVAL1": 1e300}, "right ascension is 1e+300"),
        ({"CRPIX1": 1e20}, "CRPIX"),
        ({"CD1_1": 1e20, "CD2_2": 1e20}, "CD, CDELT"),
        ({"CD1_1": True}, "CD1_1"),
        ({"CUNIT1": "rad"}, "CUNIT1"),
        ({"CUNIT2": "furlong"}, "CUNIT2"),
        ({"CTYPE2": "DEC--SIN"}, "TAN for one axis and SIN for the other"),
        ({"RADESYS": "GAPPT"}, "GAPPT"),
        ({"EQUINOX": "NOW"}, "RADESYS = 'ICRS'"),
        ({"EQUINOX": 1e20}, "EQUINOX"),
        ({"EPOCH": 2017.3}, "time of the exposure"),
        ({"CPDIS1": "LOOKUP"}, "look-up table"),
    ],
)
def test_unusable_headers_name_the_card_and_the_file(cards, named):
    with pytest.raises(InputError) as error:
        read_wcs(plain(**cards), "night/a.fits")
    assert named in str(error.value)
    assert "night/a.fits" in str(error.value)


def test_fk5_of_2000_is_taken_as_icrs():
    wcs = read_wcs(plain(RADESYS="FK5", EQUINOX=2000.0))
    assert pixel_to_sky(wcs, 149.0, 199.0) == (pytest.approx(150.1), pytest.approx(2.2))
    assert wcs.wcs.radesys == "ICRS"


def test_distortion_that_astropy_does_not_give_away_is_not_lost_in_silence():
    with pytest.raises(ValueError, match="does not survive"):
        wcs_to_header(astropy_wcs(header_of(DECAM)))


@pytest.mark.parametrize(("ra", "dec"), [(10.0, 0.0), (0.0, 40.0), (77.0, 89.99), (3.0, -90.0)])
def test_sky_to_pixel_inverts_everywhere(ra, dec):
    wcs = sip_wcs(5, ra, dec)
    x, y = grid(wcs.array_shape, margin=1000)
    found_x, found_y = sky_to_pixel(wcs, *pixel_to_sky(wcs, x, y))
    assert np.abs(found_x - x).max() < 1e-6
    assert np.abs(found_y - y).max() < 1e-6
    header = wcs_to_header(wcs)
    header["NAXIS1"], header["NAXIS2"] = 2048, 4096
    again = sky_to_pixel(read_wcs(header), *pixel_to_sky(wcs, x, y))
    assert np.abs(again - np.stack([x, y])).max() < 1e-5


def test_sky_to_pixel_is_nan_where_the_image_is_not():
    wcs = sip_wcs(5, 0.1, 30.0)
    rng = np.random.default_rng(3)
    ra, dec = sphere.from_vector(rng.normal(size=(2000, 3)))
    dec[:2] = np.nan, -30.0
    ra[1] = 180.1
    far = ~(sphere.separation(ra, dec, 0.1, 30.0) < 1.0)
    x, y = sky_to_pixel(wcs, ra, dec)
    assert far.sum() > 1990
    assert np.isnan(x[far]).all()
    assert np.isnan(y[far]).all()


def test_margin_limits_what_is_near():
    wcs = read_wcs(plain())
    ra, dec = pixel_to_sky(wcs, [-0.4, -1.0, -39.0, -41.0], [5.0, 5.0, 5.0, 5.0])
    assert np.isfinite(sky_to_pixel(wcs, ra, dec, margin=0.0)[0]).tolist() == [1, 0, 0, 0]
    assert np.isfinite(sky_to_pixel(wcs, ra, dec, margin=0.1)[0]).tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("dec", [90.0, -90.0, 12.0])
def test_plane_of_the_wcs_is_that_of_the_sphere(dec):
    # LONPOLE has another default at the pole, which would turn the image around
    none = np.zeros((2, 2))
    wcs = make_tan_sip((40.0, dec), (150.0, 200.0), SCALE * np.diag([-1.0, 1.0]), none, none, SHAPE)
    x, y = grid()
    truth = sphere.tan_deproject(-(x - 150.0) * SCALE, (y - 200.0) * SCALE, 40.0, dec)
    assert distance_in_pixels(pixel_to_sky(wcs, x, y), truth) < 1e-6
    header = wcs_to_header(wcs)
    assert distance_in_pixels(astropy_wcs(header).all_pix2world(x, y, 0), truth) < 1e-6
    assert distance_in_pixels(pixel_to_sky(read_wcs(header), x, y), truth) < 1e-6


def test_folded_distortion_gives_no_second_place():
    a, b = np.zeros((2, 4, 4))
    size = SHAPE[0]
    a[3, 0] = -1.0 / (1.21 * size) ** 2
    centre = (SHAPE[1] - 1) / 2.0, (SHAPE[0] - 1) / 2.0
    cd = SCALE * np.diag([-1.0, 1.0])
    wcs = make_tan_sip((40.0, 10.0), centre, cd, a, b, SHAPE)
    # u - u^3 / R^2 has its maximum 0.466 at u = 0.7: what lies beyond is seen by no pixel near
    # the image, but the polynomial comes up to it once more at u < -1.4
    for places, seen in ((np.linspace(0.0, 0.45, 50), True), (np.linspace(0.5, 1.5, 50), False)):
        sky = sphere.tan_deproject(-places * size * SCALE, 0.0 * places, 40.0, 10.0)
        assert (np.isfinite(sky_to_pixel(wcs, *sky, margin=3.0)[0]) == seen).all()


def test_inverse_sip_is_good_over_the_ccd():
    wcs = sip_wcs(4)
    x, y = grid(wcs.array_shape)
    ap, bp = inverse_sip(wcs.sip.a, wcs.sip.b, wcs.wcs.crpix - 1, wcs.array_shape)
    assert np.array_equal(wcs.sip.ap, ap)
    assert np.array_equal(wcs.sip.bp, bp)
    back = wcs.sip_foc2pix(wcs.sip_pix2foc(np.stack([x, y], axis=1), 0), 0)
    assert np.abs(back - np.stack([x, y], axis=1)).max() < 1e-3


def test_fit_tan_sip_takes_the_order_that_is_needed():
    truth = sip_wcs(3, 359.99, 60.0)
    fitted = fit_tan_sip(lambda x, y: pixel_to_sky(truth, x, y), truth.array_shape)
    pixels = grid(truth.array_shape)
    sky = (pixel_to_sky(wcs, *pixels) for wcs in (truth, fitted))
    assert distance_in_pixels(*sky) < 1e-6
    assert fitted.sip.a_order == 3
    plain_truth = read_wcs(plain())
    assert fit_tan_sip(lambda x, y: pixel_to_sky(plain_truth, x, y), SHAPE).sip is None


@pytest.mark.parametrize("name", ["demo", "hsc", "decam"])
def test_camera_is_predicted_to_a_thousandth_of_a_pixel(name):
    camera = load_camera(name)
    pointing = (0.2, 60.0, 33.0)
    # the last detector of a camera stands far from the axis, where the distortion is strong
    for detector in (camera.detectors[0], camera.detectors[-1]):
        wcs = predicted_wcs(camera, detector, *pointing)
        x, y = grid(detector.shape)
        truth = camera.pixel_to_sky(detector, x, y, *pointing)
        scale = camera.pixel_scale / 3600.0
        assert distance_in_pixels(pixel_to_sky(wcs, x, y), truth, scale) < 1e-3
        assert wcs.array_shape == detector.shape
