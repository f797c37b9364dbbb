"""The coadds of a tract as one image, to compare with those of other programs."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.table import Table, vstack
from numpy.typing import NDArray

from coaddflow.coadd.product import read_coadd
from coaddflow.image.masked_image import MaskedImage
from coaddflow.skymap.tract import Tract


@dataclass(frozen=True)
class Mosaic:
    """The pixels of a tract in one band."""

    masked_image: MaskedImage
    """nJy; NaN where there is nothing."""
    n_inputs: NDArray[np.int16]
    """Values used in each pixel."""
    weights: dict[str, float]
    """Weight of each exposure."""


def read_mosaic(folder: str | Path, tract: Tract) -> Mosaic:
    """Put the coadds of a band on a tract together.

    Each pixel comes from the patch whose inner box holds it.

    Parameters
    ----------
    folder : str or Path
        ``results/coadd/{band}/{tract}``.
    tract : Tract
        Its pixels.
    """
    whole = MaskedImage.empty((tract.height, tract.width))
    n_inputs = np.zeros(whole.shape, np.int16)
    tables = []
    for path in sorted(Path(folder).glob("*.fits")):
        coadd, _ = read_coadd(path)
        x0, y0, x1, y1 = tract.patch(path.stem).inner_box
        left, bottom = coadd.box[:2]
        source = slice(y0 - bottom, y1 - bottom), slice(x0 - left, x1 - left)
        target = slice(y0, y1), slice(x0, x1)
        for name in ("image", "variance", "mask"):
            getattr(whole, name)[target] = getattr(coadd.masked_image, name)[source]
        n_inputs[target] = coadd.n_inputs[source]
        tables.append(coadd.inputs["exposure", "weight", "n_used"])
    inputs = vstack(tables) if tables else Table(names=("exposure", "weight", "n_used"))
    used = inputs[inputs["n_used"] > 0]
    weights = {str(row["exposure"]).strip(): float(row["weight"]) for row in used}
    return Mosaic(whole, n_inputs, weights)
