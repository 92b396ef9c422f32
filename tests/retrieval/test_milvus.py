"""The same index in Milvus, tried with milvus-lite: answers, adding, interruptions, and what is refused."""

import json

import numpy as np
import pytest

from difftap.errors import ArtifactError, BackendError, InputError, OutputError
from difftap.retrieval.builder import IndexOptions
from difftap.retrieval.index import is_milvus
from difftap.retrieval.milvus import MilvusIndex, build_milvus
from difftap.retrieval.retrieve import build_index, evaluate, open_index, search_record
from tests.retrieval.cases import batches, objects, origin

pytest.importorskip("milvus_lite")
pytest.importorskip("pymilvus")
pytestmark = pytest.mark.filterwarnings("ignore")  # pymilvus' own


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A milvus-lite file for all tests, each with an index of its own name."""
    return str(tmp_path_factory.mktemp("milvus") / "x.db")


@pytest.mark.parametrize("metric", ["correlation", "cosine", "euclidean"])
def test_it_answers_as_a_folder_does(place, tmp_path, metric):
    pytest.importorskip("faiss")
    vectors, rows = objects(90)
    queries, facts = objects(12, seed=1)
    with (
        build_index(
            place, origin(), batches(vectors, rows), IndexOptions("flat", metric), name=f"like_{metric}"
        ) as there,
        build_index(str(tmp_path / "ix"), origin(), batches(vectors, rows), IndexOptions("flat", metric)) as here,
    ):
        for one, other in zip(there.search(queries, 8), here.search(queries, 8), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
        assert search_record(there, queries[0], 5) == search_record(here, queries[0], 5)
        assert evaluate(there, batches(queries, facts)) == evaluate(here, batches(queries, facts))
    again = open_index(place, name=f"like_{metric}")
    assert again.about.to_dict() == json.loads(json.dumps(there.about.to_dict()))
    again.about.origin.check(origin(), "the same")
    again.close()


def test_positions_are_kept(place):
    vectors, rows = objects(4)
    rows.x[:], rows.y[:] = [0.5, np.nan, -0.5, 3], [1, np.nan, 2, 4]
    with build_milvus(place, origin(), batches(vectors, rows), IndexOptions(), name="places") as index:
        found = index.facts(np.array([2, 1, 0, 2]))
    assert found.record(0)["position"] == {"x": -0.5, "y": 2}
    assert found.record(1)["position"] is None
    assert found.images.tolist() == rows.images[[2, 1, 0, 2]].tolist()


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_other_kinds(place, kind):
    vectors, rows = objects(600)
    with build_milvus(place, origin(), batches(vectors, rows), IndexOptions(kind), name=f"kind_{kind}") as index:
        assert index.about.kind == kind
        assert index.about.report["recall"]["value"] > 0.9
        assert (index.search(vectors[:20], 1)[1][:, 0] == np.arange(20)).mean() > 0.9


def test_add_and_an_add_that_was_interrupted(place):
    vectors, rows = objects(40)
    more, facts = objects(25, seed=1)
    with build_milvus(place, origin(), batches(vectors, rows), IndexOptions(), name="adds") as index:

        def cut_short():
            yield from batches(more, facts, 10)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            index.add(cut_short())
    with MilvusIndex.open(place, "adds") as index:
        assert index.about.count == 40
        assert (index.search(more, 40)[1] < 40).all()  # what was left behind is not read
        assert index.add(batches(more[:15], facts.take(slice(15)))) == 15
        assert index.about.count == 55
        assert index.search(more[:15], 1)[1][:, 0].tolist() == list(range(40, 55))
    with MilvusIndex.open(place, "adds") as index:
        assert index.rows().instances.tolist() == rows.instances.tolist() + facts.instances.tolist()[:15]


def test_two_that_add_at_once(place):
    vectors, rows = objects(30)
    more, facts = objects(20, seed=1)
    build_milvus(place, origin(), batches(vectors, rows), IndexOptions(), name="two").close()
    with MilvusIndex.open(place, "two") as one, MilvusIndex.open(place, "two") as other:

        def meanwhile():
            yield from batches(more, facts, 10)
            other.add(batches(more[:5], facts.take(slice(5))))

        with pytest.raises(InputError, match="was changed meanwhile"):
            one.add(meanwhile())
        with pytest.raises(InputError, match="was changed meanwhile"):
            one.add([])
    with MilvusIndex.open(place, "two") as index:
        assert index.about.count == 35
        assert index.rows().instances.tolist() == rows.instances.tolist() + facts.instances.tolist()[:5]


def test_a_build_that_was_interrupted_leaves_the_old_index(place, monkeypatch):
    vectors, rows = objects(30)
    build_milvus(place, origin(), batches(vectors, rows), IndexOptions(), name="old").close()
    with pytest.raises(OutputError, match="holds an index 'old' already"):
        build_milvus(place, origin(), batches(vectors, rows), IndexOptions(), name="old")
    monkeypatch.setattr(MilvusIndex, "_commit", lambda self, about: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build_milvus(place, origin(), batches(*objects(50, seed=1)), IndexOptions(), name="old", overwrite=True)
    monkeypatch.undo()
    with MilvusIndex.open(place, "old") as index:
        assert index.about.count == 30
    with build_milvus(
        place, origin(), batches(*objects(50, seed=1)), IndexOptions(), name="old", overwrite=True
    ) as index:
        assert index.about.count == 50
        assert sum(one.startswith("old_v_") for one in index._client.list_collections()) == 1


def test_what_is_refused(place, tmp_path):
    vectors, rows = objects(5)
    for options in (IndexOptions(metric="manhattan"), IndexOptions("ivf-pq", refine=True)):
        with pytest.raises(InputError, match="leave them out"):
            build_milvus(place, origin(), batches(vectors, rows), options, name="no")
    with pytest.raises(InputError, match="no index 'nobody'"):
        MilvusIndex.open(place, "nobody")
    with pytest.raises(InputError, match="no index at"):
        MilvusIndex.open(str(tmp_path / "no.db"))
    with pytest.raises(OutputError, match="its folder does not exist"):
        build_milvus(str(tmp_path / "no" / "x.db"), origin(), batches(vectors, rows), IndexOptions())
    (tmp_path / "file.db").write_text("mine")
    with pytest.raises(InputError, match="not a milvus-lite index"):
        build_milvus(str(tmp_path / "file.db"), origin(), batches(vectors, rows), IndexOptions())
    with pytest.raises(InputError, match="--gpu is for an index in a folder"):
        open_index(place, gpu=True)
    with (
        build_milvus(place, origin(), batches(vectors, rows), IndexOptions(), name="few") as index,
        pytest.raises(InputError, match="at most 16384"),
    ):
        index.find(vectors, 20_000)


def test_a_collection_of_somebody_else(place):
    vectors, rows = objects(5)
    with build_milvus(place, origin(), batches(vectors, rows), IndexOptions(), name="mine") as index:
        theirs = index._vectors
    with pytest.raises((ArtifactError, BackendError)):
        MilvusIndex.open(place, theirs)


def test_addresses():
    assert is_milvus("http://host:19530")
    assert is_milvus("./x.db")
    assert not is_milvus("voc.index")
