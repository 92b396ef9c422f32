"""Comparing two results: no difference where there is none, a real one found, the common pairs only."""

import copy
import itertools
import json

import numpy as np
import pytest

from difftap.bench.compare import compare, format_comparison, load_results, to_json
from difftap.bench.protocols import get_protocols
from difftap.bench.report import dump_results
from difftap.bench.scoring import Resampling, score
from difftap.errors import InputError
from tests.bench.pck_cases import prediction, predictions, random_pairs


def result(pairs, names=("dift",), draws=1000):
    return score(predictions(pairs), get_protocols(names), Resampling(draws=draws))


def shifted(pairs, pixels):
    """The same pairs, with every point found some pixels farther off."""
    return [
        prediction(
            p.target_points,
            p.target_points + (p.found - p.target_points) * pixels,
            size=p.target_size,
            box=p.target_box,
            index=p.index,
            category=p.category,
            visible=p.target_visible[len(p.target_points) :],
        )
        for p in pairs
    ]


@pytest.fixture(scope="module")
def pairs():
    return random_pairs(1, 80)


def test_identical_results_do_not_differ(pairs):
    made = compare(result(pairs), result(pairs), count=500)
    assert {row.p for row in made.rows} == {1.0}
    assert all(row.difference == row.low == row.high == 0 for row in made.rows)
    assert (made.pairs, made.only_first, made.only_second) == (80, 0, 0)
    assert made.points == sum(len(p.target_points) for p in pairs)
    assert made.notes == ()


def test_a_real_difference_is_found(pairs):
    made = compare(result(shifted(pairs, 3.0)), result(pairs), count=2000)
    for row in made.rows:
        assert row.difference == pytest.approx(row.second - row.first)
        assert row.low > 0
        assert row.p < 0.01
    back = compare(result(pairs), result(shifted(pairs, 3.0)), count=2000)
    assert [row.difference for row in back.rows] == [-row.difference for row in made.rows]


def test_p_is_not_small_by_chance_too_often():
    """Two runs with errors of one kind: p below 0.1 in about a tenth of the cases."""
    small = 0
    for seed in range(60):
        first, second = (
            result(
                [
                    prediction(
                        p.target_points,
                        p.target_points + np.random.default_rng([seed, side, p.index]).normal(0, 12, p.found.shape),
                        size=p.target_size,
                        box=p.target_box,
                        index=p.index,
                    )
                    for p in random_pairs(seed, 40)
                ],
                draws=2,
            )
            for side in (0, 1)
        )
        small += compare(first, second, count=300).rows[1].p < 0.1
    assert small <= 14


def test_values_agree_with_the_results(pairs):
    first, second = result(pairs), result(shifted(pairs, 0.5))
    rows = compare(first, second, by=("image", "point", "class-image"), count=50).rows
    assert len(rows) == 9
    for row in rows:
        for value, data in ((row.first, first), (row.second, second)):
            assert value == pytest.approx(data["protocols"]["dift"]["pck"][f"{row.alpha:g}"][row.by]["value"])


def test_only_common_pairs_have_a_say(pairs):
    first, second = result(pairs[:60]), result(shifted(pairs[20:], 2.0))
    made = compare(first, second, count=50)
    assert (made.pairs, made.only_first, made.only_second) == (40, 20, 20)
    alone = compare(result(pairs[20:60]), result(shifted(pairs[20:60], 2.0)), count=50)
    assert made.rows == alone.rows


def test_each_protocol_by_its_headline(pairs):
    both = result(pairs, ("dift", "distilldift"))
    rows = compare(both, both, count=10).rows
    assert {(row.protocol, row.by) for row in rows} == {("dift", "image"), ("distilldift", "point")}


def test_what_cannot_be_compared(pairs):
    first = result(pairs)
    with pytest.raises(InputError, match="no pair in common"):
        compare(first, result([prediction([[1, 1]], [[1, 1]], index=999)]))
    with pytest.raises(InputError, match="share no protocol"):
        compare(first, result(pairs, ("sd4match",)))
    fewer = copy.deepcopy(first)
    fewer["pairs"]["points"][3] += 1
    fewer["pairs"]["digests"][3] = "0"
    with pytest.raises(InputError, match="pair 'pair-3' is annotated differently"):
        compare(first, fewer)
    for key, what in (("name", "data sets, 'spair' and 'x'"), ("split", "splits, 'test' and 'x'")):
        other = copy.deepcopy(first)
        other["conditions"]["dataset"][key] = "x"
        with pytest.raises(InputError, match=what):
            compare(first, other)
    other = copy.deepcopy(first)
    other["protocols"]["dift"]["conditions"]["basis"] = "image"
    with pytest.raises(InputError, match="protocol 'dift' has basis = 'box' in one result and 'image' in the other"):
        compare(first, other)
    with pytest.raises(InputError, match="aggregate is 'mean'"):
        compare(first, first, by=("mean",))


def exchanged(first, second, by, alpha):
    """Slow: exchange each pair's outcomes in every way, and average anew by the definition."""
    hits = [np.array(one["pairs"]["hits"]["dift"][alpha], float) for one in (first, second)]
    points, classes = np.array(first["pairs"]["points"], float), np.array(first["pairs"]["classes"])

    def mean(h):
        if by == "image":
            return (h / points).mean()
        if by == "point":
            return h.sum() / points.sum()
        return np.mean([mean_of(h, classes == c) for c in sorted(set(classes))])

    def mean_of(h, inside):
        return (h[inside] / points[inside]).mean() if by == "class-image" else h[inside].sum() / points[inside].sum()

    seen, count = abs(mean(hits[1]) - mean(hits[0])), 0
    for ways in itertools.product([False, True], repeat=len(points)):
        one, two = np.where(ways, hits[1], hits[0]), np.where(ways, hits[0], hits[1])
        count += abs(mean(two) - mean(one)) >= seen - 1e-12
    return count / 2 ** len(points)


@pytest.mark.parametrize("by", ["image", "point", "class-image", "class-point"])
def test_few_pairs_get_the_exact_test(by):
    pairs = random_pairs(4, 7)
    first, second = result(pairs), result(shifted(pairs, 0.4))
    made = compare(first, second, by=(by,), count=50)
    for row in made.rows:
        assert row.test == "sign-flip"
        assert row.p == pytest.approx(exchanged(first, second, by, f"{row.alpha:g}"))
    assert "7 pairs are too few to tell much" in made.notes[0]
    assert "exact sign-flip test" in "\n".join(format_comparison(made))


def test_one_pair_tells_nothing_however_large_its_difference():
    far, near = prediction([[50, 50]], [[150, 50]]), prediction([[50, 50]], [[50, 50]])
    (row, *_) = compare(result([far]), result([near]), count=100).rows
    assert row.difference == 1.0
    assert row.p == 1.0


def test_malformed_results_are_one_clear_line(tmp_path, pairs):
    """Whatever key is taken out, or cut short: refused on reading, not a KeyError later."""
    whole = json.loads(dump_results(result(pairs)))

    def drop(*path):
        data = copy.deepcopy(whole)
        place = data
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        return data

    damaged = [
        drop("conditions"),
        drop("conditions", "dataset", "name"),
        drop("counts"),
        drop("protocols", "dift", "pck", "0.1", "image"),
        drop("protocols", "dift", "conditions", "basis"),
        drop("protocols", "dift", "curve"),
        drop("pairs", "names"),
        drop("pairs", "digests"),
        drop("pairs", "points", 0),
        drop("pairs", "hits", "dift", "0.05"),
        drop("pairs", "hits", "dift", "0.05", 3),
        {**whole, "protocols": []},
        {**whole, "pairs": 3},
    ]
    for data in damaged:
        (tmp_path / "r.json").write_text(json.dumps(data))
        with pytest.raises(InputError, match=r"'.*r\.json' is damaged \(.*score the run again") as caught:
            load_results(tmp_path / "r.json")
        assert "\n" not in str(caught.value)


def test_files_and_output(tmp_path, pairs):
    (tmp_path / "a.json").write_text(dump_results(result(pairs)))
    data = load_results(tmp_path / "a.json")
    assert data == json.loads(json.dumps(result(pairs)))
    other = copy.deepcopy(data)
    other["conditions"]["dataset"]["left_out"] = {"missing-image": 3}
    made = compare(data, other, count=20)
    assert made.notes == ("the data sets' options differ",)
    plain = json.loads(json.dumps(to_json(made)))
    assert plain["schema"] == "difftap.bench.compare/2"
    assert len(plain["rows"]) == 3
    text = "\n".join(format_comparison(made))
    assert "80 common pairs" in text
    assert "note: the data sets' options differ" in text
    for content, message in (("[]", "cannot be read"), ('{"schema": "x"}', "schema 'x'"), ("{", "cannot be read")):
        (tmp_path / "b.json").write_text(content)
        with pytest.raises(InputError, match=message):
            load_results(tmp_path / "b.json")
    with pytest.raises(InputError, match="cannot be read"):
        load_results(tmp_path / "none.json")
