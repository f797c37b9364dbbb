"""Coadds of the same calexps by SWarp, to compare with.

References
----------
.. [1] Bertin et al. 2002, ASP Conf. Ser. 281, 228 (SWarp).
.. [2] Gruen, Seitz & Bernstein 2014, PASP 126, 158 (COMBINE_TYPE CLIPPED).
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from astropy.io import fits

from coaddflow.errors import InputError
from coaddflow.image.masked_image import (
    MaskedImage,
    MaskPlane,
    planes_from_names,
    read_masked_image,
)
from coaddflow.settings.coadd import CoaddSettings


def find_swarp() -> str | None:
    """Return the program's path; None if SWarp is not installed (Debian: package swarp)."""
    return shutil.which("SWarp") or shutil.which("swarp")


def write_weights(
    calexps: Sequence[Path], weight_of: Mapping[str, float], folder: Path
) -> list[Path]:
    """Write a weight map for each calexp: its exposure's weight, 0 where the mask is bad.

    Parameters
    ----------
    calexps : sequence of Path
        Files with FLXSCALE and EXPOSURE in their headers.
    weight_of : mapping
        Inverse sky variance of the exposures, nJy^-2.
    folder : Path
        Where the maps go.
    """
    bad = np.int32(planes_from_names(CoaddSettings().bad_planes))
    paths = []
    for number, path in enumerate(calexps):
        calexp, header = read_masked_image(path)
        weight = weight_of[str(header["EXPOSURE"])] * header["FLXSCALE"] ** 2
        pixels = np.where((calexp.mask & bad) == 0, weight, 0.0).astype(np.float32)
        paths.append(folder / f"weight-{number}.fits")
        # the extension of the weights must be that of the image
        hdus = fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(pixels)])
        hdus.writeto(paths[-1], overwrite=True)
    return paths


def run_swarp(
    calexps: Sequence[Path],
    weights: Sequence[Path],
    header: fits.Header,
    combine: str,
    folder: Path,
) -> MaskedImage:
    """Coadd calexps with SWarp [1]_, sky and fluxes as they are.

    Parameters
    ----------
    calexps, weights : sequence of Path
        Calexps and their weight maps.
    header : astropy.io.fits.Header
        WCS, NAXIS1 and NAXIS2 of the coadd.
    combine : str
        COMBINE_TYPE: WEIGHTED, or CLIPPED [2]_.
    folder : Path
        For its files.

    Returns
    -------
    MaskedImage
        nJy; the variance is the inverse of SWarp's weight map.

    Raises
    ------
    InputError
        If SWarp is missing or fails.
    """
    program = find_swarp()
    if program is None:
        raise InputError("SWarp is not installed", remedy="on Debian: apt-get install swarp")
    output = folder / "coadd.fits"
    (folder / "coadd.head").write_text(header.tostring(sep="\n", endcard=True) + "\n")
    options = {
        "IMAGEOUT_NAME": output,
        "WEIGHTOUT_NAME": folder / "coadd.weight.fits",
        "WEIGHT_IMAGE": ",".join(f"{path}[1]" for path in weights),
        "WEIGHT_TYPE": "MAP_WEIGHT",
        "RESCALE_WEIGHTS": "N",
        "COMBINE_TYPE": combine,
        "CLIP_LOGNAME": folder / "clipped.log",
        "RESAMPLING_TYPE": "LANCZOS3",
        "RESAMPLE_DIR": folder,
        "FSCALASTRO_TYPE": "VARIABLE",
        "SUBTRACT_BACK": "N",
        "NTHREADS": 1,
        "VERBOSE_TYPE": "QUIET",
        "WRITE_XML": "N",
    }
    # extensions count from 0, the empty primary one: 1 is IMAGE
    command = [program, *(f"{path}[1]" for path in calexps), "-c", os.devnull]
    for name, value in options.items():
        command += [f"-{name}", str(value)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    if ended.returncode != 0 or not output.is_file():
        raise InputError(f"SWarp failed: {ended.stderr.strip()[-300:]}")
    image = fits.getdata(output).astype(np.float32)
    weight = fits.getdata(folder / "coadd.weight.fits").astype(np.float32)
    covered = weight > 0
    variance = np.divide(1.0, weight, out=np.full_like(weight, np.inf), where=covered)
    mask = np.where(covered, 0, int(MaskPlane.NO_DATA))
    return MaskedImage(np.where(covered, image, np.nan), variance, mask)
