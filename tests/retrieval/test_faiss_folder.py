"""FAISS indexes in folders: kinds, exactness, adding, damage, kills and full disks."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from difftap.errors import ArtifactError, InputError, MissingExtraError, OutputError
from difftap.retrieval import builder as build
from difftap.retrieval import faiss_folder as folder
from difftap.retrieval import retrieve
from difftap.retrieval.builder import IndexOptions, build_folder, plan_for
from difftap.retrieval.distances import pairwise
from difftap.retrieval.faiss_folder import FolderIndex
from difftap.retrieval.kinds import INDEXED, IndexMetric, choose_kind, efforts
from difftap.retrieval.quality import exact_neighbours
from tests.retrieval.cases import batches, objects, origin

pytest.importorskip("faiss")
pytest.importorskip("pyarrow")


@pytest.fixture
def made(tmp_path):
    vectors, rows = objects(200)
    with build_folder(tmp_path / "ix", origin(), batches(vectors, rows), IndexOptions()) as index:
        yield index, vectors, rows


def ranked(vectors, queries, metric, k):
    return np.argsort(pairwise(queries, vectors, metric=metric), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("metric", INDEXED)
def test_flat_is_exact(tmp_path, metric):
    vectors, rows = objects(120)
    queries = objects(9, seed=1)[0]
    index = build_folder(tmp_path / "ix", origin(), batches(vectors, rows), IndexOptions("flat", metric))
    scores, found = index.search(queries, 7)
    np.testing.assert_array_equal(found, ranked(vectors, queries, metric, 7))
    distances = np.take_along_axis(pairwise(queries, vectors, metric=metric), found, axis=1)
    close = 1 - scores if index.about.space.higher_is_nearer else scores
    np.testing.assert_allclose(close, distances, atol=1e-5)
    assert index.about.report["recall"]["value"] == 1
    assert [index.facts(found[0]).record(i) for i in range(7)] == [rows.record(int(row)) for row in found[0]]


@pytest.mark.parametrize(
    "options",
    [
        IndexOptions("ivf", recall=0.9),
        IndexOptions("ivf", "euclidean", recall=1.0),
        IndexOptions("ivf", lists=5),
        IndexOptions("hnsw", "cosine"),
        IndexOptions("ivf-pq", codes=8, refine=True),
        IndexOptions("ivf-pq", "euclidean", codes=4, recall=0.5),
    ],
)
def test_stated_recall_is_what_a_search_finds(tmp_path, options):
    vectors, rows = objects(1200)
    index = build_folder(tmp_path / "ix", origin(), batches(vectors, rows), options)
    stated = index.about.report["recall"]
    assert stated["queries"] == 256
    assert stated["rows"] == 1200
    if options.kind != "ivf-pq":
        assert stated["value"] >= options.recall
    index.close()
    again = FolderIndex.open(tmp_path / "ix")  # the effort is kept
    held = build.held_out(1200, 0)
    _, found = again.search(vectors[held], 11)
    shares = []
    for row, hits, true in zip(held, found, ranked(vectors, vectors[held], options.metric, 11), strict=True):
        shares.append(len({*hits} - {row} & {*true} - {row}) / 10 if len({*true} - {row}) == 10 else 1)
    assert np.mean(shares) == pytest.approx(stated["value"], abs=0.02)


def test_the_kind_goes_by_size():
    space = IndexMetric()
    assert choose_kind(50_000, 1280, space) == "flat"
    assert choose_kind(100_000, 1280, space) == "ivf"
    assert choose_kind(1_000_000, 1280, space) == "ivf-pq"
    assert choose_kind(1_000_000, 1280, IndexMetric("manhattan")) == "flat"
    plan = plan_for(IndexOptions(), 1_000_000, 1280)
    assert (plan.kind, plan.refine) == ("ivf-pq", True)


def test_add(made, tmp_path):
    index, vectors, rows = made
    more, facts = objects(50, seed=1)
    assert index.add(batches(more, facts)) == 50
    for one in (index, FolderIndex.open(tmp_path / "ix")):
        assert one.about.count == 250
        assert one.rows().images.tolist() == rows.images.tolist() + facts.images.tolist()
        every = np.concatenate([vectors, more])
        np.testing.assert_array_equal(one.search(more, 5)[1], ranked(every, more, "correlation", 5))
    assert len(list((tmp_path / "ix").iterdir())) == 3  # manifest, vectors, rows: nothing is left behind


def test_add_of_nothing_changes_nothing(made, tmp_path):
    index, *_ = made
    before = {path.name for path in (tmp_path / "ix").iterdir()}
    assert index.add([]) == 0
    assert {path.name for path in (tmp_path / "ix").iterdir()} == before


def test_what_fails_while_adding_leaves_the_old_index(made, tmp_path):
    index, vectors, _ = made
    more, facts = objects(50, seed=1)
    broken = more.copy()
    broken[40] = np.nan
    with pytest.raises(InputError, match="holds NaN"):
        index.add(batches(broken, facts, 20))
    again = FolderIndex.open(tmp_path / "ix")
    assert again.about.count == 200
    np.testing.assert_array_equal(again.search(vectors[:5], 3)[1], ranked(vectors, vectors[:5], "correlation", 3))
    assert again.add(batches(more, facts)) == 50


@pytest.mark.parametrize("broken", ["index", "rows", "manifest"])
def test_a_full_disk_leaves_the_old_index(made, tmp_path, monkeypatch, broken):
    index, vectors, _ = made

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    if broken == "index":
        import faiss

        class Full:
            def __init__(self, handle, size):
                self.handle = handle

        monkeypatch.setattr(faiss, "write_index", full)
    elif broken == "rows":
        import pyarrow.parquet

        monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    else:
        monkeypatch.setattr(folder.Manifest, "save", lambda self, path: (_ for _ in ()).throw(OutputError("full")))
    with pytest.raises(OutputError):
        index.add(batches(*objects(50, seed=1)))
    monkeypatch.undo()
    again = FolderIndex.open(tmp_path / "ix")
    assert again.about.count == 200
    assert again.search(vectors[:1], 1)[1][0, 0] == 0
    assert again.add(batches(*objects(50, seed=1))) == 50  # and what was left behind is gone
    assert len(list((tmp_path / "ix").iterdir())) == 3


def test_an_error_of_the_file_itself_is_seen(tmp_path):
    """FAISS writes through a file of Python's, so an error surfaces whenever the system reports it."""
    code = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from difftap.retrieval.builder import IndexOptions, build_folder
from difftap.errors import OutputError
from tests.retrieval.cases import batches, objects, origin
vectors, rows = objects(3000)
resource.setrlimit(resource.RLIMIT_FSIZE, (len(vectors) * 64 + 10, -1))  # the spool fits, FAISS' header does not
try:
    build_folder(Path(sys.argv[1]), origin(), batches(vectors, rows), IndexOptions())
except OutputError as error:
    print("refused:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "ix")], capture_output=True, text=True, cwd=Path.cwd(), check=False
    )
    assert done.stdout.startswith("refused: cannot write"), done.stderr
    assert not (tmp_path / "ix").exists()


@pytest.mark.parametrize("when", [0.0, 0.02, 0.05, 0.1])
def test_a_kill_while_adding_leaves_the_old_index_or_the_new(made, tmp_path, when):
    index, vectors, _ = made
    index.close()
    code = """
import sys
from pathlib import Path
from difftap.retrieval.faiss_folder import FolderIndex
from tests.retrieval.cases import batches, objects
index = FolderIndex.open(Path(sys.argv[1]))
print("ready", flush=True)
index.add(batches(*objects(3000, seed=1)))
print("added", flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "ix")], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    time.sleep(when)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    again = FolderIndex.open(tmp_path / "ix")
    assert again.about.count in (200, 3200)
    assert len(again.rows()) == again.about.count
    np.testing.assert_array_equal(again.search(vectors[:3], 1)[1][:, 0], [0, 1, 2])
    before = again.about.count
    assert again.add(batches(*objects(10, seed=2))) == 10
    assert FolderIndex.open(tmp_path / "ix").about.count == before + 10
    assert len(list((tmp_path / "ix").iterdir())) == 3


def test_two_writers(made, tmp_path):
    index, *_ = made
    with folder.held_folder(tmp_path / "ix"), pytest.raises(OutputError, match="another run is writing it"):
        index.add(batches(*objects(10, seed=1)))
    other = FolderIndex.open(tmp_path / "ix")
    assert other.add(batches(*objects(10, seed=1))) == 10
    with pytest.raises(InputError, match="was changed meanwhile"):
        index.add(batches(*objects(10, seed=2)))


@pytest.mark.parametrize("kind", [".faiss", ".parquet", ".json"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_damage_is_found(made, tmp_path, kind, how):
    made[0].close()
    (path,) = (one for one in (tmp_path / "ix").iterdir() if one.name.endswith(kind))
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else b"\x00" + content[1:])
    with pytest.raises((ArtifactError, InputError)):
        FolderIndex.open(tmp_path / "ix")


def test_an_index_that_says_nothing_of_itself(made, tmp_path):
    file = tmp_path / "ix" / "index.json"
    data = json.loads(file.read_text())
    data["made_from"]["origin"].pop("model_key")
    data.pop("sha256")
    file.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="does not say what it is"):
        FolderIndex.open(tmp_path / "ix")


def test_building_where_something_stands(made, tmp_path):
    vectors, rows = objects(20)
    with pytest.raises(OutputError, match="holds an index already"):
        build_folder(tmp_path / "ix", origin(), batches(vectors, rows), IndexOptions())
    assert (
        build_folder(tmp_path / "ix", origin(), batches(vectors, rows), IndexOptions(), overwrite=True).about.count
        == 20
    )
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"it holds 'ix'"):
        build_folder(tmp_path, origin(), batches(vectors, rows), IndexOptions(), overwrite=True)
    with pytest.raises(OutputError, match="a file stands there"):
        build_folder(tmp_path / "notes.txt", origin(), batches(vectors, rows), IndexOptions())
    with pytest.raises(OutputError, match="its folder does not exist"):
        build_folder(tmp_path / "no" / "ix", origin(), batches(vectors, rows), IndexOptions())


def test_what_a_killed_build_left_is_removed_and_what_is_not_ours_stays(tmp_path):
    vectors, rows = objects(20)
    (tmp_path / "ix").mkdir()
    for name in (".lock", "vectors-0a.tmp", "index-0a.faiss", ".rows-0a.parquet.7.ab.part"):
        (tmp_path / "ix" / name).write_text("half")
    index = build_folder(tmp_path / "ix", origin(), batches(vectors, rows), IndexOptions())
    assert len(list((tmp_path / "ix").iterdir())) == 3
    (tmp_path / "ix" / "notes.txt").write_text("mine")
    index.add(batches(vectors, rows))
    assert (tmp_path / "ix" / "notes.txt").read_text() == "mine"


def test_nothing_to_index(tmp_path):
    with pytest.raises(InputError, match="nothing to index"):
        build_folder(tmp_path / "ix", origin(), [], IndexOptions())
    assert not (tmp_path / "ix").exists()
    with pytest.raises(InputError, match="no index at"):
        FolderIndex.open(tmp_path / "ix")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "tree"}, "kind is 'tree'"),
        ({"metric": "dcor"}, "no index can hold"),
        ({"kind": "ivf", "metric": "manhattan"}, "allowed with manhattan: flat"),
        ({"kind": "flat", "lists": 4}, "with ivf and ivf-pq"),
        ({"kind": "ivf", "refine": True}, "go with ivf-pq"),
        ({"codes": 4}, "give --kind too"),
        ({"recall": 0.0}, "recall is 0"),
        ({"kind": "hnsw", "gpu": True}, "on a GPU"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(InputError, match=words):
        IndexOptions(**options)


def test_options_that_do_not_fit_the_vectors(tmp_path):
    few = objects(60)
    for options, words in (
        (IndexOptions("ivf-pq"), "256 or more"),
        (IndexOptions("ivf", lists=100), "cannot make 100 lists"),
    ):
        with pytest.raises(InputError, match=words):
            build_folder(tmp_path / "ix", origin(), batches(*few), options)
        assert not (tmp_path / "ix").exists()
    with pytest.raises(InputError, match="a divisor of the width 16"):
        build_folder(tmp_path / "ix", origin(), batches(*objects(400)), IndexOptions("ivf-pq", codes=5))


def test_queries_that_do_not_fit(made):
    index, vectors, _ = made
    with pytest.raises(InputError, match=r"allowed: \(Q, 16\)"):
        index.search(vectors[:, :5], 3)
    with pytest.raises(InputError, match="k is 0"):
        index.search(vectors[:1], 0)
    assert index.search(vectors[:1], 10_000)[1].shape == (1, 200)


@pytest.mark.parametrize("package", ["faiss", "pyarrow"])
def test_a_missing_package_is_named_before_anything_is_done(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)

    def nothing_yet():
        raise AssertionError("vectors were asked for")
        yield

    with pytest.raises(MissingExtraError, match=r"pip install 'difftap\[index\]'"):
        build_folder(tmp_path / "ix", origin(), nothing_yet(), IndexOptions())
    assert not (tmp_path / "ix").exists()


def test_efforts_double():
    import faiss

    assert list(efforts(faiss.index_factory(8, "IVF12,Flat"))) == [1, 2, 4, 8, 12]
    assert list(efforts(faiss.index_factory(8, "IVF1024,Flat")))[-1] == 512
    assert list(efforts(faiss.index_factory(8, "HNSW8,Flat")))[:2] == [16, 32]
    assert list(efforts(faiss.IndexFlat(8))) == []


@pytest.mark.parametrize(
    ("key", "name", "same"),
    [
        ("/data/JPEGImages/2011_000003.jpg", "2011_000003", True),
        ("soapbox/00001", "/d/480p/soapbox/00001.jpg", True),
        ("00001", "10001", False),
        ("a/x.jpg", "b/x.jpg", False),
        ("v1.2", "v1.3", False),
        ("", "x", False),
    ],
)
def test_the_same_image(key, name, same):
    assert retrieve.same_image(key, np.array([name])).tolist() == [same]


@pytest.mark.parametrize("shift", [0, 4096])
def test_flat_euclidean_is_exact_far_from_the_origin_and_for_many_queries(tmp_path, shift):
    """Whole numbers, so that float32 holds every vector; 300 queries of 640 are more than FAISS compares one by one."""
    rng = np.random.default_rng(3)
    vectors = rng.integers(-3, 4, (500, 640)).astype(np.float64)
    queries = vectors[:300] + rng.integers(-2, 3, (300, 640))
    true = np.array([((vectors - query) ** 2).sum(axis=1) for query in queries])
    _, rows = objects(500)
    moved = (vectors + shift).astype(np.float32)
    with build_folder(tmp_path / "i", origin(), batches(moved, rows), IndexOptions("flat", "euclidean")) as index:
        scores, found = index.search((queries + shift).astype(np.float32), 5)
    nearest = np.sort(true, axis=1)[:, :5]
    assert np.array_equal(np.take_along_axis(true, found, axis=1), nearest)
    assert np.allclose(scores, np.sqrt(nearest), rtol=1e-6)
    true_rows = exact_neighbours(moved, (queries + shift).astype(np.float32), IndexMetric("euclidean"), 5)
    assert np.array_equal(np.take_along_axis(true, true_rows, axis=1), nearest)
