"""Settings of where exposures are expected to fall."""

from pydantic import Field

from coaddflow.settings.base import Section


class PredictionSettings(Section):
    """How much the pointing in the headers may be wrong when the work is planned."""

    margin: float = Field(
        0.05,
        ge=0,
        le=5,
        description="Degrees by which every predicted CCD is enlarged when tracts and patches are "
        "chosen for an exposure. A fitted CCD outside its margin is an error, never a silent hole.",
    )
