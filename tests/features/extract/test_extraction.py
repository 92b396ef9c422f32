"""The stream gives the pipeline's own features; faults are told, recorded, and do no harm to others."""

import errno
import gc
import json
import resource
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest

import difftap
from difftap.cli import cli
from difftap.errors import BackendError, ImageError, InputError, NonFiniteError, OutputError
from difftap.features.extract import Extractor, ExtractSettings, extract_to_store, stream
from difftap.features.extract.extraction import check_components, row_bytes
from difftap.features.sources import open_source
from difftap.features.store import Encoding, FeatureStore
from difftap.features.store import place as places
from difftap.features.store.care import verify
from difftap.features.store.writer import StoreWriter, shard_rows
from difftap.images import load_image
from difftap.machine import resident_memory
from difftap.pipeline.environment import Runtime
from difftap.pipeline.pipeline import Pipeline
from difftap.recipe import Branch, Recipe
from tests.features.extract.kill_case import SHARD
from tests.harness import MINI_TAPS, FakePipeline, numbered_pictures, picture, run_child, write_picture

pytest.importorskip("zarr")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(7):
        write_picture(folder / f"{number}.png", (30 + 5 * number, 24), seed=number)
    return folder


def flat(features):
    return [one for taps in features.branches for one in taps.values()]


def same(first, second):
    return first.digest == second.digest and all(
        (a.data == b.data).all() and a.geometry == b.geometry for a, b in zip(flat(first), flat(second), strict=True)
    )


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_the_stream_and_the_store_give_the_pipelines_features_bit_for_bit(mini, mini_cache, photos, tmp_path, fit):
    recipe = Recipe((Branch(MINI_TAPS, 261), Branch(MINI_TAPS, 50)), str(mini), size=(24, 16), ensemble=2, fit=fit)
    source = open_source(photos)
    with Pipeline.open(recipe, Runtime(cache=mini_cache.folder, threads=1)) as pipeline:
        want = list(pipeline.features([load_image(photos / item.key) for item in source]))
        got = [outcome.features for outcome in stream(pipeline, source)]
        assert all(map(same, got, want))
        run = extract_to_store(pipeline, source, tmp_path / "s.zarr", ExtractSettings(Encoding("float32"), shard=3))
        assert (run.written, run.failed, run.skipped) == (7, 0, 0)
        again = extract_to_store(pipeline, source, tmp_path / "s.zarr", ExtractSettings(Encoding("float32")))
        assert (again.written, again.skipped) == (0, 7)
        [first, *_] = Extractor(pipeline, source, size=4)
        assert first.keys == tuple(item.key for item in source.items[:4])
        assert (first["0/up1"][2] == want[2].branches[0]["up1"].data).all()
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert all(same(store.read(item.key), one) for item, one in zip(source, want, strict=True))
    assert list(verify(store)) == []


def spoil(pipeline, stage, digests, error=NonFiniteError):
    """Make a stage fail whenever one of the digests is in its batch."""
    inner = getattr(pipeline.stages, stage)

    def run(batch):
        if set(batch.digests) & set(digests):
            raise error("spoiled")
        return inner(batch)

    setattr(pipeline.stages, stage, run)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("stage", ["encode", "tap"])
def test_a_fault_is_its_own_images_whatever_the_batch(photos, batch, stage):
    (photos / "3b.png").write_text("no picture")
    (photos / "0a.png").write_bytes((photos / "0.png").read_bytes()[:60])
    source = open_source(photos)
    clean = {one.item.key: one.features for one in stream(FakePipeline(batch=1), source)}
    pipeline = FakePipeline(batch=batch)
    spoil(pipeline, stage, [load_image(photos / "5.png").digest])
    outcomes = list(stream(pipeline, source))
    assert [one.item.key for one in outcomes] == [item.key for item in source]
    faults = {one.item.key: one.fault for one in outcomes if one.features is None}
    assert set(faults) == {"0a.png", "3b.png", "5.png"}
    assert isinstance(faults["0a.png"], ImageError)
    assert isinstance(faults["5.png"], NonFiniteError)
    assert all(same(one.features, clean[one.item.key]) for one in outcomes if one.features is not None)


def test_failures_are_recorded_told_and_tried_again_only_when_asked(photos, tmp_path):
    (photos / "3b.png").write_text("no picture")
    path = tmp_path / "s.zarr"
    for earlier in (0, 7):
        run = extract_to_store(FakePipeline(), open_source(photos), path)
        assert (run.written, run.failed, run.skipped) == (7 - earlier, 1, earlier)
        assert "not a picture" in run.reasons[0]
    write_picture(photos / "3b.png", seed=9)
    assert extract_to_store(FakePipeline(), open_source(photos), path).failed == 1
    run = extract_to_store(FakePipeline(), open_source(photos), path, ExtractSettings(retry=True))
    assert (run.written, run.failed) == (1, 0)
    assert not FeatureStore.open(path).failures


def test_strict_stops_and_keeps_what_came_before(photos, tmp_path):
    (photos / "3b.png").write_text("no picture")
    with pytest.raises(ImageError, match="not a picture"):
        extract_to_store(FakePipeline(), open_source(photos), tmp_path / "s.zarr", ExtractSettings(strict=True))
    assert FeatureStore.open(tmp_path / "s.zarr").keys() == ["0.png", "1.png", "2.png", "3.png"]


def test_an_engine_that_dies_ends_the_run_and_loses_nothing(photos, tmp_path):
    pipeline = FakePipeline()
    spoil(pipeline, "tap", [load_image(photos / "4.png").digest], BackendError)
    before = set(threading.enumerate())
    with pytest.raises(BackendError, match="spoiled"):
        extract_to_store(pipeline, open_source(photos), tmp_path / "s.zarr")
    assert FeatureStore.open(tmp_path / "s.zarr").keys() == [f"{number}.png" for number in range(4)]
    # What zarr starts stays; ours, by their names, have ended.
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not [name for name in left if name.startswith(("decode", "vae", "unet"))], left
    run = extract_to_store(FakePipeline(), open_source(photos), tmp_path / "s.zarr")
    assert (run.written, run.skipped) == (3, 4)


@pytest.mark.parametrize("after", [3, 8, 15, 21])
def test_a_full_disk_leaves_what_was_safe(tmp_path, monkeypatch, after):
    put, count = places.put, 0

    def fill(path, data):
        nonlocal count
        count += 1
        if count > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(path, data)

    safe = []
    monkeypatch.setattr(places, "put", fill)
    with pytest.raises(OutputError, match=r"cannot write '.*s.zarr': the disk is full"):
        extract_to_store(
            FakePipeline(), numbered_pictures(40), tmp_path / "s.zarr", ExtractSettings(shard=4), progress=safe.append
        )
    monkeypatch.setattr(places, "put", put)
    if (tmp_path / "s.zarr" / "zarr.json").exists():
        assert len(FeatureStore.open(tmp_path / "s.zarr")) >= sum(safe)
    assert (
        extract_to_store(FakePipeline(), numbered_pictures(40), tmp_path / "s.zarr", ExtractSettings(shard=4)).failed
        == 0
    )
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert len(store) == 40
    assert list(verify(store)) == []


def test_pca_is_fitted_on_the_first_images_and_the_loss_is_stored(tmp_path, photos):
    settings = ExtractSettings(Encoding("int8", pca=3), sample=5, shard=2)
    extract_to_store(FakePipeline(), open_source(photos), tmp_path / "s.zarr", settings)
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert store.taps[0].values.shape == (7, 3, 8, 8)
    assert store.taps[0].basis.components.shape == (3, 16)
    assert store.read("0.png").branches[0]["up1"].data.shape == (16, 8, 8)
    fidelity = store.noted["fidelity"]["0/up1"]
    assert fidelity["maps"] == 4
    assert 0 < fidelity["error"] < 1
    with pytest.raises(difftap.DifftapError, match="99 components"):
        extract_to_store(FakePipeline(), open_source(photos), tmp_path / "t.zarr", ExtractSettings(Encoding(pca=99)))


def test_a_basis_is_used_though_the_first_run_had_failures_only(tmp_path, photos):
    (photos / "-.png").write_text("no picture")
    settings = ExtractSettings(Encoding("int8", pca=3), sample=5, shard=2, strict=True)
    with pytest.raises(ImageError):
        extract_to_store(FakePipeline(), open_source(photos), tmp_path / "s.zarr", settings)
    run = extract_to_store(FakePipeline(), open_source(photos), tmp_path / "s.zarr", settings)
    assert (run.written, run.failed) == (7, 1)
    assert list(verify(FeatureStore.open(tmp_path / "s.zarr"))) == []


def test_engines_go_on_while_a_shard_is_written(tmp_path, monkeypatch):
    """The next shard is made in the meantime, whole."""
    pipeline, made, commit = FakePipeline(), [], StoreWriter.commit
    inner = pipeline.stages.tap

    def tap(encoded):
        made.append(encoded)
        return inner(encoded)

    def slow(writer):
        until = time.monotonic() + 20
        while len(made) < min(32, writer.committed + 16):
            assert time.monotonic() < until, f"the engines stand still after {len(made)} images"
            time.sleep(0.001)
        return commit(writer)

    monkeypatch.setattr(pipeline.stages, "tap", tap)
    monkeypatch.setattr(StoreWriter, "commit", slow)
    extract_to_store(pipeline, numbered_pictures(32), tmp_path / "s.zarr", ExtractSettings(shard=8))
    assert len(FeatureStore.open(tmp_path / "s.zarr")) == 32


def test_nothing_is_kept_of_an_image_that_is_safe(tmp_path):
    """What Python itself holds at each commit."""
    held = []

    def note(count):
        if count:
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])

    source = numbered_pictures(1200)
    gc.collect()
    gc.freeze()  # what other tests left is not walked through again at every commit
    tracemalloc.start()
    try:
        extract_to_store(
            FakePipeline(shapes=((4, 3, 3),)), source, tmp_path / "s.zarr", ExtractSettings(shard=16), progress=note
        )
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    early, late = np.median(held[20:30]), np.median(held[-10:])
    assert (late - early) / (16 * (len(held) - 30)) < 64, held[::10]


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    held = []

    def note(count):
        if count:
            held.append(resident_memory())

    settings = ExtractSettings(shard=shard_rows(16 * 8 * 8 * 2))
    extract_to_store(
        FakePipeline(seconds=0.0002), numbered_pictures(3000), tmp_path / "store.zarr", settings, progress=note
    )
    assert held[-1] - held[len(held) // 10] < 12 << 20
    assert len(FeatureStore.open(tmp_path / "store.zarr")) == 3000


@pytest.mark.parametrize("shape", [(16, 8, 8), (256, 32, 32)])  # encoded by the writing thread, and by one of its own
def test_a_map_that_cannot_be_stored_is_its_images_failure(tmp_path, monkeypatch, shape):
    pipeline, source = FakePipeline(shapes=(shape,)), numbered_pictures(9)
    run = pipeline.engines[1]._run

    def large(feeds):
        made, large.count = run(feeds), large.count + 1
        return {name: value + 1e6 * (large.count == 4) for name, value in made.items()}

    large.count = 0
    monkeypatch.setattr(pipeline.engines[1], "_run", large)
    done = extract_to_store(pipeline, source, tmp_path / "s.zarr", ExtractSettings(shard=4))
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert (done.written, done.failed, len(store)) == (8, 1, 8)
    assert "float16 holds up to" in done.reasons[0]
    assert list(store.failures) == [source.items[3].key]
    large.count = 0
    with pytest.raises(InputError, match="float16 holds up to"):
        extract_to_store(pipeline, source, tmp_path / "t.zarr", ExtractSettings(shard=4, strict=True))
    assert len(FeatureStore.open(tmp_path / "t.zarr")) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scale", "map"], "--scale is of int8 alone; add --dtype int8"),
        (["--pca-sample", "4"], "--pca-sample is of a PCA alone; add --pca K"),
    ],
)
def test_options_that_would_do_nothing_are_refused(photos, tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        cli(["extract", str(photos), "-o", str(tmp_path / "s.zarr"), *options], standalone_mode=False)
    assert not (tmp_path / "s.zarr").exists()


def test_too_many_components_leave_no_store(tmp_path):
    with pytest.raises(InputError, match=r"pca is 9999; tap 'up1' has .* channels; allowed: 1 to"):
        extract_to_store(FakePipeline(), numbered_pictures(3), tmp_path / "s.zarr", ExtractSettings(Encoding(pca=9999)))
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize("shape", [(16, 8, 8), (256, 32, 32)])
def test_no_thread_is_left_when_writing_fails(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(StoreWriter, "put", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extract_to_store(
            FakePipeline(shapes=(shape,), seconds=0.001),
            numbered_pictures(40),
            tmp_path / "s.zarr",
            ExtractSettings(shard=4),
        )
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("encode", "unet", "vae", "decode"))]


def test_batches_of_images_arrays_and_paths(photos):
    arrays = np.stack([picture(number) for number in range(5)])
    batches = list(Extractor(FakePipeline(), arrays, size=2))
    assert [batch.keys for batch in batches] == [("0", "1"), ("2", "3"), ("4",)]
    assert batches[0]["up1"].shape == (2, 16, 8, 8)
    (photos / "bad.png").write_text("x")
    made = Extractor(FakePipeline(), [photos / "0.png", photos / "bad.png", load_image(photos / "1.png")])
    [batch] = made
    assert len(batch) == 2
    assert list(made.failures) == [str(photos / "bad.png")]
    with pytest.raises(ImageError):
        list(Extractor(FakePipeline(), [photos / "bad.png"], strict=True))
    with pytest.raises(difftap.DifftapError, match="allowed: 0/up1"):
        batch["up2"]


def test_batches_in_a_torch_loader():
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader(
        Extractor(FakePipeline(), numbered_pictures(5), size=2).torch(), batch_size=None
    )
    seen = [(batch["keys"], tuple(batch["0/up1"].shape)) for batch in loader]
    assert [shape for _, shape in seen] == [(2, 16, 8, 8), (2, 16, 8, 8), (1, 16, 8, 8)]
    assert list(seen[0][0]) == ["0000000", "0000001"]


def test_leaving_the_loop_early_ends_the_threads():
    before = threading.active_count()
    for _ in range(3):
        for _batch in Extractor(FakePipeline(), numbered_pictures(1000), size=2):
            break
    assert threading.active_count() <= before


def command(*arguments, cwd, limit=None):
    def cap():
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return run_child(arguments, cwd=cwd, preexec_fn=cap)


SMALL = ("--size", "64", "--ensemble", "2", "--threads", "1")


def test_the_command(photos, tmp_path):
    (photos / "bad.png").write_text("no picture")
    done = command("extract", "photos", "-o", "s.zarr", *SMALL, cwd=tmp_path)
    assert done.returncode == 1
    assert "7 images written" in done.stderr
    assert "bad.png" in done.stderr
    told = command("store", "info", "s.zarr", "--json", "--failures", cwd=tmp_path)
    data = json.loads(told.stdout)
    assert (data["images"], list(data["failures"]), data["complete"]) == (7, ["bad.png"], True)
    assert data["fidelity"]["0/up2"]["cosine"] > 0.99999
    assert command("store", "verify", "s.zarr", cwd=tmp_path).returncode == 0
    other = command("extract", "photos", "-o", "s.zarr", *SMALL, "--seed", "1", cwd=tmp_path)
    assert other.returncode == 2
    assert "recipe.seed is 0 there and 1 here" in other.stderr
    strict = command("extract", "photos", "-o", "t.zarr", *SMALL, "--strict", cwd=tmp_path)
    assert strict.returncode == 2
    assert strict.stderr.splitlines()[-1].startswith("error: 'photos/bad.png' is not a picture")
    full = command("extract", "photos", "-o", "u.zarr", *SMALL, cwd=tmp_path, limit=100_000)
    assert full.returncode == 2
    assert "cannot write 'u.zarr'" in full.stderr
    assert "Traceback" not in full.stderr
    (photos / "bad.png").unlink()
    assert command("extract", "photos", "-o", "u.zarr", *SMALL, cwd=tmp_path).returncode == 0
    (tmp_path / "s.zarr" / "0" / "up2" / "c" / "0" / "0" / "0" / "0").unlink()
    assert command("store", "verify", "s.zarr", cwd=tmp_path).returncode == 1


def test_bytes_of_an_image_by_hand(pocket):
    recipe = Recipe((Branch(("up1", "up2"), 1),), size=(256, 128), ensemble=1)
    up1, up2 = (pocket.tap(name) for name in ("up1", "up2"))
    cells = [(256 // tap.stride) * (128 // tap.stride) for tap in (up1, up2)]
    assert row_bytes(recipe, pocket, Encoding()) == 2 * (up1.channels * cells[0] + up2.channels * cells[1])
    assert row_bytes(recipe, pocket, Encoding("int8", pca=8)) == 8 * sum(cells)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_holds_an_image_at_least(size):
    with pytest.raises(InputError, match=f"size is {size}; allowed: 1 or more"):
        Extractor(FakePipeline(), numbered_pictures(1), size=size)


COUNT, KILLS = 300, 36


@pytest.mark.heavy
def test_many_random_kills(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.features.extract.kill_case", str(tmp_path), str(COUNT), str(KILLS)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] >= KILLS // 2
    progressed = sum(one["in"] > 0 for one in told["seen"])
    assert progressed >= 5  # the kills must have come while there was something to lose
    for one in told["seen"]:
        assert one["lost"] == []
        assert one["moved"] == []
        assert one["repeated"] == 0
        assert one["safe"] <= one["in"]  # what was reported is in; a little more may be
    assert told["keys"] == [item.key for item in numbered_pictures(COUNT)]
    assert list(verify(FeatureStore.open(tmp_path / "s.zarr"))) == []
    extract_to_store(
        FakePipeline(shapes=((4, 3, 3),)),
        numbered_pictures(COUNT),
        tmp_path / "whole.zarr",
        ExtractSettings(Encoding("int8"), shard=SHARD),
    )
    first, second = (FeatureStore.open(tmp_path / name) for name in ("s.zarr", "whole.zarr"))
    assert [(row.key, row.sha256) for row in first.rows] == [(row.key, row.sha256) for row in second.rows]


def test_as_many_components_as_a_tap_has_channels_may_be_kept(pocket):
    recipe = FakePipeline().recipe
    channels = pocket.tap("up1").channels
    check_components(recipe, pocket, Encoding(pca=channels))
    with pytest.raises(InputError, match=f"pca is {channels + 1}; tap 'up1' has {channels} channels"):
        check_components(recipe, pocket, Encoding(pca=channels + 1))
