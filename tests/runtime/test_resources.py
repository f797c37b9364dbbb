"""What is asked for lies between what was measured and twice as much."""

import pytest

from coaddflow.runtime import resources

SMALL, TELESCOPE, LARGE = 320 * 320, 650 * 500, 2048 * 4096
"""Pixels of a CCD of the mini camera, of a small telescope, and of a large camera."""


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        (resources.ccd_memory(SMALL), 254),
        (resources.ccd_memory(TELESCOPE), 299),
        (resources.ccd_memory(LARGE), 799),
        # the first job of all compiles the kernels, and has a part of the Snakemakes' memory
        (resources.ccd_memory(SMALL) + 75, 386),
        (resources.calib_memory(SMALL, 3, 1.0), 374),
        (resources.calib_memory(TELESCOPE, 12, 1.0), 288),
        (resources.calib_memory(LARGE, 3, 1.0), 572),
        (resources.calib_memory(LARGE, 5, 1.0), 835),
        (resources.defects_memory(SMALL), 262),
        (resources.defects_memory(LARGE), 609),
        (resources.warp_memory(SMALL, 380 * 380, 4), 312),
        (resources.coadd_memory(380 * 380, 6, 512), 313),
        (resources.coadd_memory(935 * 579, 12, 512), 352),
        (resources.depth_memory(380 * 380), 220),
    ],
)
def test_memory_of_a_step_that_has_been_measured(asked, used):
    assert used <= asked <= 2 * used


@pytest.mark.parametrize(
    ("rotation", "room"),
    [(0.0, 1.0), (90.0, 1.0), (-180.0, 1.0), (45.0, 2.25), (None, resources.SPOOL_ROOM)],
)
def test_a_turned_ccd_needs_a_larger_box(rotation, room):
    assert resources.box_room(1000, 2000, rotation) == pytest.approx(room)
    assert resources.box_room(2000, 1000, rotation) == pytest.approx(room)


def test_no_warp_is_larger_than_its_tract():
    assert resources.spool_memory([5e6] * 10, 1_000_000, 4096) == 130
    assert resources.spool_memory([5e5] * 10, 1_000_000, 4096) == 65
    assert resources.spool_memory([5e5] * 10, 1_000_000, 50) == 50
    assert resources.warped_ccd_memory(LARGE, SMALL) < resources.warped_ccd_memory(LARGE)
