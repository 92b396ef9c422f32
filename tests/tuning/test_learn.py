"""Trainings from end to end on random networks: what is written, resumed, refused, and used again without torch."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from difftap.backbones.checkpoint import Checkpoint
from difftap.coords import Geometry
from difftap.engine import Cache
from difftap.errors import InputError, MissingExtraError, ModelError, OutputError, RecipeError
from difftap.pipeline.environment import Runtime
from difftap.pipeline.pipeline import Pipeline
from difftap.prompts.learned import load_learned
from difftap.recipe import Learned, ModelReference, load_recipe
from difftap.tuning.posteriors import ImagePosterior
from difftap.tuning.settings import TuneSettings
from difftap.tuning.training_pairs import TrainingPairs
from tests.bench.pck_cases import samples
from tests.tuning.conftest import learn, recipe

torch = pytest.importorskip("torch")

from difftap.tuning.learner import views_of  # noqa: E402
from difftap.tuning.loop import ProgressCallbacks  # noqa: E402


class Stopped(Exception):
    """Stands for whatever ends a run."""


def stop_after(steps):
    def step(done, _of, _left):
        if done == steps:
            raise Stopped

    return ProgressCallbacks(step)


def content(folder):
    return (folder / "prompt.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["single", "class", "cpm"])
def test_a_training_of_each_kind(mini, pairs, cache, tmp_path, kind):
    rows = []
    told = ProgressCallbacks(epoch=lambda progress, row: rows.append((dict(progress.empty), row)))
    tuned = learn(mini, pairs, tmp_path / "out", kind, cache=cache, watcher=told, rate=0.1, linear_rate=0.1)
    found = load_learned(tmp_path / "out")
    assert found.sha256 == tuned.prompts.sha256
    assert found.kind == kind
    assert found.classes == (() if kind == "single" else ("cat", "dog"))
    (embedding,) = found.embeddings
    assert embedding.shape == (1 if kind == "single" else 2, 6, 6)
    assert [row["epoch"] for _, row in rows] == [1, 2]
    assert set(rows[0][0]) == {"0.05", "0.1"}
    assert found.about["steps"] == 4
    assert found.about["data"]["name"] == "synthetic"
    assert found.about["made_with"]["processes"] == 1
    course = json.loads((tmp_path / "out" / "training.json").read_text())
    assert len(course["groups"][0]["losses"]) == 4
    assert (tmp_path / "out" / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert tuned.images == len({view for one in [*pairs.train, *pairs.val] for view in views_of(one)})
    if kind == "class":
        assert (embedding[0] != embedding[1]).any()


def test_the_loss_falls(mini, pairs, cache, tmp_path):
    learn(mini, pairs, tmp_path / "out", cache=cache, epochs=5, batch=2, rate=0.3)
    losses = json.loads((tmp_path / "out" / "training.json").read_text())["groups"][0]["losses"]
    assert np.mean(losses[-2:]) < np.mean(losses[:2]) - 1e-3


@pytest.mark.parametrize("kind", ["class", "cpm"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_stopped_run_goes_on_to_the_same_file(mini, pairs, cache, tmp_path, monkeypatch, kind, steps):
    monkeypatch.setattr("difftap.tuning.loop._EVERY", 0.0)
    more = {"cache": cache, "joint": "separate", "branches": 2}
    whole = learn(mini, pairs, tmp_path / "whole", kind, **more)
    with pytest.raises(Stopped):
        learn(mini, pairs, tmp_path / "parts", kind, watcher=stop_after(steps), **more)
    assert not (tmp_path / "parts" / "prompt.safetensors").exists()
    tuned = learn(mini, pairs, tmp_path / "parts", kind, **more)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert tuned.images < whole.images  # the VAE's work is kept, too


def test_a_longer_run_extends_a_shorter_one(mini, pairs, cache, tmp_path):
    learn(mini, pairs, tmp_path / "short", cache=cache)
    done = []
    learn(
        mini,
        pairs,
        tmp_path / "short",
        cache=cache,
        epochs=3,
        watcher=ProgressCallbacks(lambda a, b, c: done.append(a)),
    )
    learn(mini, pairs, tmp_path / "long", cache=cache, epochs=3)
    assert done == [5, 6]
    assert content(tmp_path / "short") == content(tmp_path / "long")


def test_limits_on_steps(mini, pairs, cache, tmp_path):
    tuned = learn(mini, pairs, tmp_path / "out", cache=cache, epochs=5, steps=3)
    assert tuned.prompts.about["steps"] == 3
    assert tuned.scores[0]["epochs"] == 2


KILLED = """
import sys
from pathlib import Path
import difftap.tuning.loop as loop
loop._EVERY = 0.0
from difftap.engine import Cache
from tests.bench.pck_cases import samples
from tests.tuning.conftest import learn
from difftap.tuning.training_pairs import TrainingPairs
model, out, cache, pictures = map(Path, sys.argv[1:])
made = samples(pictures)
about = {"name": "synthetic", "how": "by hand", "train_pairs": 4, "val_pairs": 2}
pairs = TrainingPairs(made[:2] + made[3:5], [made[2], made[5]], about)
def step(done, of, left):
    print(done, flush=True)
learn(model, pairs, out, "class", cache=Cache(cache), epochs=6, watcher=loop.ProgressCallbacks(step))
"""


def test_a_killed_process_goes_on_to_the_same_file(mini, pairs, cache, tmp_path):
    """SIGKILL, wherever it hits."""
    learn(mini, pairs, tmp_path / "whole", "class", cache=cache, epochs=6)
    arguments = [mini, tmp_path / "killed", cache.folder, tmp_path / "pictures"]
    child = subprocess.Popen([sys.executable, "-c", KILLED, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if int(line) == 3:
            time.sleep(0.05)
            os.kill(child.pid, signal.SIGKILL)
            break
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "prompt.safetensors").exists()
    learn(mini, pairs, tmp_path / "killed", "class", cache=cache, epochs=6)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_another_training_in_the_folder_is_refused(mini, pairs, cache, tmp_path):
    learn(mini, pairs, tmp_path / "out", cache=cache)
    before = content(tmp_path / "out")
    for change in ({"rate": 0.5}, {"kind": "class"}, {"threads": 2}, {"tokens": 4}):
        with pytest.raises(OutputError, match="begun under other conditions"):
            learn(mini, pairs, tmp_path / "out", cache=cache, **change)
    assert content(tmp_path / "out") == before
    learn(mini, pairs, tmp_path / "out", cache=cache, rate=0.5, overwrite=True)
    assert content(tmp_path / "out") != before


def test_a_damaged_state_is_refused(mini, pairs, cache, tmp_path):
    learn(mini, pairs, tmp_path / "out", cache=cache)
    state = tmp_path / "out" / "training" / "state.0.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(OutputError, match="cannot be read"):
        learn(mini, pairs, tmp_path / "out", cache=cache)


def test_a_full_disk_ends_the_run_with_one_line(mini, pairs, cache, tmp_path, monkeypatch):
    import errno

    def full(path, data):
        raise OutputError(f"cannot write '{path}': the disk is full") from OSError(errno.ENOSPC, "No space")

    with monkeypatch.context() as patch:
        patch.setattr("difftap.tuning.loop.write_atomic", full)
        with pytest.raises(OutputError, match="disk is full"):
            learn(mini, pairs, tmp_path / "out", cache=cache)
    assert not list((tmp_path / "out").rglob("*.part"))
    learn(mini, pairs, tmp_path / "out", cache=cache)


def test_two_at_once_in_one_folder(mini, pairs, cache, tmp_path):
    from filelock import FileLock

    (tmp_path / "out" / "training").mkdir(parents=True)
    with FileLock(str(tmp_path / "out" / "training" / ".lock")), pytest.raises(OutputError, match="another run"):
        learn(mini, pairs, tmp_path / "out", cache=cache)


def test_what_does_not_fit_is_refused_first(mini, clip, pairs, cache, tmp_path):
    for error, words, more in (
        (RecipeError, "one for each", {"timesteps": (1, 2)}),
        (InputError, "timestep is 1000", {"timesteps": (1000,)}),
        (InputError, "allowed: 1 to 10", {"model": clip, "tokens": 11}),
        (RecipeError, "no tap 'up9'", {"kind": "cpm", "image_tap": "up9"}),
        (ModelError, "own., a DINOv2 folder", {"kind": "cpm", "image_tokens": "nowhere"}),
        (InputError, "precision is 'int8'", {"precision": "int8"}),
    ):
        model = more.pop("model", mini)
        with pytest.raises(error, match=words):
            learn(model, pairs, tmp_path / "out", cache=cache, **more)
        assert not (tmp_path / "out" / "prompt.safetensors").exists()


def test_without_torch_the_pip_line(mini, pairs, cache, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'difftap\[tune\]'"):
        learn(mini, pairs, tmp_path / "out", cache=cache)


def test_an_image_of_another_size_is_named(mini, pairs, cache, tmp_path):
    wrong = dataclasses.replace(pairs.train[0], source_size=(1, 1))
    broken = dataclasses.replace(pairs, train=[wrong, *pairs.train[1:]])
    with pytest.raises(InputError, match="its annotation says 1 x 1"):
        learn(mini, broken, tmp_path / "out", cache=cache)


def maps(one, images, category=None):
    with Pipeline.open(one, Runtime("torch", threads=1)) as pipeline:
        return pipeline.pair(*images, category), pipeline


@pytest.fixture
def images(pairs):
    from difftap.images import load_image

    return load_image(pairs.train[0].source), load_image(pairs.train[0].target)


@pytest.mark.parametrize("network", ["mini", "clip"])
def test_conditional_prompts_in_matching_are_those_of_learning(request, network, pairs, cache, tmp_path, images):
    """The exported head (and text encoder) gives the prompt that the learned module gives."""
    model = request.getfixturevalue(network)
    learn(model, pairs, tmp_path / "out", "cpm", cache=cache, rate=0.2, linear_rate=0.1, epochs=3, tokens=5)
    one = recipe(model, learned=Learned(str(tmp_path / "out"), "cpm"))
    pair = pairs.train[0].source, pairs.train[0].target
    from safetensors.torch import load_file

    from difftap.engine.torch_prompts import ConditionalHead
    from difftap.tuning.learner import open_space

    space = open_space(Checkpoint.load(model), cache, "cpu", 5)
    values = load_file(tmp_path / "out" / "prompt.safetensors")
    own = {name.removeprefix("0.head."): value for name, value in values.items() if name.startswith("0.head.")}
    source = load_learned(tmp_path / "out").image_tokens
    head = ConditionalHead(source.channels, source.count, own["shared"], 4, space.start, space.end)
    head.load_state_dict(own)
    assert own["alpha"].shape == (1, 4, space.width)  # one a token and channel
    assert own["alpha"].unique().numel() > 1
    with Pipeline.open(one, Runtime("torch", threads=1, cache=cache.folder)) as pipeline:
        book = pipeline.prompts
        for image in images:
            book.know(image.digest, image)
        from difftap.prompts import Subject

        (prompt,) = book.choose(Subject(pair=(images[0].digest, images[1].digest)))
        got = book.embedding(prompt)
        tokens = [torch.from_numpy(book._conditional._known[image.digest])[None] for image in images]
    with torch.no_grad():
        want = space.encode(head(*tokens))[0].numpy()
    assert got.shape == want.shape
    assert np.allclose(got, want, atol=1e-5)
    assert pair[0] != pair[1]


def test_the_modes_of_conditional_prompts(mini, pairs, cache, tmp_path, images):
    learn(mini, pairs, tmp_path / "out", "cpm", cache=cache, rate=0.2, linear_rate=0.1, epochs=3)
    found = {}
    for mode in ("pair", "class", "image"):
        one = recipe(mini, learned=Learned(str(tmp_path / "out"), "cpm", mode))
        found[mode], pipeline = maps(one, images, "cat" if mode == "class" else None)
        assert pipeline.prompts.depends_on == {"class": "category"}.get(mode, mode)
        assert pipeline.conditions["prompts"]["mode"] == mode
    for first, second in (("pair", "class"), ("pair", "image"), ("class", "image")):
        assert not np.array_equal(found[first][0][0].data, found[second][0][0].data)
    again, _ = maps(recipe(mini, learned=Learned(str(tmp_path / "out"), "cpm", "image")), (images[0], images[0]))
    assert np.array_equal(again[0][0].data, found["image"][0][0].data)  # whatever the partner
    with Pipeline.open(
        recipe(mini, learned=Learned(str(tmp_path / "out"), "cpm", "image")), Runtime("torch", threads=1)
    ) as one:
        streamed = list(one.features(images))  # as tables of prototypes and indexes ask for them
    assert all(
        np.array_equal(x.branches[0]["up1"].data, y[0].data) for x, y in zip(streamed, found["image"], strict=True)
    )
    swapped, _ = maps(recipe(mini, learned=Learned(str(tmp_path / "out"))), images[::-1])
    assert not np.array_equal(swapped[1][0].data, found["pair"][0][0].data)  # the head tells source from target


def test_dinov2_tokens(mini, dino, pairs, cache, tmp_path, images):
    learn(mini, pairs, tmp_path / "out", "cpm", cache=cache, image_tokens=str(dino), rate=0.2, epochs=3)
    source = load_learned(tmp_path / "out").image_tokens
    assert (source.kind, source.count, source.channels, source.side) == ("dinov2", 256, 8, 32)
    one = recipe(mini, learned=Learned(str(tmp_path / "out"), "cpm"))
    with Pipeline.open(one, Runtime("torch", threads=1, cache=cache.folder)) as pipeline:
        pipeline.pair(*images)
        got = pipeline.prompts._conditional._known[images[0].digest]
    from difftap.export.conditional import image_network
    from difftap.prompts.tokens import dino_input

    with torch.inference_mode():
        want = image_network(dino)(torch.from_numpy(dino_input(images[0], 32)[None]))[0].numpy()
    assert np.allclose(got, want, atol=1e-4)


def test_vae_and_tokens_once_an_image(mini, pairs, cache, tmp_path, images):
    learn(mini, pairs, tmp_path / "out", "cpm", cache=cache)
    one = recipe(mini, learned=Learned(str(tmp_path / "out"), "cpm"))
    with Pipeline.open(one, Runtime("torch", threads=1, cache=cache.folder)) as pipeline:
        first = pipeline.pair(*images)
        second = pipeline.pair(*images[::-1])
        assert pipeline._featurizer._latents.encoded == 2
        assert pipeline.prompts._conditional.made == 2
        again = pipeline.pair(*images)
    assert np.array_equal(first[0][0].data, again[0][0].data)
    assert len(second) == 2


@pytest.mark.slow
def test_several_processes_learn_what_one_does(mini, pairs, cache, tmp_path):
    """Two processes over gloo: the same prompt but for rounding, whichever of them thinks it time to save."""
    pytest.importorskip("accelerate")
    learn(mini, pairs, tmp_path / "one", "class", cache=cache, batch=4, epochs=1)
    code = KILLED.replace("epochs=6", "epochs=1, batch=4")
    code = code.replace("_EVERY = 0.0", "_EVERY = 0.0 if __import__('os').environ['RANK'] == '0' else 1e9")
    arguments = [mini, tmp_path / "two", cache.folder, tmp_path / "pictures"]
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    one, two = (load_learned(tmp_path / name) for name in ("one", "two"))
    assert two.about["made_with"]["processes"] == 2
    assert np.allclose(one.embeddings[0], two.embeddings[0], atol=1e-4)


class Given:
    """Seeded latents in the VAE's place: its memory is freed before the first step."""

    def __init__(self, side):
        self._side = side

    def get(self, view, size):
        rng = np.random.default_rng(len(str(view.path)))
        mean, std, first, second = (
            rng.standard_normal((4, self._side, self._side)).astype(np.float32) for _ in range(4)
        )
        geometry = Geometry.stretch(tuple(size), (8 * self._side, 8 * self._side))
        return ImagePosterior(mean, abs(std), first[None], second[None], np.zeros((0, 0), np.float32), geometry)


@pytest.mark.slow
def test_one_step_at_full_size_fits_into_24_gigabytes(tmp_path):
    import torch

    from difftap.backbones.find import open_model
    from difftap.prompts import encode_prompt
    from difftap.tuning.learner import Learner, open_space
    from difftap.tuning.loop import ProcessGroup, TrainingLoop
    from difftap.tuning.passes import TappedUNet

    torch.set_num_threads(2)
    cache = Cache(tmp_path) if "DIFFTAP_FULL_SIZE_CACHE" not in os.environ else Cache(_path("DIFFTAP_FULL_SIZE_CACHE"))
    model = open_model(ModelReference("sd21", random_weights=0), cache)
    recipe, settings = load_recipe("sd4match-single"), TuneSettings("single", epochs=1, batch=1, checkpointing=True)
    (pair, *_) = samples(tmp_path / "pictures")
    pairs = TrainingPairs([pair], [pair], {"name": "spair"})
    space = open_space(model, cache, "cpu")
    learner = Learner(settings, space, (), (0, 0), 0, "cpu")
    passes = TappedUNet(model, recipe, (261,), "cpu", checkpointing=True)
    empty = encode_prompt(model, "", cache)
    loop = TrainingLoop(recipe, settings, pairs, [learner], passes, Given(96), empty, ProcessGroup(), "cpu")
    before = learner.rows.detach().clone()
    loss = loop._step([pair])
    assert np.isfinite(loss)
    assert (learner.rows != before).any()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    assert peak < 24e9, f"{peak / 1e9:.1f} GB"


def _path(name):
    from pathlib import Path

    return Path(os.environ[name])
