"""Train `pocket`.

From the repository root:

    python -m training.train --config training/pocket.toml --data DIR

Starts, or continues from the last checkpoint of the run folder. It may be killed at any time: at most
`checkpoint_seconds` of work are lost. `--device cuda` uses one GPU. Letters: B batch, C channels, h w latent cells.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import logging
import os
import sys
import time
import tomllib
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional as F  # noqa: N812

from training import losses
from training.batches import Ahead, Batch, Batches
from training.data import Config, ImageCache
from training.features import validate
from training.model import Pocket, Taps, build, export, scheduler
from training.optim import Average, build_optimizers, speed_up_group_norm
from training.teacher import TargetCache
from training.threads import Threads

log = logging.getLogger("training")
LONGEST_STEP = 20.0  # seconds; more means that the process was stopped, and is not counted as training


def vocabulary(images: ImageCache) -> list[str]:
    """List all caption words, sorted."""
    return sorted({w for item in images.items for w in item.words.split()} | {"a", "of", "photo"})


class Trainer:
    """The model with optimisers, averages and counters; all of them are saved and restored."""

    def __init__(self, config: Config, images: ImageCache, device: str) -> None:
        self.config, self.device = config, device
        torch.manual_seed(config["train"]["seed"])
        self.pocket: Pocket = build(config["model"], vocabulary(images))
        for module in self.pocket.modules().values():
            module.to(device)
        for module in (self.pocket.vae, self.pocket.unet):
            module.to(memory_format=torch.channels_last).train()
            if device == "cpu":
                # Plain attention, because the backward pass of the fused CPU kernel is several times slower here.
                module.set_attn_processor(AttnProcessor())
                speed_up_group_norm(module)
        self.taps = Taps(self.pocket.unet)
        self.params = self.pocket.parameters()
        self.optimizers = build_optimizers(self.pocket.modules(), config["train"])
        self.average = Average(self.params, config["train"]["ema"])
        self.alphas = scheduler().alphas_cumprod.to(device)
        self.step, self.seconds, self.decaying = 0, 0.0, False
        self.latent_std = torch.tensor(0.0)

    def identity(self) -> str:
        """Give the settings that must not change between a checkpoint and its continuation, as text."""
        fixed = {k: v for k, v in self.config.items() if k not in ("run", "schedule")}
        return json.dumps(fixed, sort_keys=True)

    def save(self, path: Path) -> None:
        """Write everything that is needed to continue, atomically."""
        state = {
            "identity": self.identity(),
            "params": [p.detach() for p in self.params],
            "average": self.average.values,
            "count": self.average.count,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "counters": [self.step, self.seconds, float(self.decaying)],
            "latent_std": self.latent_std,
            "random": torch.get_rng_state(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint. Raises ValueError if it was made with another configuration."""
        state = torch.load(path, weights_only=True, map_location=self.device)
        if state["identity"] != self.identity():
            raise ValueError(
                f"{path} was made under another configuration; choose another [run] folder in the TOML, "
                "or put the old settings back"
            )
        with torch.no_grad():
            for p, value in zip(self.params, state["params"], strict=True):
                p.copy_(value)
        for held, value in zip(self.average.values, state["average"], strict=True):
            held.copy_(value)
        self.average.count = state["count"]
        for optimizer, value in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(value)
        step, self.seconds, decaying = state["counters"]
        self.step, self.decaying = int(step), bool(decaying)
        self.latent_std = state["latent_std"].cpu()
        torch.set_rng_state(state["random"].cpu())

    def rate(self) -> float:
        """Give the factor of the learning rate: warm-up by steps, then constant, then linear to zero by the clock."""
        schedule = self.config["schedule"]
        left = schedule["budget_seconds"] - self.seconds
        if schedule.get("deadline"):
            end = datetime.datetime.fromisoformat(schedule["deadline"])
            left = min(left, (end - datetime.datetime.now(datetime.UTC)).total_seconds())
        tail = schedule["decay_share"] * schedule["budget_seconds"]
        self.decaying = left < tail
        return min(1.0, (self.step + 1) / self.config["train"]["warmup_steps"], max(0.0, left / tail))

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Compute all loss terms of one batch, unweighted."""
        c, device = self.config["train"], self.device
        pixels = batch.pixels.to(device).contiguous(memory_format=torch.channels_last)
        target = batch.target.to(device)
        b, split = len(pixels), round(len(pixels) * (1 - c["denoise_share"]))
        with torch.autocast(device, torch.bfloat16, enabled=c["autocast"]):
            posterior = self.pocket.vae.encode(pixels).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            std = latents.detach().std().cpu()
            self.latent_std = std if self.step == 0 else self.latent_std.lerp(std, 0.02)
            scaled = latents / self.latent_std.to(device)
            # Denoising must not train the encoder, which would learn latents that are easy to denoise; alignment
            # should. So the batch is split, and only the aligned part, at low timesteps, passes gradients to it.
            scaled = torch.cat([scaled[:split], scaled[split:].detach()])
            low = (c["low_timestep_scale"] * torch.rand(split) ** 3).long()
            timesteps = torch.cat([low, torch.randint(0, 1000, (b - split,))]).to(device)
            noise = torch.randn_like(scaled)
            signal = self.alphas[timesteps][:, None, None, None]
            noisy = signal.sqrt() * scaled + (1 - signal).sqrt() * noise
            prompt = self.pocket.prompts(batch.texts)
            _, low_maps = self.taps.run(noisy[:split], timesteps[:split], prompt[:split], cut=True)
            predicted, all_maps = self.taps.run(noisy[split:], timesteps[split:], prompt[split:], cut=False)
            few = max(1, round(b * c["decode_share"]))
            decoded = self.pocket.vae.decode(latents[:few]).sample
        maps = {k: torch.cat([low_maps[k], all_maps[k]]).float() for k in low_maps}
        return self._terms(maps, target, signal[:, 0, 0, 0], split) | {
            "denoise": F.mse_loss(predicted.float(), noise[split:]),
            "reconstruct": F.l1_loss(decoded.float(), pixels[:few]),
            "kl": losses.kl_to_normal(mean, logvar),
        }

    def _terms(
        self, maps: dict[str, torch.Tensor], target: torch.Tensor, signal: torch.Tensor, split: int
    ) -> dict[str, torch.Tensor]:
        """Compute the alignment terms of maps {"up1", "up2"}, target (B, K, h, w), share of signal per image (B,)."""
        c = self.config["loss"]
        # up1 has half as many cells as up2 along each side.
        halved = F.normalize(F.avg_pool2d(target, 2), dim=1)
        cells = split * target.shape[2] * target.shape[3]
        chosen = torch.randperm(cells)[: c["relation_tokens"]].to(target.device)
        return {
            "align_up1": losses.align(maps["up1"], halved, signal),
            "align_up2": losses.align(maps["up2"], target, signal),
            "relation": losses.relation(maps["up2"], target, chosen, c["relation_temperature"]),
        }

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Do one optimiser step; return the loss terms, the rate factor and the gradient's norm."""
        factor = self.rate()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config["train"]["learning_rate"] * factor
            optimizer.zero_grad(set_to_none=True)
        terms = self.losses(batch)
        total = sum(self.config["loss"][name] * value for name, value in terms.items())
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.config["train"]["clip"])
        if not torch.isfinite(norm):
            log.warning("step %d: gradient is not finite, step skipped", self.step)
        else:
            for optimizer in self.optimizers:
                optimizer.step()
            self.average.update()
        self.step += 1
        return {k: round(v.item(), 5) for k, v in terms.items()} | {
            "rate": round(factor, 4),
            "grad": round(norm.item(), 3),
        }


def export_only(config: Config, data: Path, which: str) -> None:
    """Export without training: the "average" or "latest" weights of the last checkpoint, or the "untrained" model."""
    images = ImageCache(data, Path(config["run"]["cache"]), config["data"]["max_short_side"])
    trainer = Trainer(config, images, "cpu")
    if which == "untrained":
        trainer.latent_std = torch.tensor(1.0)
    else:
        trainer.restore(Path(config["run"]["folder"]) / "checkpoint.pt")
        if which == "average":
            trainer.average.swap()
    size = export(trainer.pocket, 1 / float(trainer.latent_std), Path(config["run"]["export"]))
    log.info("exported step %d, %.1f MB", trainer.step, size / 1e6)


def run(config: Config, data: Path, device: str) -> None:
    """Train until the schedule ends; save checkpoints, validate and export on the way.

    Raises ValueError if another process trains in the same folder.
    """
    folder, out = Path(config["run"]["folder"]), Path(config["run"]["export"])
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")  # noqa: SIM115 - held until the process ends, even if it is killed
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder} is being trained in by another process; stop it first, or wait") from None
    threads = Threads(config["run"]["threads"])
    images = ImageCache(data, Path(config["run"]["cache"]), config["data"]["max_short_side"])
    trainer = Trainer(config, images, device)
    targets = TargetCache(images, config["teacher"], Path(config["run"]["cache"]))
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        trainer.restore(checkpoint)
        log.info("going on from step %d, %.0f s", trainer.step, trainer.seconds)
    ahead = Ahead(Batches(images, targets, config["data"], config["train"]), trainer.step)
    timers = dict.fromkeys(("checkpoint", "export", "validate"), time.monotonic())

    def due(name: str) -> bool:
        period = config["run"][f"{name}_seconds"]
        if period and time.monotonic() - timers[name] >= period:
            timers[name] = time.monotonic()
            return True
        return False

    def write(name: str, row: dict[str, object]) -> None:
        with open(folder / f"{name}.jsonl", "a") as out_file:
            out_file.write(json.dumps({"step": trainer.step, "seconds": round(trainer.seconds, 1)} | row) + "\n")

    def finish_part(final: bool) -> None:
        trainer.average.swap()
        if final or due("validate"):
            row = validate(trainer.pocket, trainer.taps, float(trainer.latent_std), images, targets, config, device)
            write("validation", row)
            log.info("validation at step %d: %s", trainer.step, row)
        if final or due("export"):
            size = export(trainer.pocket, 1 / float(trainer.latent_std), out)
            log.info("exported step %d, %.1f MB", trainer.step, size / 1e6)
        trainer.average.swap()

    while trainer.rate() > 0:
        threads.adapt()
        started = time.monotonic()
        ahead.final = trainer.decaying
        row = trainer.train_step(ahead.next())
        spent = time.monotonic() - started
        trainer.seconds += min(spent, LONGEST_STEP)
        write("log", row | {"spent": round(spent, 2), "others": round(threads.others, 2)})
        if trainer.step % 20 == 0:
            log.info("step %d %.0f s %s", trainer.step, trainer.seconds, row)
        if due("checkpoint"):
            trainer.save(checkpoint)
        finish_part(final=False)
    trainer.save(checkpoint)
    finish_part(final=True)


def main() -> int:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description="train the embedded model", allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds train/caltech101 and the rest")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--export-only", choices=["average", "latest", "untrained"], help="write the model folder and stop"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        config = tomllib.loads(args.config.read_text())
        if args.export_only:
            export_only(config, args.data, args.export_only)
        else:
            run(config, args.data, args.device)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
