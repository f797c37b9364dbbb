"""Settings of the prediction of overlaps."""

from pydantic import Field

from coaddflow.settings.base import Section


class PredictionSettings(Section):
    """Allowance for wrong pointings when the work is planned."""

    margin: float = Field(0.05, ge=0, le=5)
    """Degrees by which every predicted CCD is enlarged when tracts and patches are chosen for an
    exposure. An exposure with CCDs outside it is left out, and planned with its fitted pointing in
    the next run."""
