"""Results as people and programs read them: one `Table` for terminal, Markdown, LaTeX and HTML, one form of JSON.

A result holds plain units: fractions, seconds, bytes. A column says in which unit it is shown; only then is a fraction
made percent, a second a millisecond.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

__all__ = ["Cell", "Table", "TableColumn", "json_text", "plain", "result_json"]

Cell = str | float | None

_FACTORS = {"%": 100.0, "ms": 1e3, "us": 1e6, "kB": 1e-3, "MB": 1e-6, "GB": 1e-9, "GFLOP/s": 1e-9}
"""What a value is multiplied by to be shown in a unit; values are fractions, seconds, bytes, operations a second."""

# A row is one line in every form: a break inside a cell would end a Markdown row, and split a line that grep reads.
_BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")


@dataclass(frozen=True)
class TableColumn:
    """One column: its head, and how its values are shown.

    Attributes:
        head: what stands above it; the unit is added.
        unit: one of ``%``, ``ms``, ``us``, ``kB``, ``MB``, ``GB``, ``GFLOP/s``, which values are converted to from
            fractions, seconds, bytes and operations a second; any other is printed only.
        form: format of a number, such as ``.2f``.
        left: text, aligned to the left; numbers stand to the right.
        unit_shown: whether the unit stands in the head; not where the note or the title says it for all columns.
    """

    head: str
    unit: str = ""
    form: str = ""
    left: bool = False
    unit_shown: bool = True

    @property
    def title(self) -> str:
        """Head and unit."""
        return f"{self.head} {self.unit}".strip() if self.unit_shown else self.head

    def show(self, value: Cell) -> str:
        """Show a value as one line: ``-`` for None and NaN, a text as it is but for line breaks and tabs."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        if isinstance(value, str):
            return _BREAKS.sub(" ", value)
        factor = _FACTORS.get(self.unit)
        return format(value if factor is None else factor * value, self.form)


@dataclass(frozen=True)
class Table:
    """Rows of values under columns, and the ways to print them.

    >>> columns = (TableColumn("method", left=True), TableColumn("PCK", "%", ".1f"))
    >>> table = Table(columns, (("dift", 0.517), ("none", None)))
    >>> print("\\n".join(table.text()))
    method  PCK %
    dift     51.7
    none        -
    >>> print(table.markdown())
    | method | PCK % |
    |---|---:|
    | dift | 51.7 |
    | none | - |
    <BLANKLINE>

    Attributes:
        columns: their heads, units and formats.
        rows: a value a column: a number in plain units, a text that stands as it is, or None.
        title: what the table shows.
        note: the conditions and conventions that a reader needs.
        bold: (row, column) of the cells that win.
        quoted: rows that are not our own figures but somebody's published ones.
    """

    columns: tuple[TableColumn, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    note: str = ""
    bold: frozenset[tuple[int, int]] = frozenset()
    quoted: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls,
        heads: Sequence[str],
        rows: Iterable[Sequence[Cell]],
        title: str = "",
        note: str = "",
        *,
        left: Collection[int] = (0,),
    ) -> Table:
        """Make a table of numbers and ready texts; columns of these numbers stand to the left, others to the right."""
        columns = tuple(TableColumn(head, left=k in left) for k, head in enumerate(heads))
        return cls(columns, tuple(tuple(row) for row in rows), title, note)

    def cells(self) -> list[list[str]]:
        """Every row as texts, in the columns' units and formats."""
        return [[c.show(value) for c, value in zip(self.columns, row, strict=True)] for row in self.rows]

    def text(self, *, heads: bool = True) -> list[str]:
        """Lines for a terminal, the title first; however wide, so that each row stays one line in a pipe too."""
        from rich.console import Console
        from rich.table import Table as Grid
        from rich.text import Text

        grid = Grid(box=None, show_header=heads, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
        for column in self.columns:
            # Text rather than str: rich would take [brackets] for markup.
            grid.add_column(Text(column.title), justify="left" if column.left else "right", no_wrap=True)
        for row in self.cells():
            grid.add_row(*map(Text, row))
        out = io.StringIO()
        Console(file=out, width=100_000, color_system=None).print(grid)
        lines = [line.rstrip() for line in out.getvalue().splitlines()]
        return [self.title, *lines] if self.title else lines

    def markdown(self) -> str:
        """Format as a Markdown table: under a heading if it has a title, the best cells bold, the note below."""
        cells = self._marked(_markdown_text, lambda text: f"**{text}**", lambda text: text)
        lines = [f"### {self.title}", ""] if self.title else []
        lines.append("| " + " | ".join(_markdown_text(column.title) for column in self.columns) + " |")
        lines.append("|" + "|".join("---" if column.left else "---:" for column in self.columns) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in cells]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])

    def latex(self) -> str:
        """Format as a LaTeX table across both columns, for booktabs: best cells bold, quoted rows in italics."""
        cells = self._marked(_latex_text, lambda text: f"\\textbf{{{text}}}", lambda text: f"\\textit{{{text}}}")
        lines = [
            "\\begin{table*}",
            "\\centering\\scriptsize\\setlength{\\tabcolsep}{2.5pt}",
            f"\\caption{{{_latex_text(' '.join(part for part in (self.title, self.note) if part))}}}",
            "\\begin{tabular}{" + "".join("l" if column.left else "r" for column in self.columns) + "}",
            "\\toprule",
            " & ".join(_latex_text(column.title) for column in self.columns) + " \\\\",
            "\\midrule",
            *(" & ".join(row) + " \\\\" for row in cells),
        ]
        return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table*}", ""])

    def html(self) -> str:
        """Format as an HTML table under a heading; quoted rows are of class ``published``."""
        cells = self._marked(html.escape, lambda text: f"<b>{text}</b>", lambda text: text)
        heads = "".join(f"<th>{html.escape(column.title)}</th>" for column in self.columns)
        rows = []
        for number, row in enumerate(cells):
            kind = ' class="published"' if number in self.quoted else ""
            rows.append(f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
        title = f"<h3>{html.escape(self.title)}</h3>" if self.title else ""
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        body = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        return f'{title}<div class="wide">{body}</div>{note}'

    def to_json(self) -> list[dict[str, Any]]:
        """Give the rows as objects by head, values in plain units."""
        heads = [column.head for column in self.columns]
        return [dict(zip(heads, plain(row), strict=True)) for row in self.rows]

    def with_best(self, columns: Sequence[int]) -> Table:
        """Make the best of each of these columns bold: the largest as printed, where our own rows differ."""
        ours = [k for k in range(len(self.rows)) if k not in self.quoted]
        bold = set()
        for j in columns:
            shown = {k: round(100 * v, 2) for k in ours if isinstance(v := self.rows[k][j], int | float)}
            if len(set(shown.values())) > 1:
                bold |= {(k, j) for k, value in shown.items() if value == max(shown.values())}
        return replace(self, bold=frozenset(bold))

    def _marked(
        self, safe: Callable[[str], str], strong: Callable[[str], str], slanted: Callable[[str], str]
    ) -> list[list[str]]:
        """Every row as texts that are escaped, emphasised where they win, slanted where a row's name is quoted."""
        rows = []
        for k, row in enumerate(self.cells()):
            texts = [strong(safe(text)) if (k, j) in self.bold else safe(text) for j, text in enumerate(row)]
            rows.append([slanted(texts[0]), *texts[1:]] if k in self.quoted else texts)
        return rows


# An underscore inside a word stands for itself in Markdown; at a word's edge it would begin emphasis.
_MARKDOWN = re.compile(r"[\\|*`<]|(?<!\w)_|_(?!\w)")


def _markdown_text(text: str) -> str:
    return _MARKDOWN.sub(r"\\\g<0>", text)


_TEX = {
    "\u2020": "\\dag{}",
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    "\u00b1": "$\\pm$",
}


def _latex_text(text: str) -> str:
    return "".join(_TEX.get(one, f"\\{one}" if one in "&%$#_{}" else one) for one in text)


def plain(value: Any) -> Any:
    """Make data ready for strict JSON: dataclasses as objects, arrays as lists, numbers that are not finite as None."""
    if hasattr(value, "tolist"):  # an array, or a number of numpy's
        value = value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def result_json(schema: str, result: Any, **more: Any) -> dict[str, Any]:
    """Give a result as one JSON object: its schema's name and version first, then its fields and what else is given."""
    return {"schema": schema, **plain(result), **plain(more)}


def json_text(data: Any) -> str:
    """JSON as files and ``--json`` print it: indented by 1, strict, with a line's end."""
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
