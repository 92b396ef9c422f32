"""Prompt files: what is written is read, the same content is the same bytes, and what does not fit is refused."""

import dataclasses

import numpy as np
import pytest

from difftap.errors import InputError, ModelError
from difftap.prompts import Subject, choose_prompts
from difftap.prompts.learned import PROMPT_FILE, fits_of, load_learned, pinned, save_learned
from difftap.prompts.tokens import own_grid, own_tokens
from difftap.recipe import Branch, Learned, Recipe
from tests.harness import invoke

ONE = Recipe((Branch(("up2",), 1),), size=(64, 64), ensemble=2)


def about(kind="class", recipe=ONE):
    return {
        "kind": kind,
        "classes": [] if kind == "single" else ["cat", "dog"],
        "model": {"name": "pocket", "key": "k"},
        "fits": fits_of(recipe),
        "data": {"name": "pairs", "train_pairs": 3, "how": "by image"},
        "settings": {},
        "scores": [],
        "steps": 3,
        "image_tokens": None,
    }


def save(folder, kind="class", recipe=ONE, **more):
    folder.mkdir(exist_ok=True)
    rows = 1 if kind == "single" else 2
    embedding = np.arange(rows * 6, dtype=np.float32).reshape(rows, 2, 3)
    return save_learned(folder, {**about(kind, recipe), **more}, [{"embedding": embedding} for _ in recipe.branches])


def test_what_is_written_is_read(tmp_path):
    first, second = save(tmp_path / "a"), save(tmp_path / "b")
    assert first.path.read_bytes() == second.path.read_bytes()
    again = load_learned(tmp_path / "a" / PROMPT_FILE)
    assert again.sha256 == first.sha256 == load_learned(tmp_path / "a").sha256
    assert again.classes == ("cat", "dog")
    assert again.row("dog") == 1
    assert (again.embeddings[0] == np.arange(12).reshape(2, 2, 3)).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"branches": (Branch(("up1",), 1),)}, "learned for branches"),
        ({"branches": (Branch(("up2",), 2),)}, "learned for branches"),
        ({"branches": (Branch(("up2",), 1), Branch(("up1",), 1))}, "learned for branches"),
        ({"size": (64, 128)}, "learned for size"),
        ({"fit": "letterbox"}, "learned for fit"),
        ({"noise": "none", "ensemble": 1}, "learned for noise"),
    ],
)
def test_another_recipe_is_refused(tmp_path, change, words):
    learned = save(tmp_path / "a")
    learned.check(Learned("a"), ONE, "pocket", "k")
    learned.check(
        Learned("a", "class"), dataclasses.replace(ONE, ensemble=4, seed=3, combine="score-sum"), "pocket", "k"
    )
    learned.check(Learned("a"), dataclasses.replace(ONE, noise="antithetic"), "pocket", "k")  # the same first draw
    with pytest.raises(InputError, match=words):
        learned.check(Learned("a"), dataclasses.replace(ONE, **change), "pocket", "k")


def test_a_pinned_recipe_takes_no_other_file(tmp_path):
    first = save(tmp_path / "a", "cpm")
    asked = dataclasses.replace(ONE, learned=Learned(str(tmp_path / "a")))
    known = pinned(asked)
    assert (known.learned.sha256, known.learned.mode) == (first.sha256, "pair")
    assert pinned(known) == known
    assert pinned(ONE) is ONE
    other = save(tmp_path / "a", "cpm", steps=4)
    assert pinned(asked).feature_key() != known.feature_key()
    for refuse in (lambda: pinned(known), lambda: other.check(known.learned, ONE, "pocket", "k")):
        with pytest.raises(InputError, match="holds other prompts than those asked for: its sha256 is"):
            refuse()
    with pytest.raises(InputError, match="no learned prompts at"):
        pinned(dataclasses.replace(ONE, learned=Learned(str(tmp_path / "nowhere"))))


def test_another_model_or_kind_is_refused(tmp_path):
    learned = save(tmp_path / "a")
    with pytest.raises(InputError, match="learned for model 'pocket'"):
        learned.check(Learned("a"), ONE, "other", "x")
    with pytest.raises(InputError, match="holds class prompts; this recipe takes cpm"):
        learned.check(Learned("a", "cpm"), ONE, "pocket", "k")
    with pytest.raises(InputError, match="prompt mode is 'pair'"):
        learned.mode(Learned("a", mode="pair"))
    with pytest.raises(InputError, match="depend on nothing"):
        save(tmp_path / "s", "single").mode(Learned("a", mode="image"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes().replace(b'schema\\": 1', b'schema\\": 9')),
        lambda path: path.write_bytes(path.read_bytes().replace(b'kind\\": \\"class', b'kind\\": \\"glass')),
        lambda path: path.write_bytes(path.read_bytes().replace(b"0.embedding", b"0.embeddinh")),
        lambda path: path.write_bytes(path.read_bytes()[:-4] + np.float32(np.nan).tobytes()),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    path = save(tmp_path / "a").path
    damage(path)
    with pytest.raises(ModelError, match="no whole file of learned prompts"):
        load_learned(path)


def test_a_missing_file_says_how_to_get_one(tmp_path):
    for name in ("nowhere", "x" * 5000, ""):
        with pytest.raises(InputError, match="difftap tune"):
            load_learned(tmp_path / name if name else tmp_path)


def test_which_prompt_an_image_gets(tmp_path):
    save(tmp_path / "c")
    save(tmp_path / "s", "single")
    save(tmp_path / "m", "cpm")

    def chosen(name, mode="", **subject):
        recipe = dataclasses.replace(ONE, learned=Learned(str(tmp_path / name), mode=mode))
        return choose_prompts(recipe, Subject(**subject))[0]

    assert chosen("s").row == chosen("s", category="cat").row == 0
    assert [chosen("c", category=name).row for name in ("cat", "dog")] == [0, 1]
    assert chosen("m", "class", category="dog").row == 1
    assert chosen("m", pair=("a", "b")).pair == ("a", "b")
    assert chosen("m", "image", image="a", pair=("a", "b")).pair == ("a", "a")
    with pytest.raises(InputError, match="no prompt for class 'cow'"):
        chosen("c", category="cow")
    with pytest.raises(InputError, match="no class was given"):
        chosen("c")
    with pytest.raises(InputError, match="a prompt for each pair"):
        chosen("m", category="cat")


def test_own_tokens_are_averaged_and_normalised():
    data = np.random.default_rng(0).standard_normal((5, 6, 8)).astype(np.float32)
    tokens = own_tokens(data, (4, 3))
    assert tokens.shape == (12, 5)
    assert np.allclose(tokens.mean(1), 0, atol=1e-6)
    assert np.allclose(tokens.std(1), 1, atol=1e-4)
    cell = data[:, 2:4, 4:6].mean((1, 2)).astype(np.float64)
    assert np.allclose(tokens[1 * 4 + 2], (cell - cell.mean()) / cell.std(), atol=1e-5)
    assert own_grid((768, 768), 16) == (16, 16)
    assert own_grid((128, 256), 16) == (8, 16)


def test_own_tokens_of_uneven_bins_are_torchs():
    torch = pytest.importorskip("torch")
    data = np.random.default_rng(0).standard_normal((5, 7, 10)).astype(np.float32)
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(data), (3, 4)).flatten(1).T.numpy()
    want = (pooled - pooled.mean(1, keepdims=True)) / pooled.std(1, keepdims=True)
    assert np.allclose(own_tokens(data, (4, 3)), want, atol=1e-4)


def test_prompts_that_were_never_scored_are_listed(tmp_path):
    done = invoke(["prompts", "list", str(save(tmp_path / "a").path.parent)])
    assert done.exit_code == 0, done.exception
    assert "not scored" in done.output


def test_any_changed_byte_of_a_prompt_file_is_found(tmp_path):
    """Of the embeddings, which only differ, and of the provenance, which would claim something else."""
    whole = save(tmp_path)
    file = tmp_path / PROMPT_FILE
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    for place in [*range(60), *rng.integers(0, len(data), 200).tolist(), len(data) - 1]:
        changed = bytearray(data)
        changed[place] ^= 1
        file.write_bytes(changed)
        try:
            found = load_learned(tmp_path)
        except ModelError:
            continue
        assert found.about == whole.about, place
        assert all((a == b).all() for a, b in zip(found.embeddings, whole.embeddings, strict=True)), place
