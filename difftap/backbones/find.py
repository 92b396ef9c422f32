"""Find the folder of a model from the name that the user gives.

``pocket`` and local folders need only the disk. ``sd15``, ``sd21`` and ``sdxl`` stand for the published Stable
Diffusion 1.5, 2.1 and XL base 1.0. With ``random_weights`` they are built here at full size, from their published
configuration and with seeded random weights, so that speed, memory and exactness can be measured without a checkpoint.
A hub id (``owner/name``) is downloaded; nothing else uses the network.

``BASE+FILE.safetensors`` is a base model with the UNet's weights replaced by those of a file, as CleanDIFT publishes
them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path

from difftap.artifacts.cache import Cache, Making
from difftap.artifacts.files import JsonObject
from difftap.artifacts.manifest import Manifest
from difftap.artifacts.tensors import locate_tensors
from difftap.backbones.checkpoint import RANDOM_MARK, Checkpoint, backbones, pocket_folder
from difftap.backbones.layouts import describe_file
from difftap.backbones.sd_unet import SDUNet
from difftap.coords import Size
from difftap.errors import ArtifactError, ModelError, first_line, require
from difftap.recipe import ModelReference

__all__ = ["PRESETS", "open_model"]

PRESETS = ("sd15", "sd21", "sdxl")
_SIZES = {"sd15": 3.8, "sd21": 3.8, "sdxl": 5.3}  # GB on disk
_LOG = logging.getLogger("difftap")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_GONE = "stabilityai/stable-diffusion-2-1"  # taken down from the hub, which the error message tells


def open_model(
    reference: ModelReference,
    cache: Cache,
    *,
    size: Size | None = None,
) -> Checkpoint:
    """Find, build or download a model.

    Args:
        reference: ``pocket``, ``sd15``, ``sd21``, ``sdxl``, a folder, or a hub id; ``+FILE.safetensors`` behind any of
            them replaces the UNet's weights.
        cache: where built checkpoints are kept.
        size: the wanted input, ``(W, H)`` in pixels. A size that does not fit is refused before anything is built.

    Raises:
        ModelError: there is no such model, it cannot be downloaded, or the options do not fit it.
        RecipeError: the size does not fit the model that would be built.
    """
    name, revision, random_weights = reference.name, reference.revision, reference.random_weights
    base, plus, file = name.rpartition("+")
    # A folder's own name may hold a plus: then it is meant.
    if plus and base and file.endswith(".safetensors") and not _is_folder(name):
        under = open_model(replace(reference, name=base), cache, size=size)
        return Checkpoint.load(_with_unet(under, Path(file), cache), name)
    if random_weights is not None:
        if name not in PRESETS:
            raise ModelError(f"--random-weights builds {', '.join(PRESETS[:-1])} or {PRESETS[-1]}; got model '{name}'")
        if size is not None:
            config = _preset(name)
            # From the configuration only: building the weights takes minutes and gigabytes.
            SDUNet(name, Path(name), config["unet"], config["vae"], config["scheduler"]).check_size(size)
        return Checkpoint.load(
            _build_random(name, random_weights, cache), f"{name} (random weights, seed {random_weights})"
        )
    if revision is not None and (name not in PRESETS and not _HUB_ID.match(name)):
        raise ModelError(f"--revision goes with a hub id; got model '{name}'")
    if name == "pocket":
        return Checkpoint.load(pocket_folder(), name)
    if _is_folder(name):
        return Checkpoint.load(Path(name), name)
    if _is_file(name):
        raise ModelError(describe_file(Path(name)))
    if name in PRESETS:
        return Checkpoint.load(_download(_preset(name)["hub"], revision), name)
    if _HUB_ID.match(name) and not name.startswith("."):
        return Checkpoint.load(_download(name, revision), name)
    raise ModelError(
        f"no model '{name}'; allowed: pocket, {', '.join(PRESETS)}, the path of a folder, or a hub id owner/name"
    )


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # too long a name for the file system
        return False


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:
        return False


def _preset(name: str) -> JsonObject:
    """Read a preset's hub id and the published configurations of its parts."""
    text = resources.files("difftap").joinpath("assets", "configs", f"{name}.json").read_text(encoding="utf-8")
    config: JsonObject = json.loads(text)
    return config


def _download(hub_id: str, revision: str | None) -> Path:
    """Download a checkpoint's parts from the hub, or find them in its local cache.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        ModelError: they cannot be downloaded.
    """
    hub = require("huggingface_hub", "export", f"downloading model '{hub_id}'")
    try:
        files = [pattern for kind in backbones().values() for pattern in kind.hub_files]
        wanted = {"revision": revision, "allow_patterns": files}
        # fp16 copies and the weights before averaging (non_ema) would double the download, and are not read.
        folder = Path(hub.snapshot_download(hub_id, ignore_patterns=["*fp16*", "*bf16*", "*non_ema*"], **wanted))
        unet = folder / "unet"
        if unet.is_dir() and not any(unet.glob("*.safetensors")):  # it has only half-precision weights
            folder = Path(hub.snapshot_download(hub_id, ignore_patterns=["*non_ema*"], **wanted))
        return folder
    except Exception as error:  # the hub's, its HTTP client's and the system's errors share no base class
        hint = " (this repository was taken down: use a mirror of it, by --model)" if hub_id == _GONE else ""
        raise ModelError(
            f"model '{hub_id}' cannot be downloaded{hint}: {first_line(error)}; give a local "
            "folder by --model DIR, or --random-weights SEED with sd15, sd21 or sdxl to measure speed alone"
        ) from error


def _build_random(name: str, seed: int, cache: Cache) -> Path:
    """Give the folder of a full-size checkpoint with seeded random weights; build it the first time."""
    folder = cache.folder / "checkpoints" / f"{name}-random-{seed}"
    config = _preset(name)
    text = json.dumps(config, sort_keys=True)
    identity = {"preset": name, "seed": seed, "config": hashlib.sha256(text.encode()).hexdigest()}

    def make(scratch: Path) -> Making:
        torch = require("torch", "export", "building random weights")
        diffusers = require("diffusers", "export", "building random weights")
        kept = getattr(torch, config.get("random_dtype", "float32"))  # large models in the type they are published in
        _LOG.info("building %s at full size with random weights: %s GB in '%s'", name, _SIZES[name], folder)
        for part, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
            with torch.random.fork_rng(devices=[]):  # leaves the caller's random state as it was
                torch.manual_seed(seed)
                network = kind.from_config(config[part]).to(kept)
                network.save_pretrained(scratch / part, max_shard_size="64GB")
        (scratch / "scheduler").mkdir()
        (scratch / "scheduler" / "scheduler_config.json").write_text(json.dumps(config["scheduler"], indent=1))
        (scratch / "model_index.json").write_text(json.dumps({RANDOM_MARK: seed}, indent=1))
        return Making()

    return cache.get_or_make("checkpoint", folder, identity, make, manifest=_manifest(folder), adopt=True)


def _manifest(folder: Path) -> Path:
    """Give the path of a built checkpoint's manifest, beside its folder."""
    # Not with_suffix: the folder's name may hold dots.
    return folder.with_name(f"{folder.name}.json")


def _with_unet(base: Checkpoint, file: Path, cache: Cache) -> Path:
    """Make a checkpoint folder from a base model and another UNet's weights, as links to both.

    Raises:
        ModelError: the file is missing, or its tensors' names and shapes are not those of the base model's UNet.
    """
    if not file.is_file():
        raise ModelError(f"no UNet weights at '{file}'; give a safetensors file after the +")
    wanted = {name: place.shape for name, place in locate_tensors(base.weight_files("unet")).items()}
    got = {name: place.shape for name, place in locate_tensors([file]).items()}
    odd = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    if odd:
        raise ModelError(
            f"'{file}' does not fit the UNet of '{base.name}': {len(odd)} tensors differ, such as '{odd[0]}' "
            f"(got {got.get(odd[0], 'none')}, wanted {wanted.get(odd[0], 'none')}); "
            "allowed: diffusers' names and shapes"
        )
    digest, home = cache.memo.digest(file), base.folder.resolve()
    key = hashlib.sha256(f"{digest} {home}".encode()).hexdigest()[:16]
    folder = cache.folder / "checkpoints" / f"{file.stem}-{key}"

    def make(scratch: Path) -> Making:
        (scratch / "unet").mkdir(parents=True)
        for part in base.folder.iterdir():
            if part.name.split(".")[0] != "unet":  # "unet.up1.onnx" too: an exported graph of the base's own UNet
                (scratch / part.name).symlink_to(part.resolve())
        shutil.copyfile(base.folder / "unet" / "config.json", scratch / "unet" / "config.json")
        (scratch / "unet" / "diffusion_pytorch_model.safetensors").symlink_to(file.resolve())
        return Making()

    def check(_: Manifest) -> None:
        # The manifest lists files that exist. A link to a base model that was moved away is not among them.
        lost = [path for path in folder.rglob("*") if not path.exists()]
        if lost:
            raise ArtifactError(f"'{lost[0]}' is a link to a file that does not exist")

    identity = {"unet": digest, "base": str(home)}
    return cache.get_or_make("checkpoint", folder, identity, make, manifest=_manifest(folder), check=check, adopt=True)
