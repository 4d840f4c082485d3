"""`Rows`: a terminal table with reasons that fits its width: nothing in it is ever cut. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Cell = str | Text
_REASON = 36
"""The least width of a column of reasons, in characters."""


class Rows:
    """Rows of short cells, each with a reason or note of any length.

    On a wide terminal the reasons are the last column. On a narrower one they stand below the table, under the first
    cell of their row; on one that is too narrow for the other columns each row is a block of lines. Words are wrapped
    and never shortened. Square brackets are text, not markup.

    Args:
        columns: headers of the short cells.
        reason: header of the reasons.
        title: printed above.
    """

    def __init__(self, *columns: str, reason: str = "", title: str = "") -> None:
        self.columns, self.reason, self.title = columns, reason, title
        self.rows: list[tuple[list[Text], str]] = []

    def add(self, *cells: Cell, reason: str = "") -> None:
        """Add a row: a cell per column, and its reason (lines are kept)."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(([cell if isinstance(cell, Text) else Text(cell) for cell in cells], reason))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if self.title:
            yield Text(self.title, style="bold")
        width, count = options.max_width, len(self.columns)
        borders = 3 * count + 1
        longest = max((len(line) for _, reason in self.rows for line in reason.split("\n")), default=0)
        whole, words = sum(map(self._whole, range(count))), sum(map(self._word, range(count)))
        left = width - borders - whole - 3
        if longest and left >= min(longest, _REASON):
            yield self._table(whole, min(longest, left))
        elif words + borders <= width:
            yield self._table(width - borders)
            if longest:
                yield Text(f"{self.reason}:")
            for cells, reason in self.rows:
                if reason:
                    yield Text(f"{self.columns[0]} {cells[0].plain}", style="bold")
                    yield from _listed(reason)
        else:
            for cells, reason in self.rows:
                yield Text(f"{self.columns[0]} {cells[0].plain}", style="bold")
                named = zip(self.columns[1:], cells[1:], strict=True)
                text = Text(", ").join(Text(f"{name} ") + cell for name, cell in named if cell.plain)
                yield Padding(text, (0, 0, 0, 2), expand=False)
                yield from _listed(reason)

    def _table(self, width: int, reasons: int = 0) -> Table:
        """The cells in this width, and the reasons (0: none) in that, borders aside."""
        widths = [self._whole(at) for at in range(len(self.columns))]
        while sum(widths) > width:
            _, at = max((size, at) for at, size in enumerate(widths) if size > self._word(at))
            widths[at] -= 1
        table = Table()
        for name, size in zip(self.columns, widths, strict=True):
            table.add_column(Text(name), width=size, overflow="fold")
        if reasons:
            table.add_column(Text(self.reason), width=reasons, overflow="fold")
        for cells, reason in self.rows:
            table.add_row(*cells, *([Text(reason)] if reasons else []))
        return table

    def _texts(self, at: int) -> Sequence[str]:
        return [self.columns[at], *(cells[at].plain for cells, _ in self.rows)]

    def _whole(self, at: int) -> int:
        """The width of a column whose cells are not wrapped; its header may be."""
        return max(self._word(at), *(len(line) for text in self._texts(at)[1:] for line in text.split("\n")), 0)

    def _word(self, at: int) -> int:
        """The width of a column that is wrapped between words."""
        return max((len(word) for text in self._texts(at) for word in text.split()), default=0)


def _listed(text: str) -> Iterator[RenderableType]:
    """Lines as a list; those that start with spaces belong to the one before."""
    for line in text.split("\n") if text else ():
        grid = Table.grid()
        indent = len(line) - len(line.lstrip())
        grid.add_row("    " if indent else "  - ", Text(line.strip(), overflow="fold"))
        yield grid
