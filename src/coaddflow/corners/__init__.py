"""The corner database: which CCD covers which patch, and how good it is."""
