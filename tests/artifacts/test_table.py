"""Tables in every form, against texts written by hand, and results as JSON."""

import json
from dataclasses import dataclass

import numpy as np

from difftap.artifacts.table import Table, TableColumn, json_text, plain, result_json

COLUMNS = (
    TableColumn("way", left=True),
    TableColumn("time", "ms", ".1f"),
    TableColumn("share", "%", ".2f"),
    TableColumn("peak", "MB", ",.0f"),
    TableColumn("calls"),
)
ROWS = (("ours [a|b]", 0.0123, 0.5, 1_234_000_000, 3), ("theirs_1", None, float("nan"), 5e5, 10))


def test_values_are_shown_in_the_units_of_their_columns():
    assert Table(COLUMNS, ROWS).cells() == [
        ["ours [a|b]", "12.3", "50.00", "1,234", "3"],
        ["theirs_1", "-", "-", "0", "10"],
    ]


def test_a_terminal_gets_aligned_lines_without_markup_and_without_wrapping():
    assert Table(COLUMNS, ROWS, "a title").text() == [
        "a title",
        "way         time ms  share %  peak MB  calls",
        "ours [a|b]     12.3    50.00    1,234      3",
        "theirs_1          -        -        0     10",
    ]
    assert Table.of(("", "x"), [("y" * 500, 1)]).text(heads=False) == ["y" * 500 + "  1"]


def test_markdown_escapes_and_marks_the_best():
    table = Table(COLUMNS[:1] + COLUMNS[2:3], (("a|b", 0.25), ("c", 0.5), ("d", 0.9)), quoted=frozenset({2}))
    assert table.with_best([1]).markdown() == (
        "| way | share % |\n|---|---:|\n| a\\|b | 25.00 |\n| c | **50.00** |\n| d | 90.00 |\n"
    )


def test_latex_escapes_marks_the_best_and_slants_the_quoted():
    table = Table(COLUMNS[:1] + COLUMNS[2:3], (("a_b", 0.25), ("c", 0.5), ("d", 0.9)), note="5 % of $", quoted={2})
    assert table.with_best([1]).latex().splitlines() == [
        "\\begin{table*}",
        "\\centering\\scriptsize\\setlength{\\tabcolsep}{2.5pt}",
        "\\caption{5 \\% of \\$}",
        "\\begin{tabular}{lr}",
        "\\toprule",
        "way & share \\% \\\\",
        "\\midrule",
        "a\\_b & 25.00 \\\\",
        "c & \\textbf{50.00} \\\\",
        "\\textit{d} & 90.00 \\\\",
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table*}",
    ]


def test_html_escapes_and_classes_the_quoted():
    table = Table.of(("", "x"), [("<a>", "1"), ("b", "2")], "t & u", "n")
    assert Table(table.columns, table.rows, "t & u", "n", quoted=frozenset({1})).html() == (
        '<h3>t &amp; u</h3><div class="wide"><table><thead><tr><th></th><th>x</th></tr></thead><tbody>'
        "<tr><td>&lt;a&gt;</td><td>1</td></tr>"
        '<tr class="published"><td>b</td><td>2</td></tr></tbody></table></div><p class="note">n</p>'
    )


def test_nothing_is_best_among_equals_or_alone():
    columns = COLUMNS[:1] + COLUMNS[2:3]
    assert not Table(columns, (("a", 0.5), ("b", 0.500001))).with_best([1]).bold
    assert not Table(columns, (("a", 0.5),)).with_best([1]).bold
    assert Table(columns, (("a", 0.5), ("b", 0.6), ("c", 0.6))).with_best([1]).bold == {(1, 1), (2, 1)}


def test_json_holds_plain_units_and_no_nan():
    assert Table(COLUMNS, ROWS).to_json()[1] == {
        "way": "theirs_1",
        "time": None,
        "share": None,
        "peak": 5e5,
        "calls": 10,
    }


@dataclass(frozen=True)
class Found:
    value: float
    parts: tuple[float, ...]


def test_a_result_becomes_strict_json():
    found = Found(float("inf"), (1.0, float("nan")))
    assert result_json("difftap.some/1", found, at=np.array([1.5, np.inf])) == {
        "schema": "difftap.some/1",
        "value": None,
        "parts": [1.0, None],
        "at": [1.5, None],
    }
    assert plain({1: np.float32(0.5), "n": np.int64(3), "t": True}) == {"1": 0.5, "n": 3, "t": True}
    assert json_text({"a": "é"}) == '{\n "a": "é"\n}\n'
    assert json.loads(json_text(plain(found))) == {"value": None, "parts": [1.0, None]}
