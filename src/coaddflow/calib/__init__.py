"""Master calibration frames and crosstalk coefficients, from many exposures."""
