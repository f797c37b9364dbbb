"""What is solved for a whole exposure, from the small things that its CCDs have sent.

Which parts are solved for the exposure and which by each CCD for itself is a matter of the section
`exposure` of the settings: astrometry, the sky, the zero-point. Here the parts are put into their
order; each has a module of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray

from coaddflow.astrometry import AstrometrySolution
from coaddflow.background import Background
from coaddflow.calexp import Calexp, CcdFacts, MeasuredCcd, apply_calibration
from coaddflow.errors import CcdFailure
