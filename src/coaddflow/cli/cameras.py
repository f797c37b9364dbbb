"""List the cameras that come with coaddflow, or check your own camera file."""

import argparse

HELP = "list the shipped cameras, or check a camera file"

EXAMPLE = """\
examples:
  coaddflow cameras
  coaddflow cameras my_camera.yaml

exit codes: 0 good, 2 there is no such camera, or its file is not usable
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "camera", metavar="CAMERA", nargs="?", help="name of a camera, or a camera file"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from coaddflow.instrument.camera import load_camera, shipped_cameras

    for name in [arguments.camera] if arguments.camera else shipped_cameras():
        camera = load_camera(name)
        print(f"{camera.name:<18} {len(camera.detectors):>3} CCDs  {camera.description}")
    return 0
