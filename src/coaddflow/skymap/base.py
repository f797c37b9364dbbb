"""What all sky maps have in common."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coaddflow.errors import InputError
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.tract import Tract


class SkyMap(ABC):
    """A set of tracts. Made by `make_skymap`."""

    settings: SkymapSettings
    """Its parameters, also those that have a default."""
    n_tracts: int
    """Tracts are numbered from 0 to ``n_tracts - 1``."""

    def tract(self, tract_id: int | str) -> Tract:
        """Return a tract by its number or the decimal text of it.

        Raises
        ------
        InputError
            If there is none.
        """
        text = str(tract_id)
        if not (text.isascii() and text.isdigit() and int(text) < self.n_tracts):
            raise InputError(
                f"the sky map has no tract {tract_id!r}",
                remedy=f"tracts are numbered from 0 to {self.n_tracts - 1}",
            )
        return self._tract(int(text))

    @abstractmethod
    def _tract(self, number: int) -> Tract:
        """Return a tract that exists."""

    def find_tract(self, ra: ArrayLike, dec: ArrayLike) -> NDArray[np.int64] | int:
        """Return the tract in whose inner region positions lie; -1 off the map.

        Parameters
        ----------
        ra, dec : array_like, shape (...)
            ICRS degrees.

        Returns
        -------
        int or ndarray of int64, shape (...)
            An int for scalars.

        Raises
        ------
        InputError
            If a value is not finite, or a declination not between -90 and 90.
        """
        if not (np.isfinite(ra).all() and (np.abs(dec) <= 90.0).all()):
            raise InputError(
                f"RA {ra}, Dec {dec} is not a position on the sky",
                remedy="give both in degrees, Dec between -90 and 90",
            )
        number = self._number_at(ra, dec)
        return int(number) if number.ndim == 0 else number

    @abstractmethod
    def _number_at(self, ra: ArrayLike, dec: ArrayLike) -> NDArray[np.int64]:
        """Return the tract number at valid positions; see `find_tract`."""

    @abstractmethod
    def tracts_near(self, ra: float, dec: float, radius: float) -> list[int]:
        """Return, in order, all tracts that a circle of this radius (degrees) may touch.

        Tracts count as round, so a few too many may be returned, but none is missed.
        """
