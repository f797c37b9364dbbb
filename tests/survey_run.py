"""Run the workflow on a small simulated survey, and tell which jobs Snakemake ran or planned."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from astropy.io import fits

REPOSITORY = Path(__file__).parents[1]
SNAKEFILE = REPOSITORY / "Snakefile"

SETTINGS = {
    "camera": "mini",
    "exposures": "data/exposures.ecsv",
    "exclude_ccds": [1, 3],
    "refcat": {
        "path": "data/refcat.fits",
        "bands": {
            "g": {"magnitude": "mag_g", "error": "mag_g_err"},
            "r": {"magnitude": "mag_r", "error": "mag_r_err"},
        },
    },
    "prediction": {"margin": 0.008},
    # the border of two tracts runs through the field, so that some exposures touch both
    "skymap": {
        "kind": "rings",
        "pixel_scale": 0.2,
        "patch_inner_size": 600,
        "patch_border": 20,
        "rings": {"num_rings": 1000, "ra_start": 0.0, "tract_overlap": 0.002},
    },
}
"""Settings of the survey that the tests run."""

COARSE = {
    "parallel": {"calexp": "exposure", "coadd": "tract", "workers": 2},
    "coadd": {"keep_warps": True},
}
"""Settings with which each exposure and each tract is one job."""

Job = tuple[str, str]
"""Rule, and what its message names, such as "exposure 1001, CCD 0"."""


@dataclass(frozen=True)
class Run:
    """What a call of Snakemake did or planned."""

    returncode: int
    text: str

    @property
    def jobs(self) -> Counter[Job]:
        """The jobs that were begun, or planned; without the target rule."""
        begun = re.findall(r"^\s*Job \d+: (\w+): (.*)$", self.text, re.MULTILINE)
        return Counter((rule, what) for rule, what in begun if rule != "all")

    @property
    def rules(self) -> Counter[str]:
        """How many jobs of each rule were begun, or planned."""
        return Counter(rule for rule, _ in self.jobs.elements())

    @property
    def planned_nothing(self) -> bool:
        """Whether Snakemake found nothing to do."""
        return self.returncode == 0 and "Nothing to be done" in self.text


class Survey:
    """A folder with the raw frames of a survey, in which the workflow runs."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def write_settings(self, **changes: object) -> None:
        """Write config.yaml: the settings of the tests with some sections changed."""
        settings = {**SETTINGS, **changes}
        (self.folder / "config.yaml").write_text(yaml.safe_dump(settings))

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of Snakemake."""
        snakemake = [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE)]
        return [*snakemake, "--directory", str(self.folder), *arguments]

    def run(self, *arguments: str, **options: object) -> Run:
        """Run the workflow on all cores."""
        return self._call(self.command("--cores", "all", *arguments), **options)

    def plan(self, *arguments: str) -> Run:
        """Return what the workflow would do."""
        return self._call(self.command("--dry-run", *arguments))

    def coaddflow(self, *arguments: str) -> Run:
        """Call the command line in the folder."""
        return self._call([sys.executable, "-m", "coaddflow", *arguments], cwd=self.folder)

    def _call(self, command: list[str], **options: object) -> Run:
        ended = subprocess.run(
            command,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **{"env": environment(), **options},
        )
        return Run(ended.returncode, ended.stdout)

    def copy_to(self, folder: Path) -> "Survey":
        """Return a copy with all products and all of Snakemake's memory, times preserved."""
        shutil.copytree(self.folder, folder, copy_function=shutil.copy2)
        return Survey(folder)

    def pixels(self, pattern: str) -> dict[str, list[bytes]]:
        """Return the bits of all planes of the images whose path matches."""
        found = {}
        for path in sorted(self.folder.glob(pattern)):
            with fits.open(path, memmap=False) as hdus:
                planes = [hdu.data for hdu in hdus if hdu.is_image and hdu.data is not None]
                found[str(path.relative_to(self.folder))] = [
                    np.ascontiguousarray(plane).tobytes() for plane in planes
                ]
        return found


def environment() -> dict[str, str]:
    """Return the environment of the tests without what would change Snakemake's ways."""
    unwanted = {"SNAKEMAKE_PROFILE", "PYTHONWARNINGS"}
    return {name: value for name, value in os.environ.items() if name not in unwanted}
