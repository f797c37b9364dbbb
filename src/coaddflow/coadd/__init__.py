"""From warps to the coadds of patches and tracts."""
