"""World coordinates: making and fitting a WCS, and mapping between pixels and the sky.

Inside coaddflow a fitted WCS is TAN-SIP [1]_; what files carry is in `geometry.wcs_header`.

References
----------
.. [1] Shupe et al. 2005, ADASS XIV, ASP Conf. 347, 491 (SIP).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from astropy.wcs import WCS, Sip
from numpy.typing import ArrayLike, NDArray

from coaddflow.geometry.polynomial import evaluate, fit_polynomial
from coaddflow.geometry.sphere import tan_deproject, tan_project

MAX_NEWTON_STEPS = 25
_CONVERGED_PIXELS = 1e-7


def fit_tan_sip(
    to_sky: Callable[[NDArray, NDArray], tuple[NDArray, NDArray]],
    shape: tuple[int, int],
    tolerance: float = 1e-4,
    max_order: int = 5,
) -> WCS:
    """Return the TAN-SIP WCS of a mapping from pixels to the sky, such as a camera predicts.

    The reference pixel is the centre of the CCD, and the order is the lowest with which the
    error stays below ``tolerance`` pixels on a grid over the CCD.

    Parameters
    ----------
    to_sky : callable
        Takes arrays x, y of 0-based pixels, gives ra, dec in degrees.
    shape : tuple of int
        Shape (ny, nx) of the CCD.
    tolerance : float
        Error at which the order is not raised further, pixels.
    max_order : int
        Highest order.
    """
    ny, nx = shape
    crpix = np.array([(nx - 1) / 2.0, (ny - 1) / 2.0])
    x, y = np.meshgrid(np.linspace(-0.5, nx - 0.5, 21), np.linspace(-0.5, ny - 0.5, 21))
    u, v = (x - crpix[0]).ravel(), (y - crpix[1]).ravel()
    crval = np.ravel(to_sky(crpix[:1], crpix[1:]))
    plane = np.stack(tan_project(*to_sky(x.ravel(), y.ravel()), *crval))
    for order in range(1, max_order + 1):
        xi, eta = (fit_polynomial(u, v, values, order) for values in plane)
        wcs = plane_to_tan_sip(crval, crpix, xi, eta, shape)
        error = np.stack([evaluate(xi, u, v), evaluate(eta, u, v)]) - plane
        if np.abs(np.linalg.solve(wcs.pixel_scale_matrix, error)).max() < tolerance:
            break
    return wcs


def plane_to_tan_sip(
    crval: ArrayLike, crpix: ArrayLike, xi: NDArray, eta: NDArray, shape: tuple[int, int]
) -> WCS:
    """Return the TAN-SIP form of polynomials from pixels to the tangent plane.

    Parameters
    ----------
    crval : array_like, shape (2,)
        Tangent point, degrees.
    crpix : array_like, shape (2,)
        Pixel (x, y), 0-based, from which the polynomials count.
    xi, eta : ndarray, shape (order + 1, order + 1)
        Polynomials c[p, q] in degrees. Their constant terms must be small: they are taken as a
        shift of the tangent point.
    shape : tuple of int
        Shape (ny, nx) of the CCD.
    """
    crval = tan_deproject(xi[0, 0], eta[0, 0], *crval)
    cd = np.array([[c[1, 0], c[0, 1]] for c in (xi, eta)])
    inverse = np.linalg.inv(cd)
    a, b = (row[0] * xi + row[1] * eta for row in inverse)
    for c in (a, b):
        c[0, 0] = c[1, 0] = c[0, 1] = 0.0
    return make_tan_sip(crval, crpix, cd, a, b, shape)


def make_tan_sip(
    crval: ArrayLike,
    crpix: ArrayLike,
    cd: ArrayLike,
    a: NDArray,
    b: NDArray,
    shape: tuple[int, int],
) -> WCS:
    """Return a TAN-SIP WCS with inverse polynomials that are good over the whole CCD.

    Parameters
    ----------
    crval, crpix, shape
        See `plane_to_tan_sip`.
    cd : array_like, shape (2, 2)
        Degrees per pixel.
    a, b : ndarray, shape (order + 1, order + 1)
        SIP polynomials of x and y; terms of order 0 and 1 must be zero.
    """
    crpix = np.asarray(crpix, float) + 1.0
    cards = WcsCards("TAN", np.asarray(crval, float), crpix, np.asarray(cd, float), shape=shape)
    if not (np.any(a) or np.any(b)):
        return build_wcs(cards)
    wcs = build_wcs(replace(cards, sip=(np.asarray(a, float), np.asarray(b, float))))
    wcs.sip = Sip(a, b, *inverse_sip(a, b, crpix - 1.0, shape), crpix)
    return wcs


def inverse_sip(
    a: NDArray, b: NDArray, crpix: ArrayLike, shape: tuple[int, int], tolerance: float = 1e-4
) -> tuple[NDArray, NDArray]:
    """Return the SIP polynomials AP, BP from undistorted to measured pixels.

    ``a`` and ``b`` are the forward polynomials, shape (order + 1, order + 1), and ``crpix`` is
    0-based. The order is the lowest whose error stays below ``tolerance`` pixels on a grid over
    the CCD, at most two above that of the forward polynomials, and at most 9.
    """
    ny, nx = shape
    x, y = np.meshgrid(np.linspace(-0.5, nx - 0.5, 31), np.linspace(-0.5, ny - 0.5, 31))
    u, v = x.ravel() - crpix[0], y.ravel() - crpix[1]
    du, dv = evaluate(a, u, v), evaluate(b, u, v)
    order = max(a.shape[0], b.shape[0]) - 1
    for inverse_order in range(order, min(order + 2, 9) + 1):
        ap, bp = (fit_polynomial(u + du, v + dv, -shift, inverse_order) for shift in (du, dv))
        error = np.stack([du + evaluate(ap, u + du, v + dv), dv + evaluate(bp, u + du, v + dv)])
        if np.abs(error).max() < tolerance:
            break
    return ap, bp


@dataclass(frozen=True)
class WcsCards:
    """The numbers of a celestial WCS, in FITS conventions (CRPIX 1-based), lon before lat."""

    projection: str
    crval: NDArray[np.float64]
    crpix: NDArray[np.float64]
    cd: NDArray[np.float64]
    pv: dict[tuple[int, int], float] = field(default_factory=dict)
    sip: tuple[NDArray, NDArray] | None = None
    pole: tuple[float | None, float | None] = (180.0, None)
    shape: tuple[int, int] | None = None


def build_wcs(cards: WcsCards) -> WCS:
    """Return the astropy WCS of these numbers."""
    wcs = WCS(naxis=2)
    suffix = "-SIP" if cards.sip is not None else ""
    wcs.wcs.ctype = [f"RA---{cards.projection}{suffix}", f"DEC--{cards.projection}{suffix}"]
    wcs.wcs.cunit = ["deg", "deg"]
    wcs.wcs.crval = cards.crval
    wcs.wcs.crpix = cards.crpix
    wcs.wcs.cd = cards.cd
    wcs.wcs.radesys = "ICRS"
    if cards.pv:
        # from here on astropy calls TPV a TAN, and does not give its coefficients back
        wcs.wcs.set_pv([(i, m, value) for (i, m), value in sorted(cards.pv.items())])
    for name, value in zip(("lonpole", "latpole"), cards.pole, strict=True):
        if value is not None:
            setattr(wcs.wcs, name, value)
    if cards.sip is not None:
        wcs.sip = Sip(*cards.sip, None, None, cards.crpix)
    if cards.shape is not None:
        wcs.array_shape = cards.shape
    wcs.wcs.set()
    return wcs


def pixel_to_sky(wcs: WCS, x: ArrayLike, y: ArrayLike) -> tuple[NDArray, NDArray]:
    """Return ICRS (ra in [0, 360), dec) in degrees of 0-based pixels of any shape."""
    x, y = np.broadcast_arrays(np.asarray(x, float), np.asarray(y, float))
    ra, dec = wcs.all_pix2world(x.ravel(), y.ravel(), 0)
    return ra.reshape(x.shape) % 360.0, dec.reshape(x.shape)


def sky_to_pixel(
    wcs: WCS, ra: ArrayLike, dec: ArrayLike, margin: float = 0.5
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Invert `pixel_to_sky` near the image, for any projection and distortion.

    Newton's method on the plane that touches the sky at the image's centre. Polynomial
    distortions fold back far outside of the image; positions there, and those for which no pixel
    is found, give NaN and no warning.

    Parameters
    ----------
    wcs : astropy.wcs.WCS
        With ``array_shape``, which says what near means; without it there is no limit.
    ra, dec : array_like
        ICRS positions in degrees, any shape.
    margin : float
        How far outside of the image a pixel may be, in units of the image's longer side.

    Returns
    -------
    x, y : ndarray of float64
        0-based pixels, accurate to 1e-6 pixel, or NaN.
    """
    ra, dec = np.broadcast_arrays(np.asarray(ra, float), np.asarray(dec, float))
    pixels = np.full((2, ra.size), np.nan)
    centre = np.array(centre_pixel(wcs))[:, None]
    ra0, dec0 = (float(value[0]) for value in pixel_to_sky(wcs, *centre))

    def to_plane(xy: NDArray) -> NDArray:
        return np.stack(tan_project(*pixel_to_sky(wcs, *xy), ra0, dec0))

    target = np.stack(tan_project(ra.ravel(), dec.ravel(), ra0, dec0))
    central = _jacobian(to_plane, centre)[..., 0]
    start = centre + np.linalg.solve(central, target)
    limits = _limits(wcs, margin)
    # the linear start of a good pixel may be off by the distortion: twice the margin
    near = np.flatnonzero(_inside(start, _limits(wcs, 2.0 * margin + 0.5)))
    found, good = _newton(to_plane, start[:, near], target[:, near])
    near, found = near[good], found[:, good]
    upright = np.linalg.det(central) * _determinant(_jacobian(to_plane, found)) > 0
    good = upright & _inside(found, limits)
    pixels[:, near[good]] = found[:, good]
    return pixels[0].reshape(ra.shape), pixels[1].reshape(ra.shape)


def _newton(to_plane: Callable, xy: NDArray, target: NDArray) -> tuple[NDArray, NDArray]:
    """Solve to_plane(xy) = target for points (2, n); return the pixels and which are solved."""
    xy = xy.copy()
    solved = np.zeros(xy.shape[1], bool)
    active = np.arange(xy.shape[1])
    for iteration in range(MAX_NEWTON_STEPS):
        if active.size == 0:
            break
        if iteration < 2 or iteration % 5 == 0:
            # later steps go along the derivative of an earlier one, which is as good near the root
            inverse = _inverse(_jacobian(to_plane, xy[:, active]))
        step = np.einsum("ijn,jn->in", inverse, target[:, active] - to_plane(xy[:, active]))
        xy[:, active] += step
        size = np.abs(step).max(axis=0)
        solved[active[size < _CONVERGED_PIXELS]] = True
        # a point that leaves the plane (NaN) or goes far away is given up
        going_on = (size >= _CONVERGED_PIXELS) & (size < 1e5)
        active, inverse = active[going_on], inverse[..., going_on]
    return xy, solved


def _jacobian(to_plane: Callable, xy: NDArray) -> NDArray[np.float64]:
    """Return the derivative of a mapping at points (2, n), shape (2, 2, n), by differences."""
    steps = [np.array([[0.5], [0.0]]), np.array([[0.0], [0.5]])]
    return np.stack([to_plane(xy + step) - to_plane(xy - step) for step in steps], axis=1)


def _determinant(matrices: NDArray) -> NDArray[np.float64]:
    """Return the determinants of matrices (2, 2, n)."""
    return matrices[0, 0] * matrices[1, 1] - matrices[0, 1] * matrices[1, 0]


def _inverse(matrices: NDArray) -> NDArray[np.float64]:
    """Return the inverses of matrices (2, 2, n); NaN for singular ones."""
    determinant = _determinant(matrices)
    determinant = np.where(determinant == 0.0, np.nan, determinant)
    (a, b), (c, d) = matrices
    return np.array([[d, -b], [-c, a]]) / determinant


def _limits(wcs: WCS, margin: float) -> tuple[NDArray, NDArray]:
    """Return the lowest and highest pixel (x, y) that count as near, shapes (2, 1)."""
    if wcs.array_shape is None:
        return np.full((2, 1), -np.inf), np.full((2, 1), np.inf)
    size = np.array(wcs.array_shape[::-1], float)[:, None]
    reach = margin * size.max()
    return -0.5 - reach, size - 0.5 + reach


def _inside(xy: NDArray, limits: tuple[NDArray, NDArray]) -> NDArray[np.bool_]:
    return np.all((xy >= limits[0]) & (xy <= limits[1]), axis=0)


def centre_pixel(wcs: WCS) -> tuple[float, float]:
    """Return the central pixel (x, y), or the reference pixel if the size is not known."""
    if wcs.array_shape is None:
        return wcs.wcs.crpix[0] - 1.0, wcs.wcs.crpix[1] - 1.0
    ny, nx = wcs.array_shape
    return (nx - 1) / 2.0, (ny - 1) / 2.0
