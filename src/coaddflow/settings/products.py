"""Settings of how products are written."""

from typing import Literal

from pydantic import Field

from coaddflow.settings.base import Section


class ProductsSettings(Section):
    """How images are written."""

    compression: Literal["none", "lossless", "quantized"] = Field(
        "none",
        description="`none`: plain FITS, read by every program; `lossless`: tile-compressed, bit "
        "for bit; `quantized`: tile-compressed in steps of 1/16 of the noise, with dithering "
        "(calexps and coadds about five times smaller; warps are `lossless` then, since coadds "
        "are made from them).",
    )
