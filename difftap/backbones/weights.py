"""The weights of one part of a checkpoint: which files hold them, and whether they are those that its network needs.

Every part goes through here: UNet, VAE, text encoders, DINOv2. A loader that fills what is missing with uninitialised
memory or random numbers (diffusers and transformers only warn) would give features that look like features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from difftap.artifacts.tensors import TensorLocation, locate_tensors
from difftap.backbones.config import read_config
from difftap.errors import ModelError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["check_tensors", "find_weights", "load_network", "load_transformer", "transformer_weights"]

_PREFERRED = (None, "fp32", "fp16", "bf16")
"""Variants from the most exact on; others, such as ``non_ema``, are taken where they are all there is."""
_PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_SHOWN = 3  # tensors that an error names; the rest are counted
_FLOATS = ("F64", "F32", "F16", "BF16")
_UNNEEDED = re.compile(r"(^|\.)(position_ids|num_batches_tracked)$")
"""Tensors that older versions saved and that decide nothing: CLIP's 0, 1, 2, ..."""
_HEADS = re.compile(r"^(classifier|visual_projection|logit_scale)\b")
"""What a checkpoint may hold beside the network: heads that read its output."""
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What attention layers of VAEs were called before diffusers 0.16."""


def find_weights(folder: Path, stem: str = "diffusion_pytorch_model") -> tuple[Path, ...]:
    """Find the safetensors files of one part: whole or in shards, plain or of a variant.

    ======================================================  ==============================================
    ``STEM.safetensors``, ``STEM.fp16.safetensors``         one file, plain or of the variant ``fp16``
    ``STEM.safetensors.index.json``                         a list of shards
    ``STEM.safetensors.index.fp16.json``                    of a variant, as diffusers writes it
    ``STEM.fp16.safetensors.index.json``                    the same, as older programs write it
    ======================================================  ==============================================

    Plain files are preferred, then ``fp32``, ``fp16`` (11 bits a number) and ``bf16`` (8 bits).

    Args:
        folder: the part's folder.
        stem: the file name without its endings: ``diffusion_pytorch_model`` for diffusers, ``model`` for transformers.

    Raises:
        ModelError: there are none, some are missing, they are pickled, or several variants are there and none is
            preferred.
    """
    name = re.escape(stem)
    whole = re.compile(rf"{name}(?:\.(?P<a>\w+))?\.safetensors")
    index = re.compile(rf"{name}(?:\.(?P<a>\w+))?\.safetensors\.index(?:\.(?P<b>\w+))?\.json")
    found: dict[str | None, Path] = {}
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    for pattern in (whole, index):  # where both are there, the list of shards counts
        for path in paths:
            match = pattern.fullmatch(path.name)
            if match and path.is_file():
                found[next((one for one in match.groupdict().values() if one), None)] = path
    chosen = next((found[variant] for variant in _PREFERRED if variant in found), None)
    if chosen is None and len(found) == 1:
        (chosen,) = found.values()
    if chosen is None:
        raise ModelError(_why_none(folder, stem, [path.name for path in found.values()]))
    return _shards(chosen) if chosen.suffix == ".json" else (chosen,)


def _why_none(folder: Path, stem: str, several: Sequence[str]) -> str:
    if several:
        return f"'{folder}' holds several variants ({', '.join(several)}); keep the one that is meant, and no other"
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLED)
    if pickled:
        saver = "diffusers'" if stem.startswith("diffusion") else "transformers'"
        return (
            f"'{folder}' holds pickled weights ({pickled[0]}), which can run code when loaded and are refused; "
            f"allowed: safetensors; save the model again with {saver} save_pretrained(..., safe_serialization=True)"
        )
    return f"'{folder}' holds no weights; '{stem}.safetensors' was expected"


def _shards(index: Path) -> tuple[Path, ...]:
    """List the files that an index names.

    Raises:
        ModelError: the index is damaged, or a file is missing.
    """
    listed = read_config(index, "weights index").get("weight_map")
    names = set(listed.values()) if isinstance(listed, dict) else set()
    # Names with folders in them could lead out of the checkpoint, to any file of this machine.
    if not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ModelError(f"'{index}' names weights that are no files of its folder; get the checkpoint again")
    files = [index.parent / name for name in sorted(names)]
    lacking = [path for path in files if not path.is_file()]
    if lacking or not files:
        raise ModelError(f"'{index}' names weights that are missing: {lacking or 'none'}; get the checkpoint again")
    return tuple(files)


def transformer_weights(folder: Path) -> tuple[Path, ...]:
    """Find the safetensors files of a transformers network; see `find_weights`.

    Raises:
        ModelError: as `find_weights`.
    """
    return find_weights(folder, "model")


def check_tensors(needed: Mapping[str, tuple[int, ...]], files: Sequence[Path], what: str) -> dict[str, str]:
    """Compare the tensors of weight files with those that a network needs, from the files' headers alone.

    Args:
        needed: shape by name, as the network's ``state_dict`` has them.
        files: the weights.
        what: the part, as an error names it.

    Returns:
        the network's name of each tensor, by its name in the files; tensors that decide nothing are left out.

    Raises:
        ModelError: tensors are missing, are not needed, have another shape, or are no floating-point numbers; or a
            file is damaged.
    """
    have = {name: place for name, place in locate_tensors(files).items() if not _UNNEEDED.search(name)}
    names = {name: _own_name(name, needed) for name in have}
    places = {names[name]: place for name, place in have.items()}
    wanted = {name: shape for name, shape in needed.items() if not _UNNEEDED.search(name)}
    faults = [
        _listed("missing", [name for name in wanted if name not in places]),
        _listed("not of this network", [name for name in places if name not in wanted]),
        _listed(
            "of another shape",
            [
                f"{name}: {_said(place.shape)}, needed {_said(wanted[name])}"
                for name, place in places.items()
                if name in wanted and not _fits(place, wanted[name])
            ],
        ),
        _unreadable(places),
    ]
    _refuse(what, files, faults)
    return names


def _unreadable(places: Mapping[str, TensorLocation]) -> str:
    # Quantised weights mean something only together with scales that no loader here applies.
    odd = [f"{name}: {place.dtype}" for name, place in places.items() if place.dtype not in _FLOATS]
    return _listed(f"not of a type that can be read ({', '.join(_FLOATS)})", odd)


def _refuse(what: str, files: Sequence[Path], faults: Sequence[str]) -> None:
    said = [fault for fault in faults if fault]
    if said:
        raise ModelError(
            f"{what} does not fit its configuration: {'; '.join(said)} (in '{files[0]}'); get the checkpoint again"
        )


def _own_name(name: str, needed: Mapping[str, tuple[int, ...]]) -> str:
    """Give the network's name for a tensor of a file: as it is, or as other versions wrote it."""
    stem, _, last = name.rpartition(".")
    parent, _, layer = stem.rpartition(".")
    renamed = f"{parent}.{_RENAMED[layer]}.{last}" if layer in _RENAMED else name
    return renamed if name not in needed and renamed in needed else name


def _fits(place: TensorLocation, shape: tuple[int, ...]) -> bool:
    # Attention of old VAEs was saved as 1 x 1 convolutions: the same numbers with two axes of length 1 more.
    return place.shape == shape or (len(shape) == 2 and place.shape == (*shape, 1, 1))


def _said(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _listed(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    tensors = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
    return f"{tensors} {what} ({', '.join(sorted(names)[:_SHOWN])}{more})"


def _shapes(make: Callable[[], torch.nn.Module]) -> tuple[torch.nn.Module, dict[str, tuple[int, ...]]]:
    """Make a network without memory for its weights, and list what it needs."""
    import torch

    with torch.device("meta"):
        network = make()
    return network, {name: tuple(value.shape) for name, value in network.state_dict().items()}


def _read(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Read every tensor of the files that decides something, in float32."""
    import torch
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if not _UNNEEDED.search(name):
                    # A copy: what the file maps into memory would change, or vanish, with the file.
                    yield name, opened.get_tensor(name).to(torch.float32, copy=True)


def load_network(make: Callable[[], torch.nn.Module], files: Sequence[Path], what: str) -> torch.nn.Module:
    """Load a network in float32, frozen, after its weights were compared with what it needs.

    Args:
        make: builds the network from its configuration.
        files: its weights.
        what: the part, as an error names it.

    Raises:
        ModelError: the network cannot be built, or the weights are not its own (`check_tensors`).
    """
    from safetensors import SafetensorError

    try:
        network, needed = _shapes(make)
        names = check_tensors(needed, files, what)
        state = {names[name]: tensor.reshape(needed[names[name]]) for name, tensor in _read(files)}
        # assign: the tensors that were read become the network's, which holds no memory so far.
        network.load_state_dict(state, strict=False, assign=True)
    except ModelError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
        raise ModelError(f"{what} cannot be loaded ({first_line(error)})") from error
    empty = [name for name, value in (*network.named_parameters(), *network.named_buffers()) if value.is_meta]
    if empty:
        raise ModelError(f"{what} cannot be loaded: nothing gives the value of {empty[0]}")
    return network.eval().requires_grad_(False)


def load_transformer(kind: type[PreTrainedModel], folder: Path, what: str, attention: str = "sdpa") -> torch.nn.Module:
    """Load a transformers network in float32, frozen, and compare its weights with what it needs.

    Args:
        kind: its class.
        folder: the part's folder.
        what: the part, as an error names it.
        attention: how attention is computed; ``eager`` for a network that is traced, since a fused one cannot be.

    Raises:
        ModelError: the folder is not whole, or the weights are not the network's own (`check_tensors`).
    """
    import transformers
    from safetensors import SafetensorError

    files = transformer_weights(folder)
    noise = transformers.utils.logging
    shown = noise.is_progress_bar_enabled()
    noise.disable_progress_bar()
    try:
        _refuse(what, files, [_unreadable(locate_tensors(files))])
        config = kind.config_class.from_pretrained(str(folder), local_files_only=True)
        network, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(_read(files)),
            attn_implementation=attention,
            ignore_mismatched_sizes=True,  # so that they are listed, as the others are
            output_loading_info=True,
        )
        # transformers renames tensors that other versions saved, so what is missing is known only after loading.
        surplus = [name for name in found["unexpected_keys"] if not _HEADS.search(name)]
        odd = [f"{name}: {_said(got)}, needed {_said(needed)}" for name, got, needed in found["mismatched_keys"]]
        faults = [_listed("missing", [*found["missing_keys"]]), _listed("not of this network", surplus)]
        _refuse(what, files, [*faults, _listed("of another shape", odd)])
    except ModelError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
        raise ModelError(f"{what} cannot be loaded ({first_line(error)})") from error
    finally:
        if shown:
            noise.enable_progress_bar()
    frozen: torch.nn.Module = network.float().eval().requires_grad_(False)
    return frozen
