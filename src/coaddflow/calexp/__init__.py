"""One CCD, from raw pixels (or an image calibrated elsewhere) to its calexp."""
