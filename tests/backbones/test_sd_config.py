"""Every entry of a configuration is applied, proven to have no say, or refused by name."""

import inspect
import json
import shutil

import numpy as np
import pytest

from difftap.artifacts.digests import DigestMemo
from difftap.backbones.checkpoint import Checkpoint
from difftap.backbones.sd_config import SCHEDULER_RULES, SCHEDULERS, UNET_RULES, VAE_RULES
from difftap.errors import ModelError
from tests.export.test_sdxl import MINI_XL_UNET
from tests.harness import write_mini


def entries(kind):
    return set(inspect.signature(kind.__init__).parameters) - {"self", "args", "kwargs"}


def test_every_entry_of_the_installed_diffusers_has_a_rule():
    diffusers = pytest.importorskip("diffusers")
    assert entries(diffusers.UNet2DConditionModel) <= UNET_RULES.known
    assert entries(diffusers.AutoencoderKL) <= VAE_RULES.known
    for name in SCHEDULERS:
        kind = getattr(diffusers, f"{name}Scheduler")
        if "beta_schedule" in entries(kind):  # else a stand-in for a package that is not installed
            assert entries(kind) <= SCHEDULER_RULES.known, name


@pytest.mark.parametrize("rules", [UNET_RULES, VAE_RULES, SCHEDULER_RULES])
def test_an_entry_has_one_rule(rules):
    parts = [rules.used, rules.irrelevant, rules.allowed.keys()]
    assert sum(map(len, parts)) == len(rules.known)


def test_schedules_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for name, (first, last, curve) in SCHEDULERS.items():
        defaults = inspect.signature(getattr(diffusers, f"{name}Scheduler").__init__).parameters
        if "beta_schedule" in defaults:
            assert (first, last, curve) == tuple(
                defaults[key].default for key in ("beta_start", "beta_end", "beta_schedule")
            ), name


@pytest.fixture
def copy(mini, tmp_path):
    shutil.copytree(mini, tmp_path / "model")
    return tmp_path / "model"


FILES = {"unet": "unet/config.json", "vae": "vae/config.json", "scheduler": "scheduler/scheduler_config.json"}


def changed(folder, part, **entries):
    path = folder / FILES.get(part, part)
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **entries}))
    return folder


@pytest.mark.parametrize(
    ("part", "entry", "value"),
    [
        ("unet", "time_cond_proj_dim", 8),
        ("unet", "num_class_embeds", 1000),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "encoder_hid_dim_type", "text_proj"),
        ("unet", "encoder_hid_dim", 512),
        ("unet", "addition_embed_type", "image"),
        ("unet", "time_embedding_type", "fourier"),
        ("unet", "attention_type", "gated"),
        ("unet", "dual_cross_attention", True),
        ("unet", "a_new_condition", "on"),
        ("unet", "a_new_number", 0),
        ("vae", "a_new_scale", 0.5),
        ("vae", "latents_mean", [0.1]),
        ("vae", "shift_factor", "much"),
        ("vae", "scaling_factor", float("nan")),
        ("scheduler", "timestep_type", "continuous"),
        ("scheduler", "prediction_type", "flow_prediction"),
        ("scheduler", "use_flow_sigmas", True),
        ("scheduler", "a_new_schedule", {"a": 1}),
        ("scheduler", "_class_name", "EDMEulerScheduler"),
        ("scheduler", "_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("scheduler", "_class_name", "MyScheduler"),
        ("model_index.json", "requires_aesthetics_score", True),
    ],
)
def test_what_is_not_applied_is_refused_by_name(copy, part, entry, value):
    changed(copy, part, **{entry: value})
    with pytest.raises(ModelError) as refused:
        Checkpoint.load(copy)
    said = str(refused.value)
    assert (str(value) if entry == "_class_name" else entry) in said
    assert "allowed" in said or "makes no sense" in said
    assert "\n" not in said


@pytest.mark.parametrize("value", [None, False, "", [], {}])
@pytest.mark.parametrize("part", ["unet", "vae", "scheduler"])
def test_an_unknown_entry_that_is_off_passes(copy, part, value):
    assert Checkpoint.load(changed(copy, part, a_new_option=value, _a_mark="anything"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2's, about what diffusers does inside
@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"DPMSolverSDE"}))  # which needs torchsde
def test_noise_is_mixed_as_each_scheduler_mixes_it(copy, name):
    diffusers = pytest.importorskip("diffusers")
    kind = getattr(diffusers, f"{name}Scheduler")
    said = {"_class_name": f"{name}Scheduler", "num_train_timesteps": 1000}  # the rest is the class's own
    (copy / FILES["scheduler"]).write_text(json.dumps(said))
    want = kind.from_config(said).alphas_cumprod.numpy()
    assert np.allclose(Checkpoint.load(copy).noise_rule.alphas_cumprod, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "shift", "scale"),
    [
        ({"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [2.0, 4, 0.5, 1]}, [0.5, -1, 0, 2], [2, 4, 0.5, 1]),
        ({"shift_factor": 0.25}, [0.25] * 4, [1.0] * 4),
        ({"latents_mean": None, "latents_std": None, "shift_factor": 0.0}, [0.0] * 4, [1.0] * 4),
    ],
)  # fmt: skip
def test_the_latent_is_normalised_as_diffusers_does(copy, tmp_path, change, shift, scale):
    import torch

    memo = DigestMemo(tmp_path / "memo.json")
    plain = Checkpoint.load(copy)
    changed(copy, "vae", **change)
    model = Checkpoint.load(copy)
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        mean, std = plain.encode(plain.network("vae"), image)
        got_mean, got_std = model.encode(model.network("vae"), image)
    shift, scale = (torch.tensor(one, dtype=torch.float32).view(1, 4, 1, 1) for one in (shift, scale))
    assert torch.allclose(got_mean, (mean - shift) / scale, atol=1e-6)
    assert torch.allclose(got_std, std / scale, atol=1e-6)
    assert (model.latent_shift is not None) == bool((shift != 0).any())
    # Graphs of 0.1.0, which did not normalise, must not be taken for this model's: its hash says so.
    as_before = super(type(model), model).weights_hash("vae", memo)
    assert (model.weights_hash("vae", memo) == as_before) == (model.latent_shift is None)
    assert model.weights_hash("unet", memo) == plain.weights_hash("unet", memo)


def test_a_refiner_is_known_by_its_text_encoder_too(tmp_path):
    pytest.importorskip("diffusers")
    folder = write_mini(tmp_path, unet=MINI_XL_UNET)
    (folder / "text_encoder_2").mkdir()
    pooled = Checkpoint.load(folder).pooled_width
    changed(folder, "text_encoder_2/config.json", projection_dim=pooled)
    assert Checkpoint.load(folder).pooled_width == pooled
    changed(folder, "text_encoder_2/config.json", projection_dim=pooled + 4)
    with pytest.raises(ModelError, match="refiner"):
        Checkpoint.load(folder)
