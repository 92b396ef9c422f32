"""``difftap index`` and its benchmarks from end to end, with the embedded model."""

import json

import numpy as np
import pytest
from PIL import Image as PIL

from difftap.errors import DifftapError
from difftap.prototypes import PrototypeTable
from difftap.retrieval.queries import row_query
from difftap.retrieval.sheet import draw_sheet
from tests.harness import invoke, picture
from tests.retrieval.cases import origin, write_table

pytest.importorskip("faiss")
pytest.importorskip("pyarrow")
SMALL = ("--size", "64")


def difftap(*arguments, fails=None):
    done = invoke(list(map(str, arguments)))
    if fails is not None:
        assert isinstance(done.exception, DifftapError), done.output
        assert fails in str(done.exception)
        return done
    assert done.exit_code == 0, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Two classes of pictures in folders, their masks, a table of prototypes and an index of patches."""
    folder = tmp_path_factory.mktemp("scene")
    for k, (name, base) in enumerate([("day", 200), ("day", 210), ("night", 20), ("night", 30)]):
        place = folder / "images" / name
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(base + (picture(k, (48, 40)).astype(int) - 128) // 6, 0, 255).astype(np.uint8)
        PIL.fromarray(pixels).save(place / f"{k}.png")
    mask = np.zeros((40, 48), np.uint8)
    mask[5:30, 10:40] = 1
    PIL.fromarray(mask).save(folder / "mask.png")
    difftap(
        "index", "build", folder / "images", "--index", folder / "p.index", *SMALL, "--labels", "folder", "--metric",
        "cosine",
    )  # fmt: skip
    return folder


def test_patches_are_found_again(scene):
    image = scene / "images" / "night" / "2.png"
    done = difftap(
        "index", "search", image, "--point", "20,10", "--index", scene / "p.index", "-k", 5, "--sheet", scene / "s.png"
    )
    found = json.loads(done.stdout)
    assert done.stderr == ""
    first = found["hits"][0]
    assert first["score"] == pytest.approx(1, abs=1e-5)
    assert first["image"] == str(image.resolve())
    assert abs(first["position"]["x"] - 20) <= 3.01  # a cell is 6 x 5 pixels
    assert abs(first["position"]["y"] - 10) <= 2.51
    assert found["class"] == "night"
    assert found["score"] == "cosine; higher is nearer"
    assert found["recipe"]["size"] == [64, 64]
    assert found["index"]["recall"]["value"] == 1
    with PIL.open(scene / "s.png") as sheet:
        assert sheet.width == 5 * 210 + 10
    other = json.loads(difftap("index", "search", image, "--index", scene / "p.index", "--other-images").stdout)
    assert len(other["hits"]) == 10
    assert str(image.resolve()) not in {hit["image"] for hit in other["hits"]}


def test_patches_are_judged_with_their_own_image_left_out(scene):
    done = difftap(
        "index",
        "eval",
        scene / "images",
        "--labels",
        "folder",
        "--index",
        scene / "p.index",
        "--json",
        scene / "e.json",
    )
    figures = json.loads((scene / "e.json").read_text())
    rows = figures["index"]["rows"]
    assert figures["queries"] == rows
    assert figures["accuracy"] > 0.85  # day and night are told apart
    assert figures["by_class"]["day"]["queries"] == rows // 2
    assert "mean of classes" in done.stdout


def test_adding_images(scene, tmp_path):
    difftap("index", "build", scene / "images" / "day", "--index", tmp_path / "ix", *SMALL, "--per-image", 7)
    done = difftap("index", "add", scene / "images" / "night", "--per-image", 5, "--index", tmp_path / "ix")
    assert "10 vectors added" in done.stderr
    assert "24 in all" in done.stderr
    done = difftap("index", "add", scene / "images", "--per-image", 5, "--index", tmp_path / "ix")
    assert "0 vectors added" in done.stderr
    assert "4 images were in already" in done.stderr


def test_an_image_that_fails_is_told_and_the_rest_is_indexed(scene, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    day = scene / "images" / "day"
    done = invoke(list(map(str, ["index", "build", tmp_path / "bad.png", day, "--index", tmp_path / "ix", *SMALL])))
    assert done.exit_code == 1
    assert "1 images failed" in done.stderr
    assert (tmp_path / "ix" / "index.json").exists()


def test_tables(tmp_path):
    table = write_table(tmp_path / "a.parquet", 60)
    done = difftap("index", "build", table, "--index", tmp_path / "ix")
    assert "60 vectors of 16" in done.stderr
    assert "flat, correlation, exact" in done.stderr
    other = write_table(tmp_path / "b.parquet", 20, 1)
    assert "20 vectors added" in difftap("index", "add", other, "--index", tmp_path / "ix").stderr
    again = difftap("index", "add", table, other, "--index", tmp_path / "ix").stderr  # nothing is in twice
    assert "0 vectors added" in again
    assert "80 objects were in already and are left out" in again
    found = json.loads(difftap("index", "search", "--row", f"{table}:7", "--index", tmp_path / "ix", "-k", 2).stdout)
    assert found["hits"][0]["row"] == 7
    assert found["index"]["precision"] == "fp32"
    assert found["query"]["instance"] == PrototypeTable.load(table).instances[7]
    figures = difftap("index", "eval", table, "--index", tmp_path / "ix", "-k", 1, "-k", 3).stdout
    assert "R@1" in figures
    assert "class0" in figures


def test_patches_come_from_a_store_where_it_has_them(scene, tmp_path, monkeypatch):
    pytest.importorskip("zarr")
    store, day = tmp_path / "s.zarr", scene / "images" / "day"
    difftap("extract", scene / "images", "-o", store, *SMALL, "--dtype", "float32")
    difftap("index", "build", day, "--index", tmp_path / "fresh", *SMALL)
    monkeypatch.setattr("difftap.pipeline.pipeline.Pipeline.open", lambda *_, **__: pytest.fail("an engine was opened"))
    difftap("index", "build", day, "--index", tmp_path / "ix", *SMALL, "--features", store)
    query = ("index", "search", day / "0.png", "--point", "20,10", "--features", store, "--index")
    one, other = (json.loads(difftap(*query, tmp_path / name).stdout) for name in ("ix", "fresh"))
    assert one["hits"] == other["hits"]
    assert one["index"]["stored"] == "dtype float32"
    assert other["index"]["stored"] is None
    assert (
        "0 vectors"
        not in difftap("index", "add", scene / "images", "--features", store, "--index", tmp_path / "ix").stderr
    )
    table = write_table(tmp_path / "a.parquet")
    difftap("index", "build", table, "--features", store, "--index", tmp_path / "y", fails="--features is for images")
    difftap("index", "search", "--row", f"{table}:0", "--features", store, "--index", tmp_path / "ix", fails="leave it")
    difftap("index", "build", day, "--size", 128, "--features", store, "--index", tmp_path / "y", fails="with size =")


def test_a_query_of_another_model_is_refused(scene, tmp_path):
    table = write_table(tmp_path / "a.parquet")  # its model key is none of ours
    difftap("index", "build", table, "--index", tmp_path / "ix")
    image = scene / "images" / "day" / "0.png"
    difftap("index", "search", image, "--index", tmp_path / "ix", fails="vectors of two models cannot be compared")
    difftap("index", "add", table, "--index", scene / "p.index", fails="is of another origin than the index: source")
    difftap("index", "add", image, "--index", tmp_path / "ix", fails="this index holds prototypes")
    difftap("index", "search", "--row", f"{table}:0", "--index", scene / "p.index", fails="another origin")


def test_bad_input(scene, tmp_path):
    image, index = scene / "images" / "day" / "0.png", scene / "p.index"
    search = ("index", "search", "--index", index)
    difftap(*search, fails="nothing to search for")
    difftap(
        *search, image, "--precision", "int8", fails="the index was made at fp32, and here features are made at int8"
    )
    difftap(*search, image, "--mask", scene / "mask.png", "--point", "1,1", fails="exclude each other")
    difftap(*search, image, "--mask-value", "3", fails="goes with --mask")
    difftap(*search, image, "--row", "a.parquet:1", fails="takes the place of an image")
    difftap(*search, "--row", "a.parquet", fails="allowed: TABLE:N")
    difftap(*search, image, "--point", "200,1", fails="lies outside the image")
    difftap(*search, image, "--images", tmp_path, fails="give --sheet too")
    difftap(*search, image, "--sheet", tmp_path / "x.gif", fails="its ending is '.gif'")
    difftap(*search, image, "--mask", image, fails="holds colours")
    difftap("index", "search", image, "--index", tmp_path / "no", fails="no index at")
    difftap("index", "build", image, "--index", index, fails="holds an index already")
    difftap("index", "build", image, tmp_path / "a.parquet", "--index", tmp_path / "y", fails="together")
    table = write_table(tmp_path / "a.parquet")
    difftap("index", "build", table, "--size", 64, "--index", tmp_path / "y", fails="--size is for images")
    difftap("index", "build", table, "--metric", "dcor", "--index", tmp_path / "y", fails="no index can hold")
    difftap("index", "eval", table, "--index", index, fails="of another origin")
    difftap(
        "index", "eval", table, "--per-image", 3, "--index", index, fails="--per-image, --labels and --features are for"
    )
    assert not (tmp_path / "y").exists()


def test_the_mask_makes_a_query(scene):
    image = scene / "images" / "day" / "0.png"
    mask = ("--mask", scene / "mask.png", "--sheet", scene / "m.png")
    found = difftap("index", "search", image, *mask, "--index", scene / "p.index")
    assert json.loads(found.stdout)["query"]["kind"] == "mask"
    sheet = np.asarray(PIL.open(scene / "m.png").convert("RGB"))
    assert sheet.shape[1] == 1060


def test_an_object_is_framed_on_the_sheet(tmp_path):
    PIL.fromarray(np.full((100, 200, 3), 255, np.uint8)).save(tmp_path / "a.png")
    query = row_query(write_table(tmp_path / "a.parquet"), 0, origin())
    hit = {"rank": 1, "score": 0.5, "class": None, "image": "a", "instance": "a/1", "position": None}
    whole, framed = (
        np.asarray(draw_sheet(query, [{**hit, "box": box}], "cosine", [tmp_path])[0]).astype(int)
        for box in (None, [50, 20, 150, 80])
    )
    rows, columns = np.nonzero(np.abs(whole - framed).sum(axis=2))
    left, top = 10 + 210, 24 + 10 + 50  # the second tile; its picture lies in the middle of its height
    assert (columns.min() - left, rows.min() - top) == (49, 19)
    assert (columns.max() - left, rows.max() - top) == (150, 80)
    assert tuple(framed[top + 20, left + 100]) == (255, 90, 0)


def test_a_sheet_without_its_images(tmp_path):
    table = write_table(tmp_path / "a.parquet")
    query = row_query(table, 0, origin())
    hit = {"rank": 1, "score": 0.5, "class": "class1", "image": "nowhere", "instance": None, "position": None}
    hit["box"] = None
    sheet, missing = draw_sheet(query, [hit] * 7, "cosine; higher is nearer")
    assert missing == 8
    assert sheet.size == (1060, 24 + 2 * 248 + 10)


def test_bench_index(tmp_path):
    pytest.importorskip("threadpoolctl")
    arguments = ("bench", "index", "--vectors", 1500, "--width", 16, "--queries", 20, "--repeats", 1)
    kinds = [part for kind in ("flat", "ivf") for part in ("--kind", kind)]
    file = tmp_path / "x"
    difftap(*arguments, *kinds, "--file", file, "--json", tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert file.stat().st_size == 1500 * 16 * 2
    assert [(one["kind"], one["way"]) for one in data["measured"]] == [
        ("flat", "difftap"),
        ("flat", "faiss"),
        ("ivf", "difftap"),
        ("ivf", "faiss"),
    ]
    flat, theirs, ivf, _ = data["measured"]
    assert flat["recall"] == theirs["recall"] == 1
    assert ivf["recall"] > 0.8
    assert ivf["stated"] >= 0.95
    assert flat["nbytes"] == theirs["nbytes"] > 1500 * 16 * 4
    before = file.stat().st_mtime_ns
    difftap(*arguments, "--kind", "flat", "--no-direct", "--file", file)
    assert file.stat().st_mtime_ns == before  # made once
    other = tmp_path / "mine"
    other.write_text("mine")
    difftap(*arguments, "--file", other, fails="a file stands there")
