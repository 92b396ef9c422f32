"""Tables in every form, against texts written by hand, and results as JSON."""

import html
import json
import re
from dataclasses import dataclass

import numpy as np
import pytest

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


AWKWARD = (
    "pipe | here",
    "two\nlines\tand\r\na tab",
    "*bold* _slanted_ `code` <b>&amp;</b> [red]x[/red]",
    "\\back 5 % $ & # ~ ^ {a_b} \u00b1 \u2020",
    "\u5bbd\u5b57\u7b26 \uff21",
    "e\u0301 caf\u00e9",
)


def one_line(text):
    return " ".join(text.replace("\t", "\n").split("\n")).replace("\r ", " ")


def from_markdown(row):
    cells = re.split(r"(?<!\\)(?:\\\\)*\|", row)[1:-1]
    return [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells]


def from_latex(text):
    words = {"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "dag": "\u2020"}
    words |= {"textless": "<", "textgreater": ">", "textbar": "|"}
    text = text.replace("$\\pm$", "\u00b1")
    return re.sub(r"\\([a-z]+)\{\}|\\(.)", lambda found: words.get(found[1]) or found[2], text)


@pytest.mark.parametrize("text", AWKWARD)
def test_every_value_is_found_back_in_all_forms(text):
    table = Table((TableColumn("a", left=True), TableColumn("b", form=".2f")), ((text, 2.5), (text, float("nan"))))
    said = one_line(text)
    lines = table.text()
    assert len(lines) == 3
    assert [line[: len(said)] for line in lines[1:]] == [said, said]
    assert [line.split()[-1] for line in lines[1:]] == ["2.50", "-"]
    rows = table.markdown().splitlines()[2:]
    assert [from_markdown(row) for row in rows] == [[said, "2.50"], [said, "-"]]
    body = table.latex().split("\\midrule\n")[1].split("\n\\bottomrule")[0].splitlines()
    cells = [line.removesuffix(" \\\\").rsplit(" & ", 1) for line in body]
    assert [[from_latex(first), last] for first, last in cells] == [[said, "2.50"], [said, "-"]]
    assert json.loads(json_text(table.to_json())) == [{"a": text, "b": 2.5}, {"a": text, "b": None}]
    found = re.findall(r"<td>(.*?)</td>", table.html())
    assert [html.unescape(cell) for cell in found] == [said, "2.50", said, "-"]


def test_wide_characters_take_two_places_and_accents_none():
    rows = (("\u5bbd\u5b57", 1), ("abcd", 2), ("e\u0301abc", 3))
    assert Table.of(("", "n"), rows).text(heads=False) == ["\u5bbd\u5b57  1", "abcd  2", "e\u0301abc  3"]


def test_chosen_columns_stand_to_the_left():
    rows = (("a", 1, "x"), ("bb", 22, "yy"))
    assert Table.of(("k", "n", "t"), rows, left=(0, 2)).text() == ["k    n  t", "a    1  x", "bb  22  yy"]


def test_markup_of_each_form_is_escaped_by_hand():
    row = Table.of(("a_1",), [("_x_ a_1 *y* | \\",)])
    assert row.markdown().splitlines()[2] == "| \\_x\\_ a_1 \\*y\\* \\| \\\\ |"
    assert Table.of(("%",), [("a&b_c^~\\",)]).latex().splitlines()[4:8] == [
        "\\toprule",
        "\\% \\\\",
        "\\midrule",
        "a\\&b\\_c\\textasciicircum{}\\textasciitilde{}\\textbackslash{} \\\\",
    ]
