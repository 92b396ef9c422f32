"""Weights are found by one rule, and compared with the network before anything computes."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from difftap.backbones.checkpoint import Checkpoint
from difftap.backbones.weights import check_tensors, find_weights, load_transformer
from difftap.errors import ModelError

ONE = {"a.weight": np.ones((2, 3), np.float32)}


def write(folder, *names, tensors=None):
    for name in names:
        save_file(tensors or ONE, folder / name)


def write_index(folder, name, *shards):
    for k, shard in enumerate(shards):
        save_file({f"{k}.weight": np.ones(2, np.float32)}, folder / shard)
    (folder / name).write_text(json.dumps({"weight_map": {f"{k}.weight": shard for k, shard in enumerate(shards)}}))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["m.safetensors"], "m.safetensors"),
        (["m.fp16.safetensors"], "m.fp16.safetensors"),
        (["m.bf16.safetensors"], "m.bf16.safetensors"),
        (["m.non_ema.safetensors"], "m.non_ema.safetensors"),
        (["m.non_ema.safetensors", "m.safetensors", "m.fp16.safetensors"], "m.safetensors"),
        (["m.bf16.safetensors", "m.fp16.safetensors"], "m.fp16.safetensors"),
        (["m.non_ema.safetensors", "m.bf16.safetensors"], "m.bf16.safetensors"),
        (["other.safetensors", "m.safetensors"], "m.safetensors"),
    ],
)
def test_one_file(tmp_path, names, chosen):
    write(tmp_path, *names)
    assert [path.name for path in find_weights(tmp_path, "m")] == [chosen]


@pytest.mark.parametrize(
    ("index", "shards"),
    [
        ("m.safetensors.index.json", ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors")),
        ("m.safetensors.index.fp16.json", ("m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors")),
        ("m.fp16.safetensors.index.json", ("m-00001-of-00002.fp16.safetensors", "m-00002-of-00002.fp16.safetensors")),
    ],
)
def test_shards_under_either_name_of_their_index(tmp_path, index, shards):
    write_index(tmp_path, index, *shards)
    assert [path.name for path in find_weights(tmp_path, "m")] == list(shards)
    (tmp_path / shards[1]).unlink()
    with pytest.raises(ModelError, match=re.escape(shards[1])):
        find_weights(tmp_path, "m")


def test_plain_shards_are_preferred_to_a_variant_in_one_file(tmp_path):
    write(tmp_path, "m.fp16.safetensors")
    write_index(tmp_path, "m.safetensors.index.json", "m-1.safetensors")
    assert [path.name for path in find_weights(tmp_path, "m")] == ["m-1.safetensors"]


def test_what_is_no_weights_is_said(tmp_path):
    with pytest.raises(ModelError, match=r"holds no weights; 'm\.safetensors'"):
        find_weights(tmp_path, "m")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"pickled weights .*safe_serialization=True"):
        find_weights(tmp_path, "m")
    write(tmp_path, "m.one.safetensors", "m.two.safetensors")
    with pytest.raises(ModelError, match=r"several variants \(m\.one\.safetensors, m\.two\.safetensors\)"):
        find_weights(tmp_path, "m")


NEEDED = {"a.weight": (2, 3), "b.bias": (4,), "c": (1,), "d": (1,), "position_ids": (1, 7)}


def listed(tmp_path, **changes):
    """Compare the needed tensors, with some of them changed or left out (None), with what is needed."""
    shapes = {name: shape for name, shape in {**NEEDED, **changes}.items() if shape is not None}
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, tmp_path / "m.safetensors")
    return check_tensors(NEEDED, [tmp_path / "m.safetensors"], "the net")


def test_the_tensors_that_are_needed_pass(tmp_path):
    assert listed(tmp_path) == {name: name for name in NEEDED if name != "position_ids"}
    assert listed(tmp_path, position_ids=None)  # these decide nothing


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"c": None}, r"the net does not fit its configuration: 1 tensor is missing \(c\)"),
        (
            {"a.weight": None, "b.bias": None, "c": None, "d": None},
            r"4 tensors are missing \(a\.weight, b\.bias, c and 1",
        ),
        ({"extra": (1,)}, r"1 tensor is not of this network \(extra\)"),
        ({"a.weight": (3, 2)}, r"1 tensor is of another shape \(a\.weight: 3 x 2, needed 2 x 3\)"),
        ({"b.bias": (4, 1)}, r"another shape \(b\.bias: 4 x 1, needed 4\)"),
        ({"c": None, "e": (1,)}, r"missing \(c\); 1 tensor is not of this network \(e\)"),
    ],
)
def test_others_are_named_and_counted(tmp_path, changes, words):
    with pytest.raises(ModelError, match=words) as refused:
        listed(tmp_path, **changes)
    assert "\n" not in str(refused.value)
    assert "m.safetensors" in str(refused.value)


def test_quantised_tensors_are_refused(tmp_path):
    save_file({"a": np.zeros(3, np.int8)}, tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match=r"not of a type that can be read .*a: I8"):
        check_tensors({"a": (3,)}, [tmp_path / "m.safetensors"], "the net")


def test_attention_of_old_vaes_has_other_names_and_two_axes_more(tmp_path):
    old = {"mid.0.query.weight": (4, 4, 1, 1), "mid.0.key.bias": (4,), "mid.0.proj_attn.weight": (4, 4, 1, 1)}
    new = {"mid.0.to_q.weight": (4, 4), "mid.0.to_k.bias": (4,), "mid.0.to_out.0.weight": (4, 4)}
    save_file({name: np.zeros(shape, np.float32) for name, shape in old.items()}, tmp_path / "m.safetensors")
    assert check_tensors(new, [tmp_path / "m.safetensors"], "the net") == dict(zip(old, new, strict=True))


# ---- the networks themselves


@pytest.fixture
def copy(mini, tmp_path):
    shutil.copytree(mini, tmp_path / "model")
    return tmp_path / "model"


def change(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda tensors: tensors.pop(sorted(tensors)[3]), "1 tensor is missing"),
        (
            lambda tensors: tensors.update(strange=np.zeros(2, np.float32)),
            r"1 tensor is not of this network \(strange\)",
        ),
        (lambda tensors: tensors.update({(k := sorted(tensors)[0]): tensors[k][:1]}), "of another shape"),
    ],
)
def test_a_network_with_other_weights_is_refused(copy, part, edit, words):
    change(copy / part / "diffusion_pytorch_model.safetensors", edit)
    with pytest.raises(ModelError, match=f"the {part} in .*{words}"):
        Checkpoint.load(copy).network(part)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_network_is_loaded_as_diffusers_loads_it(copy, part):
    import diffusers

    kind = diffusers.UNet2DConditionModel if part == "unet" else diffusers.AutoencoderKL
    want = kind.from_pretrained(copy, subfolder=part, use_safetensors=True).state_dict()
    got = Checkpoint.load(copy).network(part).state_dict()
    assert got.keys() == want.keys()
    assert all((got[name] == want[name]).all() for name in want)
    # In half precision and in shards of another name: the same numbers, rounded once.
    file = copy / part / "diffusion_pytorch_model.safetensors"
    halves = {name: value.astype(np.float16) for name, value in load_file(file).items()}
    file.unlink()
    save_file(halves, copy / part / "diffusion_pytorch_model.bf16.safetensors")
    again = Checkpoint.load(copy).network(part).state_dict()
    assert all((again[name] == want[name].half().float()).all() for name in want)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def text(transformers, tmp_path):
    """A tiny text encoder's folder and network."""
    config = transformers.CLIPTextConfig(
        vocab_size=6, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    network = transformers.CLIPTextModel(config).eval()
    network.save_pretrained(tmp_path / "text")
    return tmp_path / "text", network


def test_a_text_encoder_is_found_under_both_prefixes_and_as_a_variant(transformers, text):
    folder, network = text
    whole = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("text_model."): value for name, value in whole.items()}
    for tensors in (bare, {f"text_model.{name}": value for name, value in bare.items()}):
        (folder / "model.safetensors").unlink(missing_ok=True)
        save_file(tensors, folder / "model.fp16.safetensors")
        got = load_transformer(transformers.CLIPTextModel, folder, "the text encoder").state_dict()
        assert all((got[name] == value).all() for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda tensors: tensors.pop(next(n for n in tensors if "mlp.fc1.bias" in n)),
            r"1 tensor is missing .*fc1\.bias",
        ),
        (lambda tensors: tensors.update(strange=np.zeros(2, np.float32)), r"not of this network \(.*strange"),
        (
            lambda tensors: tensors.update({(k := next(n for n in tensors if "fc1.bias" in n)): tensors[k][:5]}),
            r"of another shape \(.*fc1\.bias: 5, needed 16",
        ),
    ],
)
def test_a_text_encoder_with_other_weights_is_refused(transformers, text, edit, words):
    change(text[0] / "model.safetensors", edit)
    with pytest.raises(ModelError, match=f"the text encoder does not fit .*{words}"):
        load_transformer(transformers.CLIPTextModel, text[0], "the text encoder")


def test_heads_that_read_a_network_do_not_count(transformers, tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=2
    )
    transformers.Dinov2ForImageClassification(config).save_pretrained(tmp_path)
    assert load_transformer(transformers.Dinov2Model, tmp_path, "the network")
    change(tmp_path / "model.safetensors", lambda tensors: tensors.pop(next(n for n in tensors if "fc1.bias" in n)))
    with pytest.raises(ModelError, match="missing"):
        load_transformer(transformers.Dinov2Model, tmp_path, "the network")
