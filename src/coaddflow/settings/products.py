"""Settings of the output files."""

from typing import ClassVar, Literal

from coaddflow.settings.base import Section


class ProductsSettings(Section):
    """How images are written."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"verify_on_read"})

    compression: Literal["none", "lossless", "quantized"] = "none"
    """`none`: plain FITS, read by every program; `lossless`: tile-compressed; `quantized`:
    tile-compressed in steps of 1/16 of the noise, about five times smaller (docs/products.md)."""
    verify_on_read: bool = False
    """Verify DATASUM and CHECKSUM of each calexp before it is warped, which reads it twice;
    `coaddflow verify` verifies all products at once."""
