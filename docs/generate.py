"""Hook of mkdocs: fill in the pages that are made from the code."""

from __future__ import annotations


def on_page_markdown(markdown: str, **options: object) -> str:
    return markdown
