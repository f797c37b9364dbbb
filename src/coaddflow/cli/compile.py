"""Compile all functions ahead, so that no job of a run waits for it.

What is compiled is kept for this version and this kind of processor: on a cluster, run it on a node
of each kind. Without it the first jobs of a run compile what they call.
"""

import argparse

HELP = "compile all functions ahead, so that no job waits for it"

EXAMPLE = """\
examples:
  coaddflow compile
  XDG_CACHE_HOME=/scratch/me coaddflow compile

exit codes: 0 done, 1 nothing is kept: no folder can be written to
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import logging

    from coaddflow import compiled
    from coaddflow.rehearsal import rehearse

    logging.getLogger("coaddflow").setLevel(logging.WARNING)
    folder = compiled.cache_folder()
    rehearse()
    compiled.note_that_all_is_compiled()
    new = sum(sum(function.stats.cache_misses.values()) for function in compiled.FUNCTIONS)
    if folder is None:
        print("nothing is kept: no folder can be written to (see XDG_CACHE_HOME)")
        return 1
    print(f"{new} functions compiled; all are in {folder}")
    return 0
