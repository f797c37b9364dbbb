"""From stars on a CCD to its place on the sky."""
