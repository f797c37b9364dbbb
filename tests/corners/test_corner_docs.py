"""The page about the corner database is that of its schema."""

from pathlib import Path

from coaddflow.corners.schema import schema_markdown

PAGE = Path(__file__).parents[2] / "docs/corners.md"


def test_the_page_of_the_corner_database_is_that_of_the_schema():
    """When this fails, write the page anew.

    ``python -c "from coaddflow.corners.schema import *; print(schema_markdown(), end='')"
    > docs/corners.md``
    """
    assert PAGE.read_text(encoding="utf-8") == schema_markdown()
