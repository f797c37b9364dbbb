"""Pixels with variance and mask: in memory, in FITS, filled, cut out and summarised."""
