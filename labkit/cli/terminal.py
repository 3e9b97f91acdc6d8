"""The console, and the look of tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.console import Console
    from rich.table import Table

WIDTH_WITHOUT_TERMINAL = 120


def console() -> Console:
    """The terminal, or a plain page of fixed width if the output is redirected."""
    from rich.console import Console

    class LabConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich's own method exits with code 1; `exit_code` treats it as the end

    return LabConsole() if sys.stdout.isatty() else LabConsole(width=WIDTH_WITHOUT_TERMINAL)


def make_table(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = ()
) -> Table:
    """A table of text: the first column and ``text_columns`` to the left, the others to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from labkit.results.tables import ARTICLE_ROW

    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, header in enumerate(headers):
        text = index == 0 or index in text_columns
        table.add_column(header, justify="left" if text else "right", no_wrap=index == 0, overflow="fold")
    for row in rows:
        style = "italic dim" if row[0] == ARTICLE_ROW else ""
        table.add_row(*(Text(cell) for cell in row), style=style)
    return table


def write_chart(path: Path, chart: Figure) -> None:
    """Write a plotly chart as a page that opens offline."""
    from labkit.common.files import atomic_path

    with atomic_path(path) as temporary:
        chart.write_html(temporary, include_plotlyjs=True)


def print_files(screen: Console, *paths: Path) -> None:
    """Print each path on its own unwrapped line, for copying."""
    screen.print("\n".join(map(str, paths)), highlight=False, soft_wrap=True)
