"""``difftap tune`` and ``difftap prompts`` through the command, and learned prompts in ``match`` and ``bench pck``."""

import dataclasses
import json

import numpy as np
import pytest

from tests.harness import run_child, write_picture
from tests.test_cli import call, refused  # noqa: F401 - fixtures
from tests.test_torch_free import MAIN, blocked

pytest.importorskip("diffusers")

QUICK = ("--size", "64", "--epochs", "1", "--threads", "1", "--tokens", "6")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine small pictures of two classes."""
    root = tmp_path_factory.mktemp("photos")
    for k in range(9):
        folder = root / ("cat" if k < 5 else "dog")
        folder.mkdir(exist_ok=True)
        write_picture(folder / f"{k}.png", (48, 40), seed=k)
    return root


@pytest.fixture(scope="module")
def learned(photos, tmp_path_factory):
    """Prompts of every kind for the embedded model, each learned in a step or two by the installed command."""
    folder = tmp_path_factory.mktemp("prompts")
    for kind in ("class", "cpm"):
        asked = ["tune", kind, "--data", "synthetic", photos, *QUICK, "-o", folder / kind, "--rate", "0.5"]
        done = run_child(asked, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "validation PCK@0.10: empty prompt" in done.stdout
        assert "epoch 1 of 1: loss" in done.stderr
    return folder


def test_listing_and_showing(call, learned):  # noqa: F811
    code, out, _ = call("prompts", "list", learned)
    assert code == 0
    assert [line.split()[1] for line in out.splitlines()] == ["class", "cpm"]
    code, out, _ = call("prompts", "show", learned / "cpm")
    assert code == 0
    assert "image tokens" in out
    code, out, _ = call("prompts", "show", learned / "class", "--json")
    record = json.loads(out)
    assert record["classes"] == ["cat", "dog"]
    assert record["data"]["name"] == "synthetic"
    assert record["fits"]["size"] == [64, 64]


def test_a_broken_file_is_listed_as_such(call, learned, tmp_path):  # noqa: F811
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "prompt.safetensors").write_bytes(b"abc")
    code, out, _ = call("prompts", "list", tmp_path)
    assert code == 0
    assert out.startswith("BROKEN")


def test_matching_with_learned_prompts_needs_no_torch(learned, photos, tmp_path):
    pair = photos / "cat" / "0.png", photos / "cat" / "1.png"
    options = ("--size", "64", "--ensemble", "1", "--grid", "2")
    found = {}
    for name, more in {
        "text": (),
        "class": ("--prompts", learned / "class", "--category", "cat"),
        "pair": ("--prompts", learned / "cpm"),
        "image": ("--prompts", learned / "cpm", "--prompt-mode", "image"),
    }.items():
        done = blocked(MAIN, "match", *pair, *options, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout)
    assert found["pair"]["prompts"]["mode"] == "pair"
    scores = {name: [one["score"] for one in record["matches"]] for name, record in found.items()}
    assert len({tuple(one) for one in scores.values()}) == 4


def test_many_pairs_under_pair_prompts(call, learned, photos, tmp_path):  # noqa: F811
    (tmp_path / "pairs.csv").write_text(
        "source,target\n" + "".join(f"{photos}/cat/{a}.png,{photos}/cat/{b}.png\n" for a, b in ((0, 1), (1, 0), (2, 9)))
    )
    options = ("--prompts", learned / "cpm", "--size", "64", "--ensemble", "1", "--grid", "2", "--threads", "1")
    code, _, _ = call("match", "--pairs", tmp_path / "pairs.csv", "-o", tmp_path / "out.jsonl", *options)
    assert code == 1  # the third pair's image is missing
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ["matches" in line for line in lines[1:]] == [True, True, False]
    _, out, _ = call("match", photos / "cat" / "0.png", photos / "cat" / "1.png", *options)
    alone = json.loads(out)["matches"]
    assert np.allclose([one["score"] for one in alone], [one["score"] for one in lines[1]["matches"]])


def test_the_benchmark_under_every_mode(call, learned, photos, tmp_path):  # noqa: F811
    scores = {}
    for mode in ("pair", "class", "image"):
        code, _, err = call(
            "bench", "pck", "synthetic", photos, "-o", tmp_path / mode, "--prompts", learned / "cpm",
            "--prompt-mode", mode, "--part", "test", "--size", "64", "--ensemble", "1", "--no-confidence",
            "--threads", "1", "--draws", "10",
        )  # fmt: skip
        assert code == 0, err
        lines = (tmp_path / mode / "predictions.jsonl").read_text().splitlines()
        header = json.loads(lines[0])
        assert header["prompts"]["mode"] == mode
        assert header["dataset"]["subset"]["part"] == "test"
        scores[mode] = [json.loads(line)["score"] for line in lines[1:]]
    assert scores["pair"] != scores["image"] != scores["class"]


def test_what_does_not_fit_is_refused(refused, learned, photos, tmp_path):  # noqa: F811
    pair = photos / "cat" / "0.png", photos / "cat" / "1.png"
    at = ("--size", "64")
    assert "learned for size" in refused("match", *pair, "--prompts", learned / "cpm", "--size", "128")
    assert "learned for branches" in refused("match", *pair, "--prompts", learned / "cpm", *at, "--timestep", "9")
    assert "no class was given" in refused("match", *pair, "--prompts", learned / "class", *at)
    assert "no prompt for class 'cow'" in refused(
        "match", *pair, "--prompts", learned / "class", *at, "--category", "cow"
    )
    assert "do not depend on it" in refused("match", *pair, "--prompts", learned / "cpm", *at, "--category", "cat")
    assert "mode of learned prompts is 'none'" in refused(
        "match", *pair, "--prompts", learned / "class", *at, "--prompt-mode", "none"
    )
    assert "leave one out" in refused("match", *pair, "--prompts", learned / "cpm", *at, "--prompt", "a cat")
    assert "goes with learned prompts" in refused("match", *pair, "--prompt-mode", "pair")
    assert "no learned prompts at" in refused("match", *pair, "--prompts", tmp_path / "none")


def test_tuning_refuses_bad_input(refused, photos, tmp_path):  # noqa: F811
    out = ("-o", tmp_path / "out")
    assert "no data set 'nothing'" in refused("tune", "single", "--data", "nothing", photos, *out)
    assert "epochs is 0" in refused("tune", "single", "--data", "synthetic", photos, *out, "--epochs", "0")
    assert "no recipe" in refused("tune", "single", "--data", "synthetic", photos, *out, "--recipe", "nope")
    assert "no option --layout" in refused("tune", "single", "--data", "synthetic", photos, *out, "--layout", "large")


def _single(folder, seed):
    """A prompt file for the embedded model at 64 px, of random tokens."""
    from difftap.backbones.checkpoint import Checkpoint, pocket_folder
    from difftap.engine import Cache, model_key
    from difftap.prompts.learned import fits_of, save_learned
    from difftap.recipe import load_recipe

    model = Checkpoint.load(pocket_folder(), "pocket")
    recipe = dataclasses.replace(load_recipe("pocket"), size=(64, 64))
    about = {
        "kind": "single", "classes": [], "model": {"name": "pocket", "key": model_key(Cache(folder), model)},
        "fits": fits_of(recipe), "data": {}, "settings": {}, "scores": [], "steps": 1, "image_tokens": None,
    }  # fmt: skip
    tokens = np.random.default_rng(seed).standard_normal((1, 5, model.prompt_width)).astype(np.float32)
    folder.mkdir(exist_ok=True)
    save_learned(folder, about, [{"embedding": tokens}])


def test_nothing_made_under_older_prompts_passes_for_the_new(call, photos, tmp_path):  # noqa: F811
    """Learned again into the same folder: stores, indexes, lists of pairs and predictions are refused, not served."""
    for package in ("zarr", "faiss", "pyarrow"):
        pytest.importorskip(package)
    at = ("--prompts", tmp_path / "p", "--size", "64", "--threads", "1")
    pair = photos / "cat" / "0.png", photos / "cat" / "1.png"
    (tmp_path / "pairs.csv").write_text("source,target\n" + ",".join(map(str, pair)) + "\n")
    extract = ("extract", photos, "-o", tmp_path / "s.zarr", *at)
    match = ("match", *pair, "--grid", "2", "--features", tmp_path / "s.zarr", *at)
    many = ("match", "--pairs", tmp_path / "pairs.csv", "-o", tmp_path / "m.jsonl", "--grid", "2", *at)
    index = ("--index", tmp_path / "i", "--threads", "1")
    search = ("index", "search", pair[0], "--point", "9,9", *index)
    pck = ("bench", "pck", "synthetic", photos, "-o", tmp_path / "b", *at, "--draws", "10")
    _single(tmp_path / "p", 0)
    for command in (extract, match, many, ("index", "build", photos, *index[:2], *at), search, pck):
        code, out, err = call(*command)
        assert code == 0, (command, err)
        if command is match:
            assert json.loads(out)["prompts"]["kind"] == "single"
            assert json.loads(out)["prompts"]["sha256"] == json.loads(out)["recipe"]["learned"]["sha256"]
        if command is pck:
            assert "learned single " in out
    (tmp_path / "p").rename(tmp_path / "q")
    moved = [one if one != tmp_path / "p" else tmp_path / "q" for one in match]
    assert call(*moved)[0] == 0  # the same file elsewhere is the same prompt
    _single(tmp_path / "p", 1)
    for command, words in (
        (match, "were made with learned.sha256"),
        (extract, "other conditions (recipe.learned.sha256 is"),
        (many, "under other conditions (recipe"),
        (search, "holds other prompts than those asked for"),
        (pck, "under other conditions (prompts.sha256 is"),
        ((*pck, "--score-only"), "learned prompts of sha256"),
    ):
        code, out, err = call(*command)
        assert (code, out) == (2, ""), (command, out, err)
        assert words in err


def test_a_table_brings_its_own_prompts(refused, tmp_path):  # noqa: F811
    (tmp_path / "t.parquet").write_bytes(b"")
    index = ("index", "build", tmp_path / "t.parquet", "--index", tmp_path / "i")
    assert "--prompts is for images" in refused(*index, "--prompts", tmp_path)
    assert "--prompt-mode is for images" in refused(*index, "--prompt-mode", "class")


def test_a_recipe_of_another_kind_is_refused(refused, photos, tmp_path):  # noqa: F811
    (tmp_path / "r.toml").write_text(
        'model = "pocket"\nsize = 64\nensemble = 2\nbranches = [{ taps = ["up2"], timestep = 1 }]\n'
        'learned = { path = "p", kind = "class" }\n'
    )
    command = ("tune", "single", "--data", "synthetic", photos, "--recipe", tmp_path / "r.toml", "-o", tmp_path / "o")
    code_line = "this recipe takes class prompts: use 'difftap tune class'"
    assert code_line in refused(*command)
