"""Functions that format text: numbers, times, line breaks, tables, and names with values."""

import datetime
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

# Characters of some scripts take two columns, so `len` does not give the width of a text.
from rich.cells import cell_len, set_cell_size

FACT_INDENT = 12  # The width of the names in the output of `facts`, in terminal columns.


def terminal_width(file: Any) -> int | None:
    """Returns the width of a file's terminal in columns; $COLUMNS overrides the width.

    Returns:
      The width. None if lines may have any length: `file` is None or not a terminal, and
      $COLUMNS is not set.
    """
    is_terminal = file is not None and file.isatty()
    return shutil.get_terminal_size().columns if is_terminal or "COLUMNS" in os.environ else None


def spreadsheet_cell(text: str) -> str:
    """Returns a CSV cell with a text; a spreadsheet program does not run the cell as a formula.

    A spreadsheet program runs a cell that starts with one of the characters =, +, -, @, tab and
    carriage return. An apostrophe in front of the text prevents this.
    """
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def percent(fraction: float, digits: int = 1) -> str:
    """Formats a fraction as a percentage, such as "96.1 %"."""
    return f"{100 * fraction:.{digits}f} %"


def points(difference: float, digits: int = 1) -> str:
    """Formats a difference of two fractions in percentage points, such as "2.3 points"."""
    return f"{100 * difference:.{digits}f} points"


def utc(seconds: float) -> str:
    """Formats seconds since the epoch as a time in UTC, such as "2026-11-27T16:20:05+00:00"."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def wrap(line: str, width: int | None, indent: int = 0) -> list[str]:
    """Breaks a line between words into parts that fit a width.

    Args:
      line: The line. Spaces within a part stay as they are.
      width: The width of the terminal, in columns; None for any width.
      indent: Spaces before each part except the first.

    Returns:
      Parts of at most `width` columns; a part with a single word may be wider.
    """
    if width is None or cell_len(line) <= width:
        return [line]
    parts, part = [], ""
    for word in re.findall(r"\s*\S+", line):
        if part.strip() and cell_len(part + word) > width:
            parts.append(part)
            part, word = " " * indent, word.lstrip()
        part += word
    return [*parts, part]


def fill(text: str, width: int | None) -> str:
    """Inserts line breaks between words; see `wrap`."""
    return "\n".join(wrap(text, width))


def shorten(text: str, width: int) -> str:
    """Shortens a text to at most `width` columns; a shortened text ends with "..."."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 3).rstrip() + "..."


def facts(rows: Mapping[str, str], width: int | None, indent: int = FACT_INDENT) -> list[str]:
    """Formats names and their descriptions as lines in two aligned columns.

    Args:
      rows: The text of each name; a text may have several lines.
      width: The width of the terminal, in columns; None for any width.
      indent: The width of the names, in columns.
    """
    lines = []
    for name, text in rows.items():
        for number, line in enumerate(text.splitlines() or [""]):
            label = "" if number else name
            lines += wrap(f"{label:<{indent}}{line}", width, indent)
    return lines


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str] | str],
    width: int | None,
    min_column: int = 0,
) -> str:
    """Returns a table with left-aligned names in the first column and right-aligned numbers.

    A name that leaves too little room for the numbers is written on a separate line.

    Args:
      head: The names of the columns.
      rows: For each row the cells, without line ends, or a text that spans all columns.
      width: The width of the terminal, in columns; None for any width.
      min_column: The minimum width of the columns with numbers, on a terminal that is wide enough.
    """
    cells = [head, *(row for row in rows if not isinstance(row, str))]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    wide = [widths[0], *(max(column, min_column) for column in widths[1:])]
    if width is None or sum(wide) + 2 * len(wide[1:]) <= width:
        widths = wide
    room = widths[0]
    if width is not None:
        room = min(room, max(width - sum(widths[1:]) - 2 * len(widths[1:]), 0))
    lines = []
    for row in (head, *rows):
        if isinstance(row, str):
            lines.append(fill(row, width))
            continue
        name, *numbers = row
        length = cell_len(name)
        if length > room:
            lines.append(fill(name, width))
            name, length = "", 0
        padded = (f"  {cell:>{size}}" for cell, size in zip(numbers, widths[1:], strict=True))
        lines.append(f"{name}{' ' * (room - length)}{''.join(padded)}".rstrip())
    return "\n".join(lines)
