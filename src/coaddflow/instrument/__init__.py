"""Cameras: their files, their geometry, raw pixels and header values."""
