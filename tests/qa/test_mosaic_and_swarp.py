"""The coadds of a tract as one image, and SWarp's coadd on the same pixels."""

import numpy as np
import pytest
from astropy.table import Table
from skyscene import draw_star, make_ccd, make_tract, make_wcs

from coaddflow.coadd.mean import Coadd
from coaddflow.coadd.product import write_coadd
from coaddflow.errors import InputError
from coaddflow.geometry.wcs_header import wcs_to_header
from coaddflow.image.masked_image import MaskedImage, MaskPlane, masked_image_hdus, write_fits
from coaddflow.qa import swarp
from coaddflow.qa.mosaic import read_mosaic

needs_swarp = pytest.mark.skipif(
    swarp.find_swarp() is None, reason="SWarp is not installed (Debian: swarp)"
)


def inputs(*rows):
    return Table(rows=rows, names=("exposure", "weight", "n_used"))


def test_each_pixel_of_a_mosaic_is_that_of_the_patch_that_owns_it(tmp_path):
    tract = make_tract(size=200, patches=2, border=10)
    for number, patch in enumerate(tract.patches()):
        x0, y0, x1, y1 = patch.outer_box
        shape = (y1 - y0, x1 - x0)
        image = np.full(shape, float(number), np.float32)
        planes = MaskedImage(image, np.ones(shape), np.zeros(shape, np.int32))
        table = inputs(("1001", 0.25, 10), (f"20{number}", 1.0, 0))
        coadd = Coadd(patch.outer_box, planes, np.full(shape, 3, np.int16), table)
        write_coadd(tmp_path / f"{patch.id}.fits", coadd, tract)
    mosaic = read_mosaic(tmp_path, tract)
    for number, patch in enumerate(tract.patches()):
        x0, y0, x1, y1 = patch.inner_box
        assert np.all(mosaic.masked_image.image[y0:y1, x0:x1] == number)
    assert np.all(mosaic.n_inputs == 3)
    # exposures of which no pixel was used have no weight
    assert mosaic.weights == {"1001": 0.25}


def write_calexps(folder):
    """Two calexps of the same star, 1 and 3 nJy high around it, the first with a bad pixel."""
    paths, shape, wcs = [], (200, 200), make_wcs((200, 200))
    for index, level in enumerate((1.0, 3.0)):
        image = np.full(shape, level) + draw_star(shape, 70.0, 120.0, 1e4, 4.0)
        ccd = make_ccd(image / 2.0, 1.0)
        ccd.mask[50, 60] |= np.int32(MaskPlane.CR) * (index == 0)
        header = wcs_to_header(wcs)
        header["EXPOSURE"], header["FLXSCALE"] = f"e{index}", 2.0
        paths.append(folder / f"{index}.fits")
        write_fits(paths[-1], masked_image_hdus(ccd, header))
    return paths


@needs_swarp
@pytest.mark.parametrize("combine", ["WEIGHTED", "CLIPPED"])
def test_swarp_averages_with_the_weights_of_the_exposures(tmp_path, combine):
    paths = write_calexps(tmp_path)
    weights = swarp.write_weights(paths, {"e0": 0.03, "e1": 0.01}, tmp_path)
    header = make_tract(size=200).wcs().to_header()
    header["NAXIS"], header["NAXIS1"], header["NAXIS2"] = 2, 200, 200
    coadd = swarp.run_swarp(paths, weights, header, combine, tmp_path)
    assert coadd.shape == (200, 200)
    # (3 * 1 + 1 * 3) / 4; where the first is masked only the second counts
    assert np.nanmedian(coadd.image) == pytest.approx(1.5, abs=0.01)
    assert coadd.image[50, 60] == pytest.approx(3.0, abs=0.05)
    assert np.median(coadd.variance) == pytest.approx(1.0 / 0.04, rel=0.01)
    assert (coadd.image[100:140, 50:90] - 1.5).sum() == pytest.approx(1e4, rel=0.003)


def test_without_swarp_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="SWarp is not installed"):
        swarp.run_swarp([], [], wcs_to_header(make_wcs()), "WEIGHTED", tmp_path)
