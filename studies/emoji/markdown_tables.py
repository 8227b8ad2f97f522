"""Markdown tables, and filling them into documents, so that no number is typed."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from imprompt.files import atomic_write


def fill_sections(page: Path, sections: Mapping[str, str]) -> None:
    """Replace the text between `<!-- name -->` and `<!-- /name -->` by each section.

    Raises ValueError if a page lacks these comments.
    """
    text = page.read_text()
    for name, section in sections.items():
        pattern = f"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(
            pattern, lambda m, s=section: f"{m[1]}{s}\n{m[2]}", text, flags=re.DOTALL
        )
        if not found:
            raise ValueError(f"{page} has no comments <!-- {name} --> and <!-- /{name} -->")
    with atomic_write(page) as temporary:
        temporary.write_text(text)


def number_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Write numbers under the names of the first row's values, as a Markdown table."""
    columns = next(iter(rows.values()))
    return markdown_table(
        columns,
        {
            name: [f"{value:.1f}" if abs(value) >= 2 else f"{value:.2f}" for value in row.values()]
            for name, row in rows.items()
        },
    )


def markdown_table(columns: Iterable[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Write a table in Markdown, its first column being the rows' names."""
    names = [*columns]
    body = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join([f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", *body])
