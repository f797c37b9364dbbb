"""Cameras: where their pixels look, and what becomes of camera files that are wrong."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.optimize import least_squares

from coaddflow.errors import InputError
from coaddflow.files import check_id
from coaddflow.geometry import sphere
from coaddflow.instrument.camera import Camera, load_camera, outline, shipped_cameras
from coaddflow.instrument.file_layout import FileLayout, file_template
from coaddflow.settings.document import model_tables
from coaddflow.tables.exposures import ccd_file

CAMERAS = ["decam", "demo", "hsc", "microobservatory", "mini"]
DECAM_TABLE = Path(__file__).parents[3] / "shared/data/geometry/decam_visit1031745_corners.csv"

# DECam exposure 1031745: CCD, centre of its first pixel, centre of its last pixel (ra, dec),
# from the astrometric solution of another pipeline
DECAM_CORNERS = [
    (1, 351.2580288, -4.1271784, 351.5574292, -4.2768589),
    (4, 351.1018007, -4.2909855, 351.4010188, -4.4407227),
    (18, 352.3474186, -4.6219612, 352.6470035, -4.7720668),
    (28, 351.5668451, -4.9491219, 351.8677667, -5.0996510),
    (35, 351.5661349, -5.1139938, 351.8670569, -5.2645844),
    (38, 352.5026064, -5.1155122, 352.8019822, -5.2652331),
    (50, 352.3462628, -5.4443199, 352.6458476, -5.5936870),
    (62, 351.8767648, -5.9367960, 352.1770801, -6.0862762),
]

# HSC: CCD, pixel (x, y) and field angles (degrees) from the polynomial of the HSC pipeline
HSC_FIELD_ANGLES = [
    (0, 0, 0, 0.718092, -0.205373),
    (0, 2047, 4175, 0.626020, -0.394406),
    (49, 0, 0, -0.047637, -0.186915),
    (49, 2047, 4175, 0.047748, 0.007551),
    (99, 0, 0, -0.717985, 0.223358),
    (99, 2047, 4175, -0.625526, 0.412076),
    (101, 0, 0, 0.337870, 0.707508),
    (37, 0, 0, 0.235871, 0.798654),
]

# Stars of the Tycho catalogue and where they stand on the frame HATP-32171220013343
MICRO_STARS = [
    (31.5686, 46.9574, 172.0, 99.4),
    (31.2502, 46.5750, 324.6, 365.5),
    (31.5909, 47.0506, 161.6, 33.8),
    (31.8962, 46.6872, 15.1, 287.0),
    (31.6715, 46.9754, 123.1, 86.4),
    (30.5840, 46.3893, 644.9, 492.2),
    (30.6628, 46.9621, 603.0, 93.2),
    (30.5841, 46.9190, 640.9, 122.8),
    (31.5287, 46.8253, 190.9, 190.8),
]


def solve_pointing(camera, ccd, x, y, ra, dec, start):
    """Return the residuals (arcsec) that the best pointing and rotation leave."""

    def residuals(pointing):
        deviations = []
        for one in np.unique(ccd):
            use = ccd == one
            found = camera.pixel_to_sky(camera.detector(one), x[use], y[use], *pointing)
            deviations.extend(sphere.tan_project(*found, ra0=start[0], dec0=start[1]))
            deviations[-2:] -= np.array(sphere.tan_project(ra[use], dec[use], *start[:2]))
        return 3600.0 * np.concatenate(deviations)

    return least_squares(residuals, start, x_scale=0.01).fun


def test_shipped_cameras_are_there():
    assert shipped_cameras() == CAMERAS
    assert {name: len(load_camera(name).detectors) for name in CAMERAS} == {
        "decam": 62,
        "demo": 6,
        "hsc": 104,
        "microobservatory": 1,
        "mini": 4,
    }


@pytest.mark.parametrize("name", CAMERAS)
@pytest.mark.parametrize("pointing", [(150.1, 2.2, 0.0), (0.01, -0.02, 123.0), (77.0, 89.9, -40.0)])
def test_pixels_to_sky_and_back(name, pointing):
    camera = load_camera(name)
    rng = np.random.default_rng(1)
    for detector in camera.detectors[:: max(1, len(camera.detectors) // 8)]:
        x = rng.uniform(-20, detector.size[0] + 20, 50)
        y = rng.uniform(-20, detector.size[1] + 20, 50)
        ra, dec = camera.pixel_to_sky(detector, x, y, *pointing)
        back = camera.sky_to_pixel(detector, ra, dec, *pointing)
        np.testing.assert_allclose(back, (x, y), atol=1e-6)


@pytest.mark.parametrize("name", CAMERAS)
def test_far_sky_is_on_no_ccd(name):
    """The inverse of the distortion must not fold distant stars back into the field."""
    camera = load_camera(name)
    rng = np.random.default_rng(2)
    ra, dec = sphere.from_vector(rng.normal(size=(30000, 3)))
    distant = sphere.separation(ra, dec, 150.0, 2.0) > 1.5
    for detector in camera.detectors[::5]:
        x, y = camera.sky_to_pixel(detector, ra[distant], dec[distant], 150.0, 2.0, 30.0)
        nx, ny = detector.size
        assert not np.any((x > -1) & (x < nx) & (y > -1) & (y < ny))


@pytest.mark.parametrize("name", CAMERAS)
def test_scale_and_orientation_at_the_centre(name):
    camera = load_camera(name)
    step = 0.1
    pixels = step / camera.pixel_size
    for rotation, toward in [(0.0, "north"), (90.0, "east")]:
        angle = rotation - camera.rotation_offset
        xi, eta = camera.focal_to_tangent([0.0, step], [step, 0.0], angle)
        # +y at the given position angle, north through east
        along_y = eta[0] if toward == "north" else xi[0]
        assert 3600 * along_y / pixels == pytest.approx(camera.pixel_scale, rel=1e-5)
        # +x 90 degrees behind +y, or ahead of it for a flipped camera
        along_x = xi[1] if toward == "north" else eta[1]
        expected = -1.0 if toward == "north" else 1.0
        assert np.sign(along_x) == expected * (-1.0 if camera.flip_x else 1.0)


@pytest.mark.parametrize("name", CAMERAS)
def test_amplifiers_tile_their_ccd_and_read_every_raw_pixel_once(name):
    for detector in load_camera(name).detectors[::7]:
        assembled = np.zeros(detector.shape, dtype=np.uint8)
        raw = np.zeros((4300, 2300), dtype=np.uint8)
        for amplifier in detector.amplifiers:
            x0, y0, x1, y1 = amplifier.target
            assembled[y0:y1, x0:x1] += 1
            for box in (amplifier.data, amplifier.overscan, amplifier.prescan):
                if box is not None and amplifier.extension is None:
                    raw[box[1] : box[3], box[0] : box[2]] += 1
        assert np.all(assembled == 1)
        assert raw.max() == 1


@pytest.mark.parametrize("name", CAMERAS)
def test_ccds_do_not_overlap(name):
    camera = load_camera(name)
    for detector in camera.detectors:
        x_mm, y_mm = camera.pixel_to_focal(detector, *outline(detector.size, 20))
        for other in camera.detectors:
            if other.id != detector.id:
                x, y = camera.focal_to_pixel(other, x_mm, y_mm)
                nx, ny = other.size
                assert not np.any((x > -0.5) & (x < nx - 0.5) & (y > -0.5) & (y < ny - 0.5))


@pytest.mark.parametrize("name", CAMERAS)
def test_bands_are_ids_and_crosstalk_names_amplifiers(name):
    camera = load_camera(name)
    for band in camera.header.band.values.values():
        check_id(band, "band")
    amplifiers = {(d.id, a.name) for d in camera.detectors for a in d.amplifiers}
    for crosstalk in camera.crosstalk:
        assert {crosstalk.aggressor, crosstalk.victim} <= amplifiers
        assert crosstalk.aggressor[0] != crosstalk.victim[0]


def test_demo_distortion_is_some_pixels_over_the_field():
    camera = load_camera("demo")
    straight = camera.model_copy(update={"distortion": ()})
    corner = camera.detector(0)
    bent = camera.pixel_to_sky(corner, 0, 0, 150.0, 2.0, 0.0)
    shift = sphere.separation(*bent, *straight.pixel_to_sky(corner, 0, 0, 150.0, 2.0, 0.0))
    assert 3 < shift * 3600 / camera.pixel_scale < 6


def test_decam_agrees_with_a_real_exposure():
    camera = load_camera("decam")
    ccd, ra0, dec0, ra1, dec1 = np.array(DECAM_CORNERS).T
    n = len(ccd)
    residuals = solve_pointing(
        camera,
        np.tile(ccd, 2),
        np.repeat([0.0, 2047.0], n),
        np.repeat([0.0, 4095.0], n),
        np.concatenate([ra0, ra1]),
        np.concatenate([dec0, dec1]),
        # pointing as the header says it, rotation as the camera file does
        (351.713746, -5.102850, camera.header.rotation.default),
    )
    assert np.sqrt(np.mean(residuals**2)) < 0.5
    assert np.max(np.abs(residuals)) < 1.2


def test_decam_header_pointing_predicts_corners_within_the_margin():
    camera = load_camera("decam")
    for ccd, ra0, dec0, ra1, dec1 in DECAM_CORNERS:
        found = camera.pixel_to_sky(
            camera.detector(ccd),
            [0.0, 2047.0],
            [0.0, 4095.0],
            351.713746,
            -5.102850,
            camera.header.rotation.default,
        )
        offsets = sphere.separation(*found, [ra0, ra1], [dec0, dec1])
        assert np.all(offsets * 3600 < 25)


@pytest.mark.skipif(not DECAM_TABLE.is_file(), reason=f"{DECAM_TABLE.name} is not beside the code")
def test_decam_agrees_with_all_ccds_of_a_real_exposure():
    camera = load_camera("decam")
    with DECAM_TABLE.open() as stream:
        # S7 has one bad amplifier and N30 is damaged: their solutions there are off by 10 arcsec
        rows = [row for row in csv.DictReader(stream) if row["ccdnum"] not in ("31", "61")]
    assert len(rows) == 59
    residuals = solve_pointing(
        camera,
        np.repeat([int(row["ccdnum"]) for row in rows], 4),
        np.tile([0.0, 2047.0, 2047.0, 0.0], len(rows)),
        np.tile([0.0, 0.0, 4095.0, 4095.0], len(rows)),
        np.array([float(row[f"ra{i}"]) for row in rows for i in range(4)]),
        np.array([float(row[f"dec{i}"]) for row in rows for i in range(4)]),
        (351.713746, -5.102850, camera.header.rotation.default),
    )
    assert np.sqrt(np.mean(residuals**2)) < 0.4
    assert np.max(np.abs(residuals)) < 1.2


def test_hsc_agrees_with_the_published_distortion():
    camera = load_camera("hsc")
    for ccd, x, y, x_field, y_field in HSC_FIELD_ANGLES:
        xi, eta = camera.focal_to_tangent(*camera.pixel_to_focal(camera.detector(ccd), x, y), 0.0)
        assert 3600 * np.hypot(xi + x_field, eta - y_field) < 0.5


def test_hsc_orientation_agrees_with_a_raw_header():
    """HSCA04090107 (DET-ID 37, INST-PA 0) says where its centre is: 722" south, 2671" west."""
    camera = load_camera("hsc")
    detector = camera.detector(37)
    key = camera.header.rotation
    rotation = key.factor * 0.0 + key.offset
    ra, dec = camera.pixel_to_sky(detector, 1023.5, 2087.5, 21.1572375, 1.25975833, rotation)
    xi, eta = sphere.tan_project(ra, dec, 21.1572375, 1.25975833)
    # the header's linear WCS knows no distortion, which is 3 percent there
    assert 3600 * xi == pytest.approx(-2671, rel=0.05)
    assert 3600 * eta == pytest.approx(-722, rel=0.05)
    # raw rows run to the east for this CCD, raw columns to the south (mirrored on the CCD)
    x, y = camera.pixel_to_sky(
        detector, [1000, 1000, 1100], [2000, 2100, 2000], 21.0, 1.3, rotation
    )
    assert x[1] > x[0]
    assert all(amplifier.flip_x for amplifier in detector.amplifiers)
    assert y[2] > y[0]


def test_microobservatory_agrees_with_stars_on_a_real_frame():
    camera = load_camera("microobservatory")
    ra, dec, x, y = np.array(MICRO_STARS).T
    start = (31.27, 46.73, camera.header.rotation.default)
    residuals = solve_pointing(camera, np.zeros(len(ra), dtype=int), x, y, ra, dec, start)
    assert np.max(np.abs(residuals)) / camera.pixel_scale < 0.5


@pytest.mark.parametrize(
    ("name", "key", "text", "value"),
    [
        ("hsc", "exposure", "HSCA04090000", "040900"),
        ("hsc", "exposure", "HSCE00090400", "090400"),
        ("decam", "band", "g DECam SDSS c0001 4720.0 1520.0", "g"),
        ("microobservatory", "exposure", "HATP-32171220013343.FITS.gz", "171220013343"),
        ("microobservatory", "mjd", "2017-12-20T01:33:43.317-0000", "2017-12-20T01:33:43.317"),
    ],
)
def test_patterns_read_real_headers(name, key, text, value):
    found = re.search(getattr(load_camera(name).header, key).pattern, text)
    assert found[1] == value


def test_names_with_running_numbers_tell_exposure_and_ccd():
    camera = load_camera("hsc")
    template, extension = file_template("HSCA04090107.fits.gz", camera.layout)
    assert (template, extension) == ("HSCA{ccd+04090000}.fits.gz", "107")
    detector = next(d for d in camera.detectors if str(d.extension) == extension)
    assert detector.id == 37
    assert ccd_file(template, detector.extension) == "HSCA04090107.fits.gz"
    assert file_template("HSCA04090242.fits", camera.layout)[0] == "HSCA{ccd+04090200}.fits"


def test_names_with_ccds_and_names_of_whole_exposures():
    detector = load_camera("demo").detector(3)
    layout = FileLayout(files="ccd", ccd_pattern=r"-(?P<ccd>CCD\d+)\.")
    assert file_template("a-CCD3.fits", layout) == ("a-{ccd}.fits", "CCD3")
    assert ccd_file("a-{ccd}.fits", detector.extension) == "a-CCD3.fits"
    assert ccd_file("a.fits", detector.extension) == "a.fits"
    with pytest.raises(InputError, match="does not tell the CCD"):
        file_template("a3.fits", layout)


def test_read_order_follows_flips_unless_told():
    left, right = load_camera("demo").detector(0).amplifiers
    assert (left.read_reversed, right.read_reversed) == ((False, False), (True, False))
    upper_right = load_camera("decam").detector(1).amplifiers[0]
    assert upper_right.read_reversed == (True, True)


def broken(tmp_path, change):
    """Return the path of the demo camera with a mistake in it."""
    text = (Path(__file__).parents[2] / "src/coaddflow/instrument/cameras/demo.yaml").read_text()
    content = yaml.safe_load(text)
    change(content)
    path = tmp_path / "camera.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("pixel_scale"), "'pixel_scale': Field required"),
        (lambda c: c.update(pixel_scale=-1), "'pixel_scale'.*greater than 0"),
        (lambda c: c.update(pixelscale=1), "'pixelscale'.*not permitted"),
        (lambda c: c["detectors"].append(c["detectors"][0]), "two detectors have the same id"),
        (lambda c: c["header"].pop("ra"), "'header.ra': Field required"),
        (lambda c: c["header"].update(ra={"unit": "degree"}), "needs a keyword, a pattern"),
        (lambda c: c["layout"].update(files="ccd"), "one file per CCD needs ccd_pattern"),
        (lambda c: c["detectors"][1].update(size=[600, 640]), r"target .* is not inside the CCD"),
        (lambda c: c["detectors"][1].update(crosstalk=[[0]]), "crosstalk is not a 2 x 2 matrix"),
        (lambda c: c["detectors"][0]["amplifiers"][0].update(data=[0, 0, 9, 9]), "differ in size"),
        (lambda c: c["detectors"][0]["amplifiers"][0].update(gain=0), "gain.*greater than 0"),
        (lambda c: c.update(detectors=[]), "'detectors'.*at least 1"),
    ],
)
def test_mistakes_in_a_camera_file_are_named(tmp_path, change, message):
    path = broken(tmp_path, change)
    with pytest.raises(InputError, match=message) as caught:
        load_camera(path)
    assert caught.value.path == path


def test_camera_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"there is no camera 'noname'.*demo"):
        load_camera("noname")
    path = tmp_path / "camera.yaml"
    path.write_text("name: [")
    with pytest.raises(InputError, match="is not YAML"):
        load_camera(path)
    path.write_text("just text")
    with pytest.raises(InputError, match="camera key"):
        load_camera(path)


def test_unknown_ccd():
    with pytest.raises(InputError, match="camera 'demo' has no CCD 77"):
        load_camera("demo").detector(77)


def test_the_page_about_cameras_lists_every_key_and_its_example_is_a_camera(tmp_path):
    page = (Path(__file__).parents[2] / "docs/cameras.md").read_text()
    assert page.endswith("\n" + model_tables(Camera, "All keys"))
    path = tmp_path / "twin.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    camera = load_camera(path)
    assert [detector.name for detector in camera.detectors] == ["east", "west"]
    shift = camera.focal_to_tangent(0.0, 0.5 / camera.degrees_per_mm, 0.0)[1] - 0.5
    assert shift * 3600 == pytest.approx(5.0, abs=0.5)
