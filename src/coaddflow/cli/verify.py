"""Verify all products of a survey against their checksums, in parallel; goes on where it was.

Call it in the survey's folder. Calexps, warps and coadds are compared with the SHA-256 in manifests
and tables, or with DATASUM and CHECKSUM in their headers; tables, databases and pictures are read.
What was found good is not read again as long as its size and time are the same.
"""

import argparse
import json
import sys

from coaddflow.cli.arguments import add_config, add_json, add_workers, chosen_workers, read_settings

HELP = "verify all products against their checksums"

EXAMPLE = """\
examples:
  coaddflow verify
  coaddflow verify --config configs/hatp32.yaml --workers 8
  coaddflow verify --again                     also what was found good earlier

exit codes: 0 all products are good, 1 some are not, 2 wrong usage or unusable settings
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_workers(parser, "read files")
    parser.add_argument(
        "--again", action="store_true", help="also read what was found good earlier"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from coaddflow.workflow.plan import make_plan
    from coaddflow.workflow.verify import verify_survey

    workers = chosen_workers(arguments)
    plan = make_plan(read_settings(arguments.config))
    found = verify_survey(plan, workers, arguments.again, progress=_show if _is_watched() else None)
    if arguments.json:
        content = {
            "products": found.n_products,
            "unchanged": found.n_known,
            "bad": [
                {"path": b.product.path, "cause": b.cause, "remedy": b.remedy}
                | ({} if b.advice else {"remove": b.product.remove})
                for b in found.bad
            ],
        }
        print(json.dumps(content, indent=1))
    else:
        for bad in found.bad:
            print(f"{bad.product.path}: {bad.cause}\n  {bad.remedy}")
        earlier = f", {found.n_known} of them verified earlier" if found.n_known else ""
        if found.n_products:
            n_unread = sum(bool(bad.advice) for bad in found.bad)
            unread = f", {n_unread} not verified" if n_unread else ""
            n_damaged = len(found.bad) - n_unread
            print(f"{found.n_products} products{earlier}: {n_damaged} damaged{unread}")
        else:
            print("there is no product yet")
    return 1 if found.bad else 0


def _is_watched() -> bool:
    return sys.stderr.isatty()


def _show(done: int, total: int) -> None:
    sys.stderr.write(f"\r{done} of {total} files{'' if done < total else chr(10)}")
    sys.stderr.flush()
