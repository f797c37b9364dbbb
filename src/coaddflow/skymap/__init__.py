"""Tracts and patches, and which of them an exposure can touch."""
