"""Products that are there but not whole, or made with other settings, by a look at small parts.

`coaddflow status` looks at sizes and at the first cards of headers; `coaddflow verify` reads
everything.
"""

import re
import zlib
from pathlib import Path

from coaddflow.image.fits_hdus import BLOCK, NotFitsError, open_fits, walk_hdus
from coaddflow.image.provenance import settings_hash
from coaddflow.settings import Settings

_HASH = re.compile(rb"CFSETHSH= '([0-9a-f]{16})'")

_MOST_BLOCKS = 40
"""Blocks of a primary header in which the checksum of the settings is looked for."""


def is_whole_fits(path: Path) -> bool:
    """Return whether a FITS file is as long as its headers say; no data are read."""
    try:
        with open_fits(path) as stream:
            for _ in walk_hdus(stream):
                pass
    except (NotFitsError, EOFError, OSError, zlib.error):
        return False
    size = path.stat().st_size
    return size > 0 and size % BLOCK == 0


def made_with(path: Path) -> str | None:
    """Return the checksum of the settings that a product names; None if it names none."""
    try:
        with path.open("rb") as stream:
            start = stream.read(_MOST_BLOCKS * BLOCK)
    except OSError:
        return None
    match = _HASH.search(start)
    return match[1].decode() if match else None


def expected_hash(settings: Settings, sections: tuple[str, ...]) -> str:
    """Return the checksum that products of a stage with these sections name today."""
    return settings_hash(settings.changed_in(*sorted(sections)))
