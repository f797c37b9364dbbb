"""Saturated stars keep their place, and get their light back as far as their wings tell."""

import numpy as np
import pytest

from coaddflow.calexp.ccd import measure_ccd
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.isr.detrend import grow, grow_bleeding
from coaddflow.measure.psf_model import PsfModel
from coaddflow.measure.saturated_stars import repair_saturated
from coaddflow.settings import Settings

SHAPE = (120, 140)
FULL_WELL = 30000.0
STARS = [(40.3, 60.4, 2.0e6), (95.8, 30.2, 6.0e5), (100.1, 90.7, 1.2e6)]


def moffat(x0, y0, flux, fwhm=3.0, beta=3.0):
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    alpha2 = (fwhm / 2) ** 2 / (2 ** (1 / beta) - 1)
    profile = (1 + ((x - x0) ** 2 + (y - y0) ** 2) / alpha2) ** -beta
    return flux * (beta - 1) / (np.pi * alpha2) * profile


class MoffatPsf(PsfModel):
    """The PSF that the stars were drawn with."""

    def __init__(self):
        object.__setattr__(self, "half", 14)

    def images_at(self, x, y, sub_pixel=True):
        images = []
        for one_x, one_y in zip(np.atleast_1d(x), np.atleast_1d(y), strict=True):
            dx, dy = one_x - np.rint(one_x), one_y - np.rint(one_y)
            image = moffat(60 + dx, 50 + dy, 1.0)[36:65, 46:75]
            images.append(image / image.sum())
        return np.array(images)


@pytest.fixture
def saturated():
    rng = np.random.default_rng(3)
    truth = sum(moffat(*star) for star in STARS) + moffat(48.0, 66.0, 5e4)
    seen = rng.normal(truth, np.sqrt(truth + 100.0))
    image = MaskedImage(np.minimum(seen, FULL_WELL), truth + 100.0, np.zeros(SHAPE))
    image.image[25:62, 39:42] = FULL_WELL  # the first star bleeds downwards
    image.mask[image.image >= FULL_WELL] = MaskPlane.SAT
    return truth, image


def centroid(image, x0, y0, radius=6):
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    flux = np.where(np.hypot(x - x0, y - y0) < radius, image, 0.0)
    return (flux * x).sum() / flux.sum(), (flux * y).sum() / flux.sum()


def test_stars_come_back_to_their_places(saturated):
    truth, image = saturated
    x, y, _ = STARS[0]
    before = centroid(image.image, x, y)
    assert abs(before[1] - centroid(truth, x, y)[1]) > 0.5
    assert repair_saturated(image, MoffatPsf()) == 3
    for x, y, _ in STARS:
        assert centroid(image.image, x, y) == pytest.approx(centroid(truth, x, y), abs=0.1)
        core = image.image[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3]
        assert core.max() == pytest.approx(truth[round(y), round(x)], rel=0.15)


def test_bleeding_goes_and_flags_stay(saturated):
    truth, image = saturated
    mask = image.has_any(MaskPlane.SAT)
    untouched = image.image[~mask].copy()
    repair_saturated(image, MoffatPsf())
    assert (image.has_any(MaskPlane.SAT) == mask).all()
    assert (image.has_any(MaskPlane.INTRP) == mask).all()
    np.testing.assert_array_equal(image.image[~mask], untouched)
    assert np.abs(image.image[26:40, 40] - truth[26:40, 40]).max() < 300
    error = np.abs(image.image - truth)[mask]
    assert np.mean(error < 2 * np.sqrt(image.variance[mask])) > 0.9


def test_star_wider_than_the_psf_is_bridged(saturated):
    _, image = saturated
    image.mask[:] = 0
    image.mask[20:60, 30:70] = MaskPlane.SAT
    assert repair_saturated(image, MoffatPsf()) == 0
    assert image.has_any(MaskPlane.INTRP)[20:60, 30:70].all()


def test_saturated_stars_beside_each_other_keep_both_cores():
    """The PSF of each reaches the saturated pixels of the other."""
    stars = [(50.2, 50.3, 2.0e6), (59.6, 57.4, 8.0e5)]
    truth = sum(moffat(*star) for star in stars)
    seen = np.random.default_rng(4).normal(truth, np.sqrt(truth + 100.0))
    mask = np.where(seen >= FULL_WELL, int(MaskPlane.SAT), 0)
    image = MaskedImage(np.minimum(seen, FULL_WELL), truth + 100.0, mask)
    assert repair_saturated(image, MoffatPsf()) == 2
    for x, y, _ in stars:
        core = image.image[round(y), round(x)]
        assert core == pytest.approx(truth[round(y), round(x)], rel=0.15)


def test_a_star_that_is_only_bridged_has_no_hole():
    """Along a row the bridge is lower than the light above and below it."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    light = 2e5 * np.exp(-np.hypot((x - 60) / 1.5, y - 58) / 8)
    full = np.hypot(x - 60, y - 58) < 13
    full[20:100, 60] = True  # it bleeds
    image = MaskedImage(light, light + 100.0, np.where(full, int(MaskPlane.SAT), 0))
    assert repair_saturated(image, MoffatPsf()) == 0
    assert image.image[57:60, 59:62].min() >= image.image[~full].max()
    np.testing.assert_allclose(image.image[21:40, 60], light[21:40, 60], rtol=0.1)


@pytest.mark.parametrize("width", [1, 6])
def test_a_bled_column_beside_a_star_is_not_raised_to_its_light(width):
    """Its own star is beyond the edge of the CCD, or too wide for the PSF."""
    light = moffat(40.0 + width + 1, 60.0, 3e5)
    full = np.zeros(SHAPE, bool)
    full[:, 40 : 40 + width] = True
    image = MaskedImage(
        np.where(full, FULL_WELL, light), light + 100.0, np.where(full, int(MaskPlane.SAT), 0)
    )
    repair_saturated(image, MoffatPsf())
    assert np.abs(image.image[:30][full[:30]]).max() < 0.01 * FULL_WELL


def bled(column, full):
    """Let the charge above full well run up and down a column, in place."""
    for row in np.flatnonzero(column > full):
        surplus, column[row] = column[row] - full, full
        for step in (-1, 1):
            left, place = surplus / 2, row + step
            while left > 0 and 0 <= place < len(column):
                taken = min(max(full - column[place], 0.0), left)
                column[place] += taken
                left -= taken
                place += step


@pytest.mark.parametrize("flux", [6e6, 2e7])
def test_a_star_that_bleeds_over_many_columns_is_found_in_them(flux):
    """Most of its full pixels have no light of their own, and the sky is bright."""
    truth = moffat(70.3, 63.6, flux)
    seen = np.random.default_rng(2).normal(truth, np.sqrt(truth + 5000.0))
    for column in np.flatnonzero((seen > FULL_WELL).any(axis=0)):
        bled(seen[:, column], FULL_WELL)
    mask = np.zeros(SHAPE, np.int32)
    mask[grow(*grow_bleeding(seen >= FULL_WELL, 4, 4), 1, SHAPE)] = MaskPlane.SAT
    image = MaskedImage(seen, truth + 5000.0, mask)
    assert repair_saturated(image, MoffatPsf()) == 1
    near = np.s_[50:78, 57:85]
    assert image.image[near].sum() == pytest.approx(truth[near].sum(), rel=0.2)
    assert image.image[64, 70] == pytest.approx(truth[64, 70], rel=0.2)


@pytest.fixture(scope="module", params=[3.0, 4.5])
def field(request):
    """Stars, a dozen of them saturated by 1 to 2.5 mag, measured as a CCD is."""
    fwhm, shape, full, sky = request.param, (520, 640), 9e4, 1000.0
    rng = np.random.default_rng(8)
    alpha2 = (fwhm / 2) ** 2 / (2 ** (1 / 2.6) - 1)
    brightest = full * np.pi * alpha2 / 1.6
    grid = [axis.ravel() for axis in np.mgrid[80:460:3j, 80:560:4j]]
    y, x = grid + rng.uniform(-15, 15, (2, 12))
    excess = np.tile([1.0, 1.5, 2.0, 2.5], 3)
    faint_y, faint_x = rng.uniform(12, 508, 130), rng.uniform(12, 628, 130)
    flux = np.concatenate([brightest * 10 ** (0.4 * excess), 10 ** rng.uniform(3.3, 5.5, 130)])
    light = np.zeros(shape)
    rows, columns = np.arange(shape[0])[:, None], np.arange(shape[1])
    for one_x, one_y, one in zip([*x, *faint_x], [*y, *faint_y], flux, strict=True):
        distance2 = (columns - one_x) ** 2 + (rows - one_y) ** 2
        light += one * 1.6 / (np.pi * alpha2) * (1 + distance2 / alpha2) ** -2.6
    seen = rng.normal(rng.poisson(light + sky), 5.0)
    for column in np.flatnonzero((seen > full).any(axis=0)):
        bled(seen[:, column], full)
    mask = np.zeros(shape, np.int32)
    places = grow(*grow_bleeding(seen >= full, 4, 4), 1, shape)
    mask[places] = MaskPlane.SAT
    measured = measure_ccd(MaskedImage(seen, np.maximum(seen, sky) + 25.0, mask), Settings())
    return measured.masked_image, light, x, y, excess, fwhm


def test_light_of_saturated_stars_comes_back_to_its_place(field):
    image, light, x, y, excess, fwhm = field
    rows, columns = np.indices(image.shape)
    for one_x, one_y, mag in zip(x, y, excess, strict=True):
        near = np.hypot(columns - one_x, rows - one_y) < 3 * fwhm
        flux = image.image[near].sum() / light[near].sum()
        assert flux == pytest.approx(1.0, abs=0.05 if mag <= 1 else 0.2)
        shift = [
            (image.image * along)[near].sum() / image.image[near].sum()
            - (light * along)[near].sum() / light[near].sum()
            for along in (columns, rows)
        ]
        assert np.hypot(*shift) < 0.3


def test_cores_of_saturated_stars_are_higher_than_their_rims(field):
    image, _, x, y, _, _ = field
    for one_x, one_y in zip(x, y, strict=True):
        column, row = round(one_x), round(one_y)
        around = np.s_[row - 12 : row + 13, column - 12 : column + 13]
        outside = ~image.has_any(MaskPlane.SAT)[around]
        core = image.image[row - 1 : row + 2, column - 1 : column + 2]
        assert core.min() > image.image[around][outside].max()
        assert image.has_any(MaskPlane.SAT)[row, column]
