"""Print all settings of a run with types, defaults and meanings."""

import argparse

HELP = "all settings with types, defaults and meanings"

EXAMPLE = """\
examples:
  coaddflow settings > docs/settings.md          Markdown
  coaddflow settings --yaml                      the defaults as a settings file
  coaddflow settings --schema > schema.json      JSON schema, for editors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="Markdown (default)")
    form.add_argument("--yaml", action="store_true", help="the defaults as YAML")
    form.add_argument("--schema", action="store_true", help="JSON schema")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from coaddflow.settings import document

    if arguments.schema:
        text = document.settings_schema()
    elif arguments.yaml:
        text = document.default_settings()
    else:
        text = document.settings_page()
    print(text, end="")
    return 0
