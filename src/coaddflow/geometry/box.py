"""Boxes of pixels: (x0, y0, x1, y1), 0-based, with x1 and y1 not included."""

from collections.abc import Iterable

Box = tuple[int, int, int, int]
"""Half-open box (x0, y0, x1, y1): of tract pixels, of a CCD, or of a raw array."""


def common_box(*boxes: Box) -> Box | None:
    """Return the box of the pixels that all boxes have, or None."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    common = max(x0), max(y0), min(x1), min(y1)
    return common if common[0] < common[2] and common[1] < common[3] else None


def enclosing_box(boxes: Iterable[Box]) -> Box:
    """Return the smallest box that holds all boxes, of which there must be one."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def part_of(whole: Box, box: Box) -> tuple[slice, slice]:
    """Return rows and columns of a box in the pixels of a box around it."""
    rows = slice(box[1] - whole[1], box[3] - whole[1])
    return rows, slice(box[0] - whole[0], box[2] - whole[0])
