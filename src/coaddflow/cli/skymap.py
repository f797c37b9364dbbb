"""Find the tract and patch of a position on the sky map of the settings."""

import argparse
import json

from coaddflow.cli.arguments import add_config, add_json, add_position, read_settings
from coaddflow.errors import InputError

HELP = "tract and patch of a position"

EXAMPLE = """\
examples:
  coaddflow skymap find 150.2479 2.2314
  coaddflow skymap find 10:00:59.5 -02:13:53 --json
  coaddflow skymap fit                           the tangent tract of all exposures, as YAML

exit codes: 0 found, 1 the position is off the sky map, 2 wrong usage or unusable settings
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="find|fit", required=True)
    find = commands.add_parser("find", help="tract and patch of a position", epilog=EXAMPLE)
    add_position(find)
    add_json(find)
    fit = commands.add_parser(
        "fit", help="the tract that holds all exposures, as YAML for the settings", epilog=EXAMPLE
    )
    for command, run in ((find, run_find), (fit, run_fit)):
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        add_config(command)
        command.set_defaults(run=run)


def run_find(arguments: argparse.Namespace) -> int:
    from coaddflow.skymap.maps import make_skymap

    skymap = make_skymap(_complete(arguments.config))
    number = int(skymap.find_tract(arguments.ra, arguments.dec))
    if number < 0:
        print("{}" if arguments.json else "off the sky map")
        return 1
    tract = skymap.tract(number)
    patch = tract.find_patch(arguments.ra, arguments.dec)
    x, y = tract.sky_to_pixel(arguments.ra, arguments.dec)
    found = {"tract": number, "patch": patch, "x": round(float(x), 3), "y": round(float(y), 3)}
    if arguments.json:
        print(json.dumps(found))
    else:
        print(f"tract {number} patch {patch}  (pixel {found['x']}, {found['y']} of the tract)")
    return 0


def run_fit(arguments: argparse.Namespace) -> int:
    import yaml

    kind = read_settings(arguments.config).skymap.kind
    if kind != "tangent":
        raise InputError(
            f"there is nothing to fit with skymap.kind: {kind}",
            path=arguments.config,
            remedy="set `skymap: {kind: tangent}` for one tract around all exposures",
        )
    settings = _complete(arguments.config)
    content = settings.model_dump(mode="json", exclude={"rings", "tangent"} - {settings.kind})
    print(yaml.safe_dump({"skymap": content}, sort_keys=False), end="")
    return 0


def _complete(config: str):
    """Return the sky map's settings with nothing left to be fitted."""
    settings = read_settings(config)
    skymap, tangent = settings.skymap, settings.skymap.tangent
    if skymap.kind == "tangent" and (tangent.ra is None or tangent.width is None):
        from coaddflow.workflow.plan import make_plan

        return make_plan(settings).skymap
    if skymap.pixel_scale is None and settings.camera is not None:
        from coaddflow.instrument.camera import load_camera

        scale = load_camera(settings.camera).pixel_scale
        return skymap.model_copy(update={"pixel_scale": scale})
    return skymap
