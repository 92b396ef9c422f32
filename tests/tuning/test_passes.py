"""Gradients through the frozen UNet, text encoder and conditional head, against finite differences in float64."""

import numpy as np
import pytest

from difftap.backbones.checkpoint import Checkpoint
from difftap.coords import Geometry
from difftap.engine import Cache
from difftap.tuning.posteriors import ImagePosterior
from tests.tuning.conftest import SIZE, recipe

torch = pytest.importorskip("torch")

from difftap.engine.torch_prompts import ConditionalHead, pool_table  # noqa: E402
from difftap.tuning.learner import open_space  # noqa: E402
from difftap.tuning.loss import cosines, fused_cosines, gaussian_cross_entropy  # noqa: E402
from difftap.tuning.passes import TappedUNet  # noqa: E402


def known(seed):
    rng = np.random.default_rng(seed)
    mean, std, first, second = (rng.standard_normal((4, 16, 16)).astype(np.float32) for _ in range(4))
    empty = np.zeros((0, 0), np.float32)
    return ImagePosterior(mean, abs(std), first[None], second[None], empty, Geometry.stretch((40, 30), SIZE))


def matching_loss(passes, images, prompts, branches=1):
    """The loss of one pair under prompts ``(branches, T, D)``."""
    maps = [[], []]
    for k in range(branches):
        for place, made in zip(maps, passes.run(k, images, prompts[k].expand(2, -1, -1)), strict=True):
            place.extend(made)
    finest = max(one.shape[1] for one in maps[0])
    cells = torch.tensor([[0.2, 0.3], [0.6, 0.7]], dtype=prompts.dtype) * finest
    scores = fused_cosines(*maps, cells, [1.0] * branches, "bicubic", "concat")
    return gaussian_cross_entropy(scores, cells.flip(0)).mean()


@pytest.mark.parametrize("branches", [1, 2])
def test_a_prompts_gradient(mini, branches):
    passes = TappedUNet(Checkpoint.load(mini), recipe(mini, branches), (20, 40)[:branches], "cpu")
    passes.unet.double()
    images = [known(1), known(2)]
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(branches, 3, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    matching_loss(passes, images, prompts, branches).backward()
    step = 1e-4
    for index in ((0, 0, 0), (branches - 1, 2, 5), (0, 1, 3)):
        moved = []
        for sign in (1, -1):
            other = prompts.detach().clone()
            other[index] += sign * step
            moved.append(float(matching_loss(passes, images, other, branches).detach()))
        assert float(prompts.grad[index]) == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=1e-5, abs=1e-10)
    assert not any(value.requires_grad for value in passes.unet.parameters())


@pytest.mark.parametrize("tap", ["up1", "up1.res0", "down1.attn0"])
def test_recomputing_layers_changes_no_gradient(mini, tap):
    import dataclasses

    one = recipe(mini)
    one = dataclasses.replace(one, branches=(dataclasses.replace(one.branches[0], taps=(tap,)),))
    found = []
    for checkpointing in (False, True):
        passes = TappedUNet(Checkpoint.load(mini), one, (20,), "cpu", checkpointing=checkpointing)
        prompts = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        matching_loss(passes, [known(1), known(2)], prompts).backward()
        found.append(prompts.grad)
    assert found[0].abs().max() > 0
    assert torch.allclose(*found, rtol=1e-4, atol=1e-8)


def test_half_precision_follows_full_precision(mini):
    found = []
    for precision in ("fp32", "bf16"):
        passes = TappedUNet(Checkpoint.load(mini), recipe(mini), (20,), "cpu", precision=precision)
        prompts = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = matching_loss(passes, [known(1), known(2)], prompts)
        loss.backward()
        found.append(float(loss.detach()))
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_the_text_encoders_gradient(clip, tmp_path):
    space = open_space(Checkpoint.load(clip), Cache(tmp_path), "cpu", 4)
    space.encoder.double()
    weights = torch.randn(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    learned = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1

    def value(learned):
        ends = [part.double().expand(1, -1, -1) for part in (space.start, space.end)]
        return (space.encode(torch.cat([ends[0], learned, ends[1]], 1))[0] * weights).sum()

    assert torch.autograd.gradcheck(value, (learned.requires_grad_(),), atol=1e-7)
    assert not any(value.requires_grad for value in space.encoder.parameters())


def test_start_and_end_are_the_tokenizers_with_their_positions(clip, tmp_path):
    """The text encoder's configuration names other tokens, as that of Stable Diffusion 1.5 does."""
    from transformers import CLIPTextModel

    text = CLIPTextModel.from_pretrained(clip / "text_encoder")
    parts = {name.split(".")[-1]: part.weight for name, part in text.named_modules() if name.endswith("_embedding")}
    words, places = parts["token_embedding"], parts["position_embedding"]
    space = open_space(Checkpoint.load(clip), Cache(tmp_path), "cpu", 4)
    assert torch.equal(space.start, words[4][None] + places[0])
    assert torch.equal(space.end, words[5][None] + places[5])
    assert open_space(Checkpoint.load(clip), Cache(tmp_path), "cpu").count == 10


def test_the_encoder_reads_vectors_as_it_reads_words(clip, tmp_path):
    """Fed with a sentence's own vectors and positions, it gives what it gives for the sentence."""
    from transformers import CLIPTextModel

    text = CLIPTextModel.from_pretrained(clip / "text_encoder").eval()
    sentence = torch.tensor([[4, 0, 2, 5, 5, 5]])
    part = next(part for name, part in text.named_modules() if name.endswith("embeddings"))
    space = open_space(Checkpoint.load(clip), Cache(tmp_path), "cpu", 4)
    with torch.no_grad():
        want = text(sentence).last_hidden_state
        assert torch.allclose(space.encode(part(sentence)), want, atol=1e-6)


def test_the_conditional_head_step_by_step():
    torch.manual_seed(0)
    tokens, channels, width = 10, 4, 3
    start, end = torch.randn(1, width), torch.randn(1, width)
    head = ConditionalHead(channels, tokens, torch.randn(2, width), 4, start, end)
    with torch.no_grad():
        head.alpha.fill_(0.7)
    source, target = torch.randn(2, 5, tokens, channels)
    got = head(source, target)
    both = np.concatenate([source.numpy(), target.numpy()], axis=2)
    w, b = (head.channels.weight.detach().numpy(), head.channels.bias.detach().numpy())
    both = both @ w.T + b
    w, b = (head.tokens.weight.detach().numpy(), head.tokens.bias.detach().numpy())
    mixed = (both.transpose(0, 2, 1) @ w.T + b).transpose(0, 2, 1)
    pooled = torch.nn.functional.adaptive_max_pool1d(torch.from_numpy(mixed).transpose(1, 2), 4).transpose(1, 2).numpy()
    conditional = (pooled + head.positions.detach().numpy()) * np.tanh(0.7)
    assert got.shape == (5, 1 + 2 + 4 + 1, width)
    assert np.allclose(got[:, 3:7].detach().numpy(), conditional, atol=1e-5)
    assert torch.equal(got[0, 0], start[0])
    assert torch.equal(got[2, 1:3], head.shared)
    assert torch.equal(got[4, -1], end[0])


@pytest.mark.parametrize(("tokens", "pooled"), [(256, 50), (16, 16), (7, 3), (5, 1)])
def test_pooling_bins_are_torchs(tokens, pooled):
    values = torch.randn(2, tokens, generator=torch.Generator().manual_seed(0))
    want = torch.nn.functional.adaptive_max_pool1d(values[None], pooled)[0]
    assert torch.equal(values[:, pool_table(tokens, pooled)].amax(2), want)


def test_a_head_of_difftap_0_1_0_has_one_alpha():
    made = [ConditionalHead(3, 6, torch.zeros(1, 2), 4, torch.zeros(0, 2), torch.zeros(0, 2)) for _ in range(2)]
    state = {**made[0].state_dict(), "alpha": torch.tensor([0.3])}
    made[1].load_state_dict(state)
    assert made[1].alpha.shape == (1, 4, 2)
    assert (made[1].alpha == 0.3).all()
    source, target = torch.randn(2, 1, 6, 3)
    with torch.no_grad():
        made[0].alpha.fill_(0.3)
        assert (made[0](source, target) == made[1](source, target)).all()


def test_a_published_head_begins_uniform_from_0_to_1():
    torch.manual_seed(0)
    head = ConditionalHead(3, 6, torch.rand(1, 32), 50, torch.zeros(0, 32), torch.zeros(0, 32))
    for value in (head.alpha.detach(), head.positions.detach()):
        assert 0 <= float(value.min()) < 0.05 and 0.95 < float(value.max()) <= 1
        assert float(value.mean()) == pytest.approx(0.5, abs=0.05)


def test_a_heads_gradient():
    torch.manual_seed(0)
    head = ConditionalHead(3, 6, torch.randn(1, 2), 4, torch.zeros(0, 2), torch.zeros(0, 2)).double()
    with torch.no_grad():
        head.alpha.fill_(0.5)
    source, target = torch.randn(2, 1, 6, 3, dtype=torch.float64)
    names = [name for name, _ in head.named_parameters()]
    values = [value.detach().clone().requires_grad_() for value in head.parameters()]

    def value(*given):
        return torch.func.functional_call(head, dict(zip(names, given, strict=True)), (source, target))

    assert torch.autograd.gradcheck(value, values)


def test_cosines_of_equal_maps_peak_at_the_point():
    maps = torch.randn(8, 6, 7, generator=torch.Generator().manual_seed(0))
    found = cosines(maps, maps, torch.tensor([[3.0, 2.0]]))
    assert int(found.flatten().argmax()) == 2 * 7 + 3
