"""Checks of products against what is known: catalogues, truth, and the variance plane."""
