# SPDX-License-Identifier: Apache-2.0
"""A table as data: a list of columns, and the records that become its rows.

Table(
about="TB/s of the bytes that must be moved; torch's time over ours.",
columns=(
*keys("shape", "op"),
Column("TB/s", at("tbs"), ".2f"),
Column("torch", ratio("torch"), spread),
),
)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
Take = Callable[[Record], Any]


@dataclass(frozen=True)
class Column:
    """A column takes one value from each record and formats it.

    Attributes:
        heading: what stands above the column.
        take: a key that every record has, or a function of the record.
        show: a format, or a function of the value. It is not asked about None, which is shown as
            "-", or about text, which is shown as it is.
    """

    heading: str
    take: str | Take
    show: str | Callable[[Any], str] = ""

    def cell(self, record: Record) -> str:
        value = record[self.take] if isinstance(self.take, str) else self.take(record)
        if value is None:
            return "-"
        if isinstance(value, str):
            return value
        return format(value, self.show) if isinstance(self.show, str) else self.show(value)


@dataclass(frozen=True)
class Table:
    """A table is its columns, the paragraph above it, and the choice of its rows.

    Attributes:
        columns: the columns, or a function of the cases where the headings depend on them.
        about: the paragraph above the table.
        rows: makes the records of the rows from the cases. Without it each case is a row.
        skip_empty: leave the table and its paragraph out where it has no rows.
    """

    columns: Sequence[Column] | Callable[[list[Record]], Sequence[Column]]
    about: str = ""
    rows: Callable[[list[Record]], Iterable[Record]] | None = None
    skip_empty: bool = False


def markdown(table: Table, cases: list[Record]) -> Iterator[str]:
    """Yield the lines of a table: its paragraph, its headings and a line for each row."""
    records = list(cases if table.rows is None else table.rows(cases))
    if table.skip_empty and not records:
        return
    columns = table.columns(cases) if callable(table.columns) else table.columns
    if table.about:
        yield f"{table.about}\n"
    yield _line(column.heading for column in columns)
    yield "|" + " --- |" * len(columns)
    for record in records:
        yield _line(column.cell(record) for column in columns)
    yield ""


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# Columns and takers.


def keys(*names: str) -> tuple[Column, ...]:
    """Return a column for each key, headed by the key itself."""
    return tuple(Column(name, name) for name in names)


def at(*path: str) -> Take:
    """Take the value at the end of a path of keys, or None where a key is missing."""

    def take(record: Record) -> Any:
        value: Any = record
        for key in path:
            if value is None:
                return None
            value = value.get(key)
        return value

    return take


def median(*path: str) -> Take:
    """Take the second of the three quartiles at the end of a path, or None."""
    quartiles = at(*path)

    def take(record: Record) -> Any:
        found = quartiles(record)
        return None if found is None else found[1]

    return take


def ratio(name: str, of_all: bool = True) -> Take:
    """Take a ratio's quartiles; "wrong" where the case has none because a result was wrong.

    Args:
        name: the ratio.
        of_all: every case of the benchmark has this ratio. If False, only a case whose errors name
            it was compared, and the others get None.
    """

    def take(case: Record) -> Any:
        quartiles = case["ratio"].get(name)
        compared = of_all or name in case["errors"]
        return "wrong" if quartiles is None and compared and case.get("wrong") else quartiles

    return take


# Formats.


def spread(quartiles: Sequence[float]) -> str:
    """Format quartiles as the median and the range from the lower to the upper."""
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def microseconds(milliseconds: float) -> str:
    return f"{milliseconds * 1000:.1f}"


def share_above_one(value: float) -> str:
    """Format how much a ratio exceeds one, in percent."""
    return f"{value - 1:.0%}"
