"""What the sky of the focal plane leaves of a galaxy that is larger than a CCD's superpixels.

    python benchmarks/sky_correction.py --picture sky-correction.jpg

Draws four CCDs with stars, an exponential galaxy fainter than the sky, a gradient, and CCDs that
respond differently (1 %); subtracts the sky of each CCD, and that of the focal plane; prints what
is left of the light of the galaxy in rings and how far CCDs are from the true sky. The picture
shows the focal plane before, with the sky of each CCD subtracted, and with that of the focal plane.
"""

import argparse
from time import process_time

import numpy as np
from PIL import Image

from coaddflow.coadd.picture import bin_patch
from coaddflow.exposure.sky import fit_focal_plane_sky
from coaddflow.image.masked_image import MaskedImage
from coaddflow.instrument.camera import Camera, load_camera
from coaddflow.measure.background import Background, estimate_background
from coaddflow.settings.background import BackgroundSettings
from coaddflow.settings.sky_correction import SkyCorrectionSettings

SIZE, GAP, SIDE = 1536, 40, 2
SKY, NOISE = 400.0, 20.0
FWHM = 4.0
BIN = 8
RINGS = ((0.0, 1.5), (1.5, 3.0))


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--radius", type=float, default=128.0, help="half-light radius, pixels")
    parser.add_argument("--peak", type=float, default=0.8, help="central brightness over the sky")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random numbers")
    parser.add_argument("--picture", help="JPEG file to write")
    arguments = parser.parse_args()
    camera, rng = mosaic(), np.random.default_rng(arguments.seed)
    ccds = [expose(camera, d.id, arguments.radius, arguments.peak, rng) for d in camera.detectors]
    own = [estimate_background(image, BackgroundSettings()) for image, *_ in ccds]
    start = process_time()
    sky = fit_focal_plane_sky(dict(enumerate(own)), camera, SkyCorrectionSettings())
    print(f"fit of the focal plane: {process_time() - start:.2f} CPU s")
    focal = [sky.of_ccd(camera, d, own[d.id]) for d in camera.detectors]
    for name, models in (("CCD", own), ("focal plane", focal)):
        report(name, ccds, models)
    if arguments.picture:
        level = Background((SIZE, SIZE), *(np.full((1, 1), v) for v in (SKY, NOISE**2, 1)))
        panels = [panel(camera, ccds, models) for models in ([level] * len(ccds), own, focal)]
        edge = np.full((len(panels[0]), 12), 255, np.uint8)
        joined = [panels[0], edge, panels[1], edge, panels[2]]
        Image.fromarray(np.hstack(joined)).save(arguments.picture, quality=85)


def mosaic() -> Camera:
    """Return a camera of 2 x 2 CCDs."""
    demo = load_camera("demo")
    box = {"data": (0, 0, SIZE, SIZE), "target": (0, 0, SIZE, SIZE)}
    amplifier = demo.detectors[0].amplifiers[0].model_copy(update=box)
    step, middle = (SIZE + GAP) * demo.pixel_size, (SIDE - 1) / 2
    shared = {"size": (SIZE, SIZE), "amplifiers": (amplifier,), "rotation": 0.0}
    detectors = tuple(
        demo.detectors[0].model_copy(
            update={
                "id": number,
                "center": ((number % SIDE - middle) * step, (number // SIDE - middle) * step),
                **shared,
            }
        )
        for number in range(SIDE**2)
    )
    return demo.model_copy(update={"detectors": detectors})


def expose(camera: Camera, ccd: int, radius: float, peak: float, rng: np.random.Generator) -> tuple:
    """Return image, true sky, light of the galaxy and radii (in its half-light radius) of a CCD."""
    y, x = np.indices((SIZE, SIZE))
    x_mm, y_mm = camera.pixel_to_focal(camera.detector(ccd), x, y)
    # a third of the way from the middle of the last CCD to the middle of the camera
    centre = 0.33 * SIZE * camera.pixel_size
    distance = np.hypot(x_mm - centre, y_mm - centre) / camera.pixel_size / radius
    disc = peak * SKY * np.exp(-1.678 * distance)
    sky = SKY * (1.0 + 0.004 * x_mm - 0.002 * y_mm + 1e-4 * x_mm * y_mm)
    sky *= 1.0 + rng.normal(0.0, 0.01)
    stars = np.zeros((SIZE, SIZE))
    for _ in range(200):
        add_star(stars, *rng.uniform(0, SIZE - 1, 2), np.exp(rng.uniform(5, 11)))
    variance = sky + disc + stars
    image = rng.normal(variance, np.sqrt(variance))
    planes = MaskedImage(image, variance, np.zeros((SIZE, SIZE), dtype=np.int32))
    return planes, sky, disc, distance


def add_star(image: np.ndarray, x: float, y: float, flux: float, half: int = 40) -> None:
    """Add a star with a Moffat profile."""
    x0, x1 = max(0, int(x) - half), min(SIZE, int(x) + half)
    y0, y1 = max(0, int(y) - half), min(SIZE, int(y) + half)
    yy, xx = np.mgrid[y0:y1, x0:x1]
    alpha = FWHM / 2.0 / np.sqrt(2.0 ** (1 / 3.5) - 1.0)
    profile = (1.0 + ((xx - x) ** 2 + (yy - y) ** 2) / alpha**2) ** -3.5
    image[y0:y1, x0:x1] += flux * 2.5 / np.pi / alpha**2 * profile


def report(name: str, ccds: list[tuple], skies: list[Background]) -> None:
    """Print what a sky leaves of the galaxy, and its distance from the true sky."""
    kept = []
    for inner, outer in RINGS:
        found = true = 0.0
        for (_, sky, disc, distance), model in zip(ccds, skies, strict=True):
            ring = (distance > inner) & (distance < outer)
            found += float((disc + sky - model.model())[ring].sum())
            true += float(disc[ring].sum())
        kept.append(f"{inner:g}-{outer:g} r_half {100 * found / true:.1f} %")
    steps = [(model.model() - c[1]).mean() / NOISE for c, model in zip(ccds, skies, strict=True)]
    print(
        f"sky of the {name}: flux in {', '.join(kept)}; mean error of CCDs / noise of a pixel: "
        f"{', '.join(f'{step:+.4f}' for step in steps)}"
    )


def panel(camera: Camera, ccds: list[tuple], skies: list[Background]) -> np.ndarray:
    """Return the focal plane after subtraction, binned, from 0.3 sigma below the sky to 1 above."""
    side = (SIDE * (SIZE + GAP)) // BIN
    canvas = np.full((side, side), 90, np.uint8)
    for ccd, ((image, *_), sky) in enumerate(zip(ccds, skies, strict=True)):
        sums, counts, _ = bin_patch(image.image - sky.model(), (0, 0), BIN)
        grey = np.clip((sums / counts / NOISE + 0.3) / 1.3, 0.0, 1.0) ** 0.6 * 255
        x0, y0 = (k * (SIZE + GAP) // BIN for k in (ccd % SIDE, ccd // SIDE))
        canvas[y0 : y0 + grey.shape[0], x0 : x0 + grey.shape[1]] = grey.astype(np.uint8)
    return canvas[::-1]


if __name__ == "__main__":
    main()
