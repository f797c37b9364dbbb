"""Raw exposures of wide-field mosaic cameras to calibrated images and deep coadds."""

__version__ = "0.4.0"
