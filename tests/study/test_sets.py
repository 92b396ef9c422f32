import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difftap.artifacts.table import plain
from difftap.errors import InputError
from difftap.prototypes import PrototypeTable
from difftap.retrieval.distances import METRICS, pairwise
from difftap.study.axes import published_dunn
from difftap.study.sets import SETS, aligned_distances, analyse, pair_sets
from difftap.study.statistics import DistanceSet, bootstrap_means
from difftap.study.video import clips, offset_results


def make_table(rows, width=5, seed=0):
    """A table of rows (class, image, instance)."""
    n = len(rows)
    classes, images, instances = zip(*rows, strict=True)
    vectors = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    return PrototypeTable(
        vectors, classes, images, instances, np.full(n, 0.1), np.ones(n), np.ones(n), np.zeros(n), ["t"] * n, [0] * n
    )


def slow_sets(table, metric):
    """Pair by pair, by the definitions' words."""
    found = {name: [] for name in SETS}
    distances = pairwise(table.vectors, metric=metric)
    for i, j in itertools.combinations(range(len(table)), 2):
        same_class = table.classes[i] == table.classes[j]
        same_image = table.images[i] == table.images[j]
        if table.instances[i] == table.instances[j]:
            if not same_image:
                found["sidi"].append(distances[i, j])
        else:
            name = ("sc" if same_class else "dc") + ("si" if same_image else "di")
            found[name].append(distances[i, j])
    return found


rows = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from("12345"), st.sampled_from("uvwxyz")), min_size=1, max_size=25
)


@given(rows=rows, metric=st.sampled_from(METRICS))
@settings(max_examples=30, deadline=None)
def test_sets_are_as_defined(rows, metric):
    table = make_table(rows)
    found, expected = pair_sets(table, metric), slow_sets(table, metric)
    assert list(found) == list(SETS)
    for name in SETS:
        values = np.array(expected[name], np.float64)
        assert found[name].count == len(values)
        assert np.sort(found[name].kept.values) == pytest.approx(np.sort(values), abs=1e-6)
        if len(values):
            assert found[name].mean == pytest.approx(values.mean(), abs=1e-6)
        if len(values) > 1:
            assert found[name].std == pytest.approx(values.std(ddof=1), abs=1e-5)


def test_images_of_a_pair_are_told(monkeypatch):
    table = make_table([("a", "1", "u"), ("a", "2", "v"), ("b", "2", "w")])
    found = pair_sets(table, "euclidean")
    assert {(k, v.kept.left.tolist()[0], v.kept.right.tolist()[0]) for k, v in found.items() if v.count} == {
        ("scdi", 0, 1),
        ("dcdi", 0, 1),
        ("dcsi", 1, 1),
    }


def test_large_sets_are_sampled_but_their_means_are_not():
    rng = np.random.default_rng(0)
    table = make_table([("ab"[rng.integers(2)], str(rng.integers(20)), str(k)) for k in range(300)])
    full, some = pair_sets(table, "cosine"), pair_sets(table, "cosine", most=1000)
    for name in ("scdi", "dcdi"):
        assert full[name].count == some[name].count == len(full[name].kept)
        assert (some[name].mean, some[name].std) == pytest.approx((full[name].mean, full[name].std))
        assert 800 < len(some[name].kept) < 1200
        assert set(some[name].kept.values) <= set(full[name].kept.values)
    assert np.array_equal(some["dcdi"].kept.values, pair_sets(table, "cosine", most=1000)["dcdi"].kept.values)


@pytest.mark.parametrize("metric", METRICS)
def test_aligned_distances_are_the_diagonal(metric):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 70, 6)).astype(np.float32)
    assert aligned_distances(x, y, metric) == pytest.approx(np.diagonal(pairwise(x, y, metric=metric)), abs=1e-5)
    assert aligned_distances(x[:0], y[:0], metric).shape == (0,)


def test_the_analysis_tells_the_trend():
    pytest.importorskip("scipy")
    classes = {"a": 0.0, "b": 10.0}
    table = make_table([(c, str(i), f"{c}{i}{k}") for i in range(4) for c in classes for k in range(2)])
    places = np.array([[classes[str(c)], 0.2 * int(i), 0.0] for c, i in zip(table.classes, table.images, strict=True)])
    places += np.random.default_rng(0).uniform(0, 0.05, places.shape)
    near = PrototypeTable(
        places.astype(np.float32), table.classes, table.images, table.instances, table.areas, table.coverages,
        table.cells, table.small, table.taps, table.timesteps,
    )  # fmt: skip
    found = analyse(pair_sets(near, "euclidean"), draws=50)
    assert found["trend"]["holds"] is True
    assert found["trend"]["share_of_draws"] > 0.9
    assert set(found["pairs"]) == {f"{a}-{b}" for a, b in itertools.combinations(("scsi", "scdi", "dcsi", "dcdi"), 2)}
    assert found["pairs"]["scdi-dcsi"]["dunn_minmax"] > 1  # far apart
    assert found["pairs"]["scsi-dcsi"]["kruskal_wallis"]["p"] < 0.01
    assert found["sets"]["sidi"]["count"] == 0
    assert found["sets"]["sidi"]["box"]["median"] is None
    # A tenth of the draws, and 20 at least, for what is ranked anew in every draw.
    assert found["pairs"]["scsi-dcsi"]["effect"]["draws"] == 20
    more = analyse(pair_sets(near, "euclidean"), draws=400)
    assert more["pairs"]["scsi-dcsi"]["effect"]["draws"] == 40
    assert more["bootstrap"] == {"draws": 400, "images": 4, "level": 0.95}
    alone = analyse(pair_sets(near.take(near.images == "0"), "euclidean"), draws=10)
    assert alone["trend"]["holds"] is None
    reversed_order = analyse(pair_sets(near, "euclidean"), ("dcdi", "scsi"), draws=10)
    assert reversed_order["trend"]["holds"] is False


def test_plain_data_has_no_nan():
    assert plain({"a": float("nan"), "b": (1, float("inf"))}) == {"a": None, "b": [1, None]}


def test_published_values_are_the_papers():
    assert published_dunn("voc", "euclidean")["scsi-scdi"] == 0.30312
    assert published_dunn("coco", "cosine")["dcsi-dcdi"] == 0.27002
    assert published_dunn("coco", "euclidean")["scsi-scdi"] == 0.35941
    assert published_dunn("voc", "correlation")["scdi-dcsi"] == 0.08312
    assert published_dunn("voc", "dcor") == published_dunn("folder", "cosine") == {}


def video_table(people=3, frames=6, seed=0, noise=0.1):
    rng = np.random.default_rng(seed)
    own = rng.standard_normal((2, people, 8))
    keys = [(clip, t, p) for clip in range(2) for t in range(frames) for p in range(people) if (t + p) % 5]
    table = make_table([("person", f"clip{c}/{t:05d}", f"clip{c}/{p}") for c, t, p in keys], 8)
    vectors = np.stack([own[c, p] + noise * (1 + t) * rng.standard_normal(8) for c, t, p in keys]).astype(np.float32)
    return PrototypeTable(
        vectors, table.classes, table.images, table.instances, table.areas, table.coverages, table.cells,
        table.small, table.taps, table.timesteps,
    )  # fmt: skip


@pytest.mark.parametrize("noise", [0.05, 1.0])
def test_offsets_hold_every_pair_of_frames_once(noise):
    table = video_table(noise=noise)
    found = offset_results(clips(table, "cosine"), (1, 2, 5, 40), draws=20)
    distances = pairwise(table.vectors, metric="cosine")
    clip = [str(key).split("/")[0] for key in table.images]
    frame = [int(str(key).split("/")[1]) for key in table.images]
    for row in found["offsets"]:
        own, other, won, tried = [], [], 0, 0
        for i in range(len(table)):
            later = [j for j in range(len(table)) if clip[i] == clip[j] and frame[j] - frame[i] == row["offset"]]
            same = [j for j in later if table.instances[i] == table.instances[j]]
            own += [distances[i, j] for j in same]
            other += [distances[i, j] for j in later if j not in same]
            if same and len(later) > len(same):
                tried += 1
                won += min(later, key=lambda j: distances[i, j]) in same
        for name, values in (("sidi", own), ("scdi", other)):
            assert row[name]["count"] == len(values)
            assert row[name]["box"]["mean"] == (pytest.approx(np.mean(values), abs=1e-5) if values else None)
        assert row["nearest"]["count"] == tried
        assert row["nearest"]["share"] == (pytest.approx(won / tried) if tried else None)
    assert found["offsets"][0]["holds"] is (True if noise < 0.5 else found["offsets"][0]["holds"])
    assert found["offsets"][-1]["holds"] is None  # no frames lie 40 apart
    together = [
        distances[i, j] for i, j in itertools.combinations(range(len(table)), 2) if table.images[i] == table.images[j]
    ]
    assert found["scsi"]["count"] == len(together)
    assert found["scsi"]["box"]["mean"] == pytest.approx(np.mean(together), abs=1e-5)


def test_images_that_are_no_frames_are_refused():
    with pytest.raises(InputError, match="'a' is no frame of a clip"):
        clips(make_table([("person", "a", "x")]), "cosine")


def test_looking_pairs_of_images_up_and_multiplying_matrices_agree(monkeypatch):
    rng = np.random.default_rng(3)
    left, right = rng.integers(0, 12, (2, 400))
    one = DistanceSet(rng.random(400), left, right)
    fast = bootstrap_means({"a": one}, draws=30)
    monkeypatch.setattr("difftap.study.statistics._DENSE", 0)
    slow = bootstrap_means({"a": one}, draws=30)
    assert (fast.means["a"].low, fast.means["a"].high) == pytest.approx((slow.means["a"].low, slow.means["a"].high))
