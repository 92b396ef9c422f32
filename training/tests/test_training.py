"""Tests of the training room: tiny networks, made-up images, no teacher weights, no network.

Run where torch and diffusers are installed: python -m pytest training/tests
"""

# ruff: noqa: D102, D103
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
pytest.importorskip("diffusers", reason="training needs diffusers")

from PIL import Image  # noqa: E402

from training import batches, data, evaluate, losses, model, optim, pairs, plot, teacher, train  # noqa: E402

MODEL = {
    "latent_channels": 4,
    "vae_channels": [8, 8, 8, 8],
    "unet_channels": [32, 32, 32, 32],
    "unet_heads": [1, 1, 1, 1],
    "layers": 1,
    "cross_attention_dim": 16,
    "prompt_length": 4,
}
CONFIG = {
    "run": {"folder": "run", "cache": "cache", "export": "out", "checkpoint_seconds": 1, "threads": 1},
    "model": MODEL,
    "data": {"held_out_one_in": 5, "max_short_side": 64, "min_area": 0.4, "max_stretch": 1.3, "whole_share": 0.3,
             "flip": 0.5, "jitter": 0.3, "caption_dropout": 0.5},
    "teacher": {"channels": 40},
    "loss": {"align_up1": 0.5, "align_up2": 1.0, "relation": 0.3, "relation_temperature": 0.1,
             "relation_tokens": 64, "denoise": 0.3, "reconstruct": 0.5, "kl": 1e-3},
    "train": {"seed": 0, "sizes": [64], "size_weights": [1.0], "final_size_weights": [1.0],
              "pixels_per_step": 8 * 64 * 64, "denoise_share": 0.25, "decode_share": 0.125, "mate_share": 0.5,
              "low_timestep_scale": 300, "learning_rate": 2e-3, "muon": True, "weight_decay": 0.01,
              "warmup_steps": 2, "clip": 1.0, "ema": 0.9, "autocast": False},
    "schedule": {"budget_seconds": 1000, "decay_share": 0.35},
}  # fmt: skip


class FakeTargets:
    """Stands in for TargetCache: a fixed random map per photograph."""

    def get(self, indices: np.ndarray, mirrored: np.ndarray) -> torch.Tensor:
        rows = [torch.randn(40, 6, 6, generator=torch.Generator().manual_seed(int(i))) for i in indices]
        return torch.stack(rows)


@pytest.fixture
def images(tmp_path: Path) -> data.ImageCache:
    rng = np.random.default_rng(0)
    for n in range(40):
        path = tmp_path / "data/train/caltech101" / f"Class_{n % 4}" / f"image_{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(path)
    (tmp_path / "data/train/imagenet_sample").mkdir()
    Image.new("RGB", (80, 80)).save(tmp_path / "data/train/imagenet_sample/n01_tabby_cat.jpg")
    return data.ImageCache(tmp_path / "data", tmp_path / "cache", 64)


def test_missing_data_shows_the_expected_tree(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train/caltech101"):
        data.list_items(tmp_path)


def test_cache_keeps_aspect_and_limits_size(images: data.ImageCache) -> None:
    assert len(images) == 41
    assert images.image(0).shape == (64, 82, 3)
    assert images.items[-1].words == "tabby cat"


def test_batches_depend_on_seed_and_step_alone(images: data.ImageCache) -> None:
    first, second = (batches.Batches(images, FakeTargets(), CONFIG["data"], CONFIG["train"]) for _ in range(2))
    first.make(1, False)
    a, b = first.make(7, False), second.make(7, False)
    assert torch.equal(a.pixels, b.pixels) and torch.equal(a.target, b.target) and a.texts == b.texts
    assert a.pixels.shape == (8, 3, 64, 64) and a.target.shape == (8, 40, 8, 8)
    held = set(pairs.held_out_indices(images, 5))
    assert not held & set(first.indices) and not any(held & set(m) for m in first.mates.values())


def test_cut_target_of_the_whole_image_is_the_map() -> None:
    whole = torch.nn.functional.normalize(torch.randn(2, 5, 8, 8), dim=1)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2)
    assert torch.allclose(teacher.cut_target(whole, boxes, 8), whole, atol=1e-5)
    left_top = teacher.cut_target(whole, torch.tensor([[0.0, 0.0, 0.5, 0.5]] * 2), 4)
    assert torch.allclose(left_top, whole[:, :, :4, :4], atol=1e-5)


def test_perfect_features_have_no_loss() -> None:
    target = torch.nn.functional.normalize(torch.randn(3, 6, 4, 4), dim=1)
    assert losses.align(5 * target, target, torch.ones(3)).item() == pytest.approx(0, abs=1e-5)
    assert losses.relation(2 * target, target, torch.arange(48), 0.1).item() == pytest.approx(0, abs=1e-5)


def test_muon_steps_are_near_orthogonal() -> None:
    values = torch.linalg.svdvals(optim.orthogonalise(torch.randn(2, 24, 60)))
    assert values.min() > 0.5 and values.max() < 1.4


def test_fast_group_norm_has_the_same_gradients() -> None:
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    results = []
    for fast in (False, True):
        norm = torch.nn.GroupNorm(4, 8)
        if fast:
            optim.speed_up_group_norm(norm)
        inputs = x.clone().requires_grad_()
        norm(inputs).square().sum().mul(0.1).backward()
        results.append((inputs.grad, norm.weight.grad, norm.bias.grad))
    for plain, quick in zip(*results, strict=True):
        assert torch.allclose(plain, quick, atol=1e-4)


def test_a_killed_run_goes_on_exactly(images: data.ImageCache, tmp_path: Path) -> None:
    made = batches.Batches(images, FakeTargets(), CONFIG["data"], CONFIG["train"])
    whole = train.Trainer(CONFIG, images, "cpu")
    for step in range(2):
        whole.train_step(made.make(step, False))
    whole.save(tmp_path / "checkpoint.pt")
    expected = whole.train_step(made.make(2, False))
    resumed = train.Trainer(CONFIG, images, "cpu")
    resumed.restore(tmp_path / "checkpoint.pt")
    assert resumed.train_step(made.make(2, False)) == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.average.values, resumed.average.values, strict=True))


def test_a_checkpoint_of_another_configuration_is_refused(images: data.ImageCache, tmp_path: Path) -> None:
    train.Trainer(CONFIG, images, "cpu").save(tmp_path / "checkpoint.pt")
    other = CONFIG | {"loss": CONFIG["loss"] | {"kl": 2e-3}}
    with pytest.raises(ValueError, match="another configuration"):
        train.Trainer(other, images, "cpu").restore(tmp_path / "checkpoint.pt")


def test_alignment_reaches_the_encoder_and_denoising_does_not(images: data.ImageCache) -> None:
    made = batches.Batches(images, FakeTargets(), CONFIG["data"], CONFIG["train"])
    for term, reaches in (("align_up2", True), ("denoise", False)):
        trainer = train.Trainer(CONFIG, images, "cpu")
        trainer.losses(made.make(0, False))[term].backward()
        grads = [p.grad for p in trainer.pocket.vae.encoder.parameters() if p.grad is not None]
        assert any(bool(g.abs().sum() > 0) for g in grads) == reaches


def test_export_loads_with_diffusers(tmp_path: Path) -> None:
    pocket = model.build(MODEL, ["a", "cat"])
    folder = tmp_path / "pocket"
    folder.mkdir()
    (folder / "README.md").write_text("kept")
    size = model.export(pocket, 2.0, folder)
    loaded, std = model.load(folder)
    assert std == 0.5 and (folder / "README.md").read_text() == "kept" and size > 1000
    assert loaded.unet.up_blocks[1].upsamplers is not None
    assert not list(tmp_path.glob("pocket.*"))
    table = json.loads((folder / "prompt_table/config.json").read_text())
    assert table == {"length": 4, "dim": 16, "words": ["a", "cat"]}


def test_prompts_drop_unknown_words_and_pad() -> None:
    table = model.PromptTable(["a", "cat"], 4, 16)
    assert table.ids("A purple Cat") == [0, 2, 3, 1]
    assert table.ids("") == [0, 1, 1, 1]
    assert table(["", "cat"]).shape == (2, 4, 16)


def test_pairs_are_repeatable_and_a_perfect_map_matches() -> None:
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    one, two = (pairs.warp_pair(np.random.default_rng(3), image, 64) for _ in range(2))
    assert np.array_equal(one.b, two.b) and len(one.points_a) == len(one.points_b)
    ramp = torch.linspace(0, 1.5, 32)
    y, x = torch.meshgrid(ramp, ramp, indexing="ij")
    maps = torch.stack([x.cos(), x.sin(), y.cos(), y.sin()])
    points = pairs.grid(5, 0.1, 0.9)
    assert np.abs(pairs.match(maps, maps, points) - points).max() < 0.02
    assert pairs.pck(points, points, (0.05,)).tolist() == [1.0]


def test_schedule_falls_to_zero_by_the_clock(images: data.ImageCache) -> None:
    trainer = train.Trainer(CONFIG, images, "cpu")
    trainer.step = 50
    for seconds, factor in ((0, 1.0), (650, 1.0), (825, 0.5), (1000, 0.0), (1200, 0.0)):
        trainer.seconds = seconds
        assert trainer.rate() == pytest.approx(factor)


def test_plot_needs_a_log_and_survives_a_cut_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing was trained"):
        plot.plot(tmp_path, tmp_path / "plot.png")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "a": 2}\n{"step": 1, "a": 3}\n{"st')
    assert plot.read(tmp_path / "log.jsonl") == [{"step": 1, "a": 3}]
    assert plot.smooth(np.array([1.0, 3.0, 5.0]), 2).tolist() == [1.0, 2.0, 4.0]


def test_table_is_markdown_in_per_cent() -> None:
    row = {
        "name": "x",
        "setting": "up2",
        "warp": [0.5, 0.75],
        "aligned": [0.1, 0.2],
        "class": [0, 1],
        "willow": [0.24, 0.44],
    }
    assert "| 50.0 / 75.0 | 10.0 / 20.0 | 0.0 / 100.0 | 24.0 / 44.0 |" in evaluate.table([row])
