"""Retrieval figures against a slow, independent reading of their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difftap.errors import InputError
from difftap.retrieval.quality import judge, summarise, vote

KS = (1, 3)


def slow(hits, category, image, classes, images, neighbours, depth):
    """Figures of one query, step by step; None if it has nothing to find."""
    total = sum(1 for c, i in zip(classes, images, strict=True) if c == category and i != image)
    if not total:
        return None
    ranked = [row for row in hits if row >= 0 and images[row] != image][:depth]
    right = [classes[row] == category for row in ranked]
    precision = sum(sum(right[: n + 1]) / (n + 1) for n in range(len(right)) if right[n]) / min(total, depth)
    votes = [classes[row] for row in ranked[:neighbours]]
    best = max(votes.count(one) for one in votes) if votes else 0
    chosen = next((one for one in votes if votes.count(one) == best), None)
    return [any(right[:k]) for k in KS], precision, chosen == category


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_every_figure(data):
    count = data.draw(st.integers(1, 12))
    classes = np.array(data.draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count)))
    images = np.array(data.draw(st.lists(st.sampled_from("wxyz"), min_size=count, max_size=count)))
    queries = data.draw(st.integers(1, 5))
    kinds = np.array(data.draw(st.lists(st.sampled_from("abcd"), min_size=queries, max_size=queries)))
    places = np.array(data.draw(st.lists(st.sampled_from("wxyzv"), min_size=queries, max_size=queries)))
    hits = np.array([data.draw(st.permutations([*range(count), -1])) for _ in range(queries)])
    depth = data.draw(st.integers(3, 8))
    found = judge(hits, kinds, places, classes, images, ks=KS, neighbours=3, depth=depth)
    wanted = [slow(h, c, i, classes, images, 3, depth) for h, c, i in zip(hits, kinds, places, strict=True)]
    assert found.skipped == wanted.count(None)
    wanted = [one for one in wanted if one is not None]
    assert found.found.tolist() == [one[0] for one in wanted]
    assert found.voted.tolist() == [one[2] for one in wanted]
    np.testing.assert_allclose(found.precision, [one[1] for one in wanted])
    quality = summarise([found], KS)
    if wanted:
        assert quality.mean_average_precision == pytest.approx(np.mean([one[1] for one in wanted]))
        assert quality.recall[3] == pytest.approx(np.mean([one[0][1] for one in wanted]))
        by_class = {c: [w for w, k in zip(wanted, found.classes, strict=True) if k == c] for c in set(found.classes)}
        assert quality.class_means["accuracy"] == pytest.approx(
            np.mean([np.mean([one[2] for one in some]) for some in by_class.values()])
        )
        assert {c: one["queries"] for c, one in quality.by_class.items()} == {c: len(s) for c, s in by_class.items()}


def test_average_precision_by_hand():
    # Relevant at ranks 1 and 3 of the hits in other images, of three relevant rows: (1/1 + 2/3) / 3.
    classes, images = np.array(list("aabaa")), np.array(["q", "1", "2", "3", "4"])
    hits = np.array([[0, 1, 2, 3]])
    found = judge(hits, np.array(["a"]), np.array(["q"]), classes, images, ks=(1,), neighbours=1, depth=5)
    assert found.precision[0] == pytest.approx((1 + 2 / 3) / 3)


def test_the_nearest_class_wins_a_tie():
    assert vote(np.array(["b", "a", "a", "b"])) == "b"
    assert vote(np.array([], str)) is None


def test_nothing_to_judge():
    quality = summarise([], (1,))
    assert quality.queries == 0
    assert math.isnan(quality.accuracy)
    assert quality.to_dict()["accuracy"] is None


def test_more_neighbours_than_hits_are_refused():
    with pytest.raises(InputError, match="up to the depth"):
        judge(np.zeros((0, 1), int), *[np.zeros(0, str)] * 4, ks=(5,), depth=3)


def test_recall_is_at_one_five_and_ten_unless_asked_otherwise():
    """The only relevant row is the hit of rank 10: found at 10 alone; five neighbours vote for the other class."""
    classes, images = np.array([*"bbbbbbbbb", "a"]), np.array([str(k) for k in range(10)])
    found = judge(np.arange(10)[None], np.array(["a"]), np.array(["q"]), classes, images, depth=10)
    assert found.found.tolist() == [[False, False, True]]
    assert found.voted.tolist() == [False]
