"""What a product was made from, in its primary header.

========  =====================================================================================
keyword   meaning
========  =====================================================================================
CFVERS    version of coaddflow
CFSETHSH  first 16 digits of the SHA-256 of the settings that this product depends on
NINPUT    number of files that it was made from
INPnnnnn  their names, as the job was given them
========  =====================================================================================

Nothing here depends on the time: the same inputs and settings give the same bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from astropy.io import fits

from coaddflow import __version__


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Return a short checksum of settings, given as plain values (`Settings.provenance`)."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def provenance_header(settings: Mapping[str, Any], inputs: Iterable[str | Path]) -> fits.Header:
    """Return the cards that say what a product was made from.

    ``settings`` are the sections that the product depends on, as plain values. In the names of the
    files, ``inputs``, characters that FITS does not know become ``?``.
    """
    header = fits.Header()
    header["CFVERS"] = (__version__, "version of coaddflow")
    header["CFSETHSH"] = (settings_hash(settings), "checksum of the settings used")
    names = [str(path) for path in inputs]
    header["NINPUT"] = (len(names), "files that this was made from")
    for number, name in enumerate(names, start=1):
        printable = "".join(c if c.isascii() and c.isprintable() else "?" for c in name)
        header[f"INP{number:05d}"] = printable
    return header
