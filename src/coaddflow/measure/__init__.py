"""The sky, the sources, the PSF and the fluxes of one image."""
