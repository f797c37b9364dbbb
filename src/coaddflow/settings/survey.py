"""Settings that belong to the whole run rather than to one stage."""

from typing import Literal

from pydantic import Field

from coaddflow.settings.base import Section


class PredictionSettings(Section):
    """How much the pointing in the headers may be wrong when the work is planned."""

    margin: float = Field(
        0.05,
        ge=0,
        le=5,
        description="Degrees by which every predicted CCD is enlarged when tracts and patches are "
        "chosen for an exposure. A fitted CCD outside its margin is an error, never a silent hole.",
    )


class ProductsSettings(Section):
    """How images are written."""

    compression: Literal["none", "lossless", "quantized"] = Field(
        "none",
        description="`none`: plain FITS, read by every program; `lossless`: tile-compressed, bit "
        "for bit; `quantized`: tile-compressed in steps of 1/16 of the noise, with dithering "
        "(calexps and coadds about five times smaller).",
    )


class ParallelSettings(Section):
    """What one job of the scheduler is."""

    calexp: Literal["ccd"] = Field(
        "ccd", description="`ccd`: one job per CCD, grouped per exposure on a cluster."
    )
    coadd: Literal["patch"] = Field(
        "patch", description="`patch`: one job per patch and band, grouped per tract on a cluster."
    )
