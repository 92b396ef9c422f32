"""Building tables: what comes out, resuming after a kill at any point, other conditions, images that fail."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from difftap.artifacts.run import Run
from difftap.errors import InputError, NonFiniteError, OutputError
from difftap.images import Image
from difftap.pipeline.environment import Runtime
from difftap.pipeline.pipeline import Pipeline
from difftap.prototypes import (
    ObjectFilter,
    PrototypeTable,
    SceneSource,
    build,
    is_built,
    make_scene,
    narrowed,
    prototypes,
    recipe_column,
)
from difftap.prototypes import build as build_function
from difftap.recipe import Branch, load_recipe
from tests.datasets.builders import write_folder, write_voc
from tests.harness import invoke, picture

pytest.importorskip("pyarrow")
RECIPE = replace(load_recipe("pocket-semantics"), size=(128, 128))


def scenes(count=5, faulty=(), empty=()):
    """A source of small pictures with one or two objects each."""

    def read(key):
        k = int(key)
        if k in faulty:
            raise InputError(f"no image at '{key}'")
        image = Image(picture(k, (40, 30)))
        masks = np.zeros((2, 30, 40), np.bool_)
        masks[0, :15, : 20 + k % 5] = True
        masks[1, 20:, 5:9] = True
        found = [(f"{key}/{i}", ["cat", "dog"][i], masks[i]) for i in range(0 if k in empty else 1 + k % 2)]
        return make_scene(key, image, found, ObjectFilter(min_area=0.0), {"crowd": 1})

    return SceneSource("test", tuple(map(str, range(count))), read, {"split": "all"})


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    with Pipeline.open(RECIPE, Runtime(threads=1, cache=tmp_path_factory.mktemp("cache"))) as opened:
        yield opened


def column(path, pipe):
    return recipe_column(path, pipe.recipe)


def test_a_table_holds_every_object_once(tmp_path, pipeline):
    source = scenes(20)
    built = build(source, pipeline, [column(tmp_path / "t.parquet", pipeline)])
    table = PrototypeTable.load(tmp_path / "t.parquet")
    assert (built.rows, built.images, built.resumed, len(table)) == (30, 20, 0, 30)
    assert table.instances.tolist() == [f"{k}/{i}" for k in range(20) for i in range(1 + k % 2)]
    assert set(table.taps) == {"down2.attn0"}
    assert set(table.timesteps) == {0}
    scene = source.read("3")
    [features] = pipeline.features([scene.image])
    vectors, cells = prototypes([features.branches[0]["down2.attn0"]], scene.masks)
    mine = table.take(table.images == "3")
    assert np.array_equal(mine.vectors, vectors)
    assert mine.cells.tolist() == cells.counts.tolist()
    assert mine.areas == pytest.approx(scene.masks.mean(axis=(1, 2)))
    assert built.small[0] == table.small.sum() == 10  # the little dog has no cell of its own
    made = table.provenance
    assert mine.boxes.tolist() == [[0, 0, 23, 15], [5, 20, 9, 30]]
    assert made["recipe_key"] == RECIPE.key()
    assert made["feature_key"] == RECIPE.feature_key()
    assert made["model_key"] == pipeline.conditions["model"]["key"]
    assert made["counts"]["left_out"] == {"crowd": 20}
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_images_that_fail_and_images_without_objects_are_counted(tmp_path, pipeline):
    built = build(scenes(6, faulty=(1,), empty=(0, 2)), pipeline, [column(tmp_path / "t", pipeline)])
    assert (built.images, built.empty, built.failures) == (3, 2, (("1", "no image at '1'"),))
    assert PrototypeTable.load(tmp_path / "t").provenance["failures"] == [["1", "no image at '1'"]]
    with pytest.raises(InputError, match=r"no object of 'test' gives a prototype: 2 images failed \(0: no image"):
        build(scenes(2, faulty=(0, 1)), pipeline, [column(tmp_path / "u", pipeline)])
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_spoiled_image_harms_no_other(tmp_path, pipeline, monkeypatch):
    source, real = scenes(6), pipeline.features
    bad = source.read("3").image.digest

    def features(images):
        for image in images:
            if image.digest == bad:
                raise NonFiniteError("output holds NaN")
            yield from real([image])

    monkeypatch.setattr(pipeline, "features", features)
    built = build(source, pipeline, [column(tmp_path / "t", pipeline)])
    assert built.failures == (("3", "output holds NaN"),)
    assert sorted(set(PrototypeTable.load(tmp_path / "t").images)) == ["0", "1", "2", "4", "5"]


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    """The table that an unbroken run writes."""
    path = tmp_path_factory.mktemp("whole") / "whole"
    build(scenes(40), pipeline, [column(path, pipeline)])
    return path.read_bytes()


class Stopped(BaseException):
    """As final as a kill, within one process."""


@pytest.mark.parametrize("stop", ["read", "part", "record", "table"])
@pytest.mark.parametrize("nth", [1, 2], ids=["first", "second"])
def test_a_stopped_run_goes_on_and_nothing_is_lost_or_doubled(tmp_path, pipeline, monkeypatch, stop, nth, whole):
    source = scenes(40)
    seen = []

    def stopping(function, after=False):
        def wrapped(*arguments, **options):
            seen.append(1)
            if len(seen) == nth and not after:
                raise Stopped
            result = function(*arguments, **options)
            if len(seen) == nth:
                raise Stopped
            return result

        return wrapped

    module = sys.modules[build_function.__module__]
    with monkeypatch.context() as patch:
        broken = source
        if stop == "read":
            count = []

            def read(key):
                count.append(1)
                if len(count) == 15 * nth:
                    raise Stopped
                return source.read(key)

            broken = replace(source, read=read)
        elif stop == "part":
            patch.setattr(PrototypeTable, "save", stopping(PrototypeTable.save, after=True))
        elif stop == "record":
            patch.setattr(Run, "write", stopping(Run.write, after=True))
        else:
            seen.extend([1] * (nth - 1))
            patch.setattr(module, "save_stream", stopping(module.save_stream))
        with pytest.raises(Stopped):
            build(broken, pipeline, [column(tmp_path / "t", pipeline)])
    assert not (tmp_path / "t").exists()
    built = build(source, pipeline, [column(tmp_path / "t", pipeline)])
    if stop == "table":
        assert built.resumed == 40
    assert (tmp_path / "t").read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_several_columns_come_from_one_pass(tmp_path, tmp_path_factory):
    branches = (Branch(("down2.attn0",), 0), Branch(("down2.attn0",), 300))
    recipe = replace(RECIPE, branches=branches)
    with Pipeline.open(recipe, Runtime(threads=1, cache=tmp_path_factory.mktemp("cache"))) as opened:
        both = recipe_column(tmp_path / "both", recipe)
        assert (both.taps, both.timestep) == ("down2.attn0@0+down2.attn0@300", -1)
        one = [
            replace(
                recipe_column(tmp_path / str(t), narrowed(recipe, ("down2.attn0",), t)), parts=((k, "down2.attn0"),)
            )
            for k, t in enumerate((0, 300))
        ]
        build(scenes(3), opened, [*one, both])
    first, second, joined = (PrototypeTable.load(tmp_path / name) for name in ("0", "300", "both"))
    assert set(second.timesteps) == {300}
    assert np.array_equal(joined.vectors, np.concatenate([first.vectors, second.vectors], axis=1))
    assert not np.array_equal(first.vectors, second.vectors)
    assert first.provenance["feature_key"] == RECIPE.feature_key() != second.provenance["feature_key"]
    with Pipeline.open(RECIPE, Runtime(threads=1, cache=tmp_path_factory.mktemp("cache"))) as opened:
        build(scenes(3), opened, [recipe_column(tmp_path / "alone", RECIPE)])
    assert np.array_equal(PrototypeTable.load(tmp_path / "alone").vectors, first.vectors)


def test_other_conditions_are_refused(tmp_path, pipeline):
    path = tmp_path / "t"
    source, own = scenes(3), column(path, pipeline)
    here = pipeline.conditions
    assert not is_built(source, own, "area", here)
    build(source, pipeline, [own])
    assert is_built(source, own, "area", here)
    others = [
        {"model": {"key": "0"}},
        {"backend": {**here["backend"], "name": "torch"}},
        {"backend": {**here["backend"], "precision": "fp16"}},
        {"store": {"encoding": {"dtype": "int8"}}},
    ]
    for changed in [(scenes(4), own, "area", here), (source, own, "nearest", here),
                    *((source, own, "area", {**here, **one}) for one in others)]:  # fmt: skip
        with pytest.raises(OutputError, match="was built under other conditions"):
            is_built(*changed)
    path.write_bytes(b"something else")
    with pytest.raises(OutputError, match="is no table of prototypes"):
        is_built(source, own, "area", here)
    begun = tmp_path / ".u.parts"
    begun.mkdir()
    (begun / "run.jsonl").write_text(json.dumps({"type": "run", "step": 1}) + "\n")
    with pytest.raises(OutputError, match="was begun under other conditions"):
        build(source, pipeline, [column(tmp_path / "u", pipeline)])
    build(source, pipeline, [column(tmp_path / "u", pipeline)], overwrite=True)
    assert len(PrototypeTable.load(tmp_path / "u")) == 4


def test_two_runs_do_not_write_one_table(tmp_path, pipeline):
    source = scenes(2)

    def read(key):
        with pytest.raises(OutputError, match="another run is writing it"):
            build(scenes(1), pipeline, [column(tmp_path / "t", pipeline)])
        return source.read(key)

    build(replace(source, read=read), pipeline, [column(tmp_path / "t", pipeline)])


def run(*arguments):
    return invoke(list(map(str, arguments)))


def test_the_command_builds_and_describes(tmp_path):
    root = write_voc(tmp_path / "VOC2012")
    out = tmp_path / "voc.parquet"
    result = run("prototypes", "build", "voc", tmp_path, "-o", out, "--size", 128)
    assert result.exit_code == 0, result.output
    assert "5 prototypes of 2 images written" in result.stderr
    assert run("prototypes", "build", "voc", root, "-o", out, "--size", 128).stderr.startswith(f"'{out}' is there")
    shown = run("prototypes", "info", out).stdout
    assert shown.startswith("5 prototypes of 160 channels; 2 images, 5 instances\ntap down2.attn0 at t = 0; rule area")
    assert "  cat     3" in shown
    counts = json.loads(run("prototypes", "info", out, "--json").stdout)
    assert counts["classes"] == {"cat": 3, "dog": 1, "person": 1}
    assert counts["provenance"]["data"]["name"] == "voc"


def test_features_come_from_a_store_where_it_has_them(tmp_path, monkeypatch):
    pytest.importorskip("zarr")
    root = write_voc(tmp_path / "VOC2012")
    store, stored, fresh = tmp_path / "s.zarr", tmp_path / "stored", tmp_path / "fresh"
    made = ("--recipe", "pocket-semantics", "--size", 128)
    assert run("extract", root / "JPEGImages", "-o", store, *made, "--dtype", "float32", "--limit", 1).exit_code == 0
    result = run("prototypes", "build", "voc", root, "-o", stored, "--features", store, "--size", 128)
    assert result.exit_code == 0, result.output
    assert f"1 images were not in {store} and were extracted" in result.stderr
    assert run("prototypes", "build", "voc", root, "-o", fresh, "--size", 128).exit_code == 0
    a, b = PrototypeTable.load(stored), PrototypeTable.load(fresh)
    assert np.array_equal(a.vectors, b.vectors)
    assert a.provenance["conditions"]["store"]["encoding"]["dtype"] == "float32"
    refused = run("prototypes", "build", "voc", root, "-o", fresh, "--features", store, "--size", 128)
    assert "store" in str(refused.exception)
    other = run("prototypes", "build", "voc", root, "-o", tmp_path / "x", "--features", store, "--size", 64)
    assert "were made with size = [128, 128]" in str(other.exception)
    precise = run(
        "prototypes",
        "build",
        "voc",
        root,
        "-o",
        tmp_path / "x",
        "--features",
        store,
        "--size",
        128,
        "--precision",
        "int8",
    )
    assert "give --precision fp32" in str(precise.exception)
    assert not (tmp_path / "x").exists()
    run("extract", root / "JPEGImages", "-o", store, *made, "--dtype", "float32")
    monkeypatch.setattr(Pipeline, "open", lambda *_, **__: pytest.fail("an engine was opened"))
    result = run("prototypes", "build", "voc", root, "-o", tmp_path / "all", "--features", store, "--size", 128)
    assert result.exit_code == 0, result.output
    assert np.array_equal(PrototypeTable.load(tmp_path / "all").vectors, b.vectors)


def test_a_table_of_the_backend_that_is_chosen_is_known_again(tmp_path, monkeypatch):
    import difftap.pipeline.fastest

    chosen = difftap.pipeline.fastest.Choice("ort", "cpu", {}, (), {})
    monkeypatch.setattr(difftap.pipeline.fastest, "choose", lambda *_, **__: chosen)
    root = write_voc(tmp_path / "VOC2012")
    command = ("prototypes", "build", "voc", root, "-o", tmp_path / "t", "--size", 64, "--backend", "auto")
    assert run(*command).exit_code == 0
    assert "is there already" in run(*command).stderr
    assert "is there already" in run(*command[:-1], "ort").stderr


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--rule", "most"), "--rule is 'most'; allowed: area, nearest"),
        (("--classes", " , "), "--classes is ' , '"),
        (("--min-area", "2"), "min-area is 2.0"),
        (("--crowds", "exclude", "--split", "val"), "lacks 'ImageSets/Segmentation/val.txt'"),
        (("--crowds", "include"), "has no option --crowds"),
        (("--tap", "nope"), "no tap 'nope'"),
        (("--split", "trainval", "--list", "x"), "give one of them"),
        (("-o", "/nowhere/t"), "cannot write '/nowhere/t': its folder does not exist"),
    ],
)
def test_bad_options_write_nothing(tmp_path, extra, message):
    root = write_voc(tmp_path / "VOC2012")
    result = run("prototypes", "build", "voc", root, "-o", tmp_path / "t", "--size", 128, *extra)
    assert message in str(result.exception)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(("t", ".t"))] == []


def test_voc_classes_of_coco_have_cocos_names():
    from difftap.datasets.chosen_objects import classes_of

    assert "airplane" in classes_of("voc", "coco")
    assert "aeroplane" in classes_of("voc", "voc")
    assert len(classes_of("voc", "coco")) == len(set(classes_of("voc", "coco"))) == 20
    assert classes_of("a, b", "voc") == ("a", "b")


def test_backends_agree(tmp_path):
    pytest.importorskip("diffusers")
    write_folder(tmp_path / "data")
    tables = []
    for backend in ("ort", "torch"):
        out = tmp_path / f"{backend}.parquet"
        result = run("prototypes", "build", "folder", tmp_path / "data", "-o", out, "--size", 64, "--backend", backend)
        assert result.exit_code == 0, result.output
        tables.append(PrototypeTable.load(out))
    assert len(tables[0]) == 3
    assert tables[0].instances.tolist() == tables[1].instances.tolist()
    assert tables[0].vectors == pytest.approx(tables[1].vectors, abs=2e-4 * float(np.abs(tables[0].vectors).max()))


def test_failed_images_make_the_exit_code_1(tmp_path):
    root = write_voc(tmp_path / "VOC2012")
    (root / "SegmentationClass/a.png").write_bytes(b"no picture")
    result = run("prototypes", "build", "voc", root, "-o", tmp_path / "t", "--size", 128)
    assert result.exit_code == 1
    assert "a failed: " in result.stderr
    assert len(PrototypeTable.load(tmp_path / "t")) == 2
