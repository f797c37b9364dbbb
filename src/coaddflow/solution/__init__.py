"""The solution of a tract: astrometry and photometry of all its exposures together."""
