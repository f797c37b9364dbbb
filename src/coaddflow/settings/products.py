"""Settings of the output files."""

from typing import Literal

from coaddflow.settings.base import Section


class ProductsSettings(Section):
    """How images are written."""

    compression: Literal["none", "lossless", "quantized"] = "none"
    """`none`: plain FITS, read by every program; `lossless`: tile-compressed; `quantized`:
    tile-compressed in steps of 1/16 of the noise, about five times smaller (docs/products.md)."""
