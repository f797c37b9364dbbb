"""Instrument signature removal: from raw counts to electrons."""
