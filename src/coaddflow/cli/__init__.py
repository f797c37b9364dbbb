"""The command line, with one module for each command.

The module's docstring is the description that ``--help`` shows; HELP is a line about it, EXAMPLE
follows the options. ``add_arguments`` adds them to a parser, ``run`` runs the command and returns
the exit code. What a command needs is imported when it runs.

Exit codes, the same for all commands:

====  =====================================================================
0     done, or: yes
1     the answer is no: nothing found there, or some CCDs failed
2     wrong usage, or unusable input; one line on stderr says what and where
3     not complete: something is still missing
130   interrupted
====  =====================================================================
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from coaddflow import __version__
from coaddflow.cli import (
    cameras,
    check_config,
    compile,
    corners,
    crosstalk,
    ingest,
    plan,
    ptc,
    settings,
    simulate,
    skymap,
    status,
    verify,
)
from coaddflow.errors import CoaddflowError

DONE, NO, WRONG, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130

COMMANDS: dict[str, ModuleType] = {
    "ingest": ingest,
    "check-config": check_config,
    "plan": plan,
    "status": status,
    "verify": verify,
    "corners": corners,
    "skymap": skymap,
    "crosstalk": crosstalk,
    "ptc": ptc,
    "simulate": simulate,
    "settings": settings,
    "cameras": cameras,
    "compile": compile,
}

_EPILOG = """\
exit codes: 0 done (yes), 1 the answer is no (nothing there, or some CCDs failed), 2 wrong usage
or unusable input, 3 not complete. The pipeline itself runs with snakemake; see README.md.

example:
  coaddflow ingest --config config.yaml raw/ && snakemake --cores all && coaddflow status
"""

_NEGATIVE_ANGLE = re.compile(r"-[\d.][\d.:hdmseE°'\" +-]*")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all errors of coaddflow."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[2]
        sys.stderr.write(f"coaddflow: error: {message} (see coaddflow {command} --help)\n")
        raise SystemExit(WRONG)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="coaddflow",
        description="Raw exposures of mosaic cameras to calibrated images and deep coadds.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"coaddflow {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            epilog=module.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command given by arguments (default: those of the process) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # a declination of -02:13:53 is not an option: with a leading space argparse sees a value
    given = [f" {text}" if _NEGATIVE_ANGLE.fullmatch(text) else text for text in given]
    try:
        parsed = make_parser().parse_args(given)
        code = parsed.run(parsed)
        sys.stdout.flush()
        return code
    except CoaddflowError as error:
        sys.stderr.write(f"coaddflow: error: {' '.join(str(error).split())}\n")
        return WRONG
    except BrokenPipeError:
        # the reader, as in `coaddflow ... | head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        sys.stderr.write("coaddflow: interrupted\n")
        return INTERRUPTED
