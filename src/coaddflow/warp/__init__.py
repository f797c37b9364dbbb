"""From the pixels of a CCD to those of a tract."""
