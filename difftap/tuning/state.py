"""A training's state on disk: parameters, Adam's moments, counters, the best so far. Written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftap.artifacts.files import write_atomic
from difftap.artifacts.run import check_conditions
from difftap.errors import OutputError

if TYPE_CHECKING:
    import torch

__all__ = ["Progress", "load_state", "save_state"]

_KEY = "difftap"


@dataclass
class Progress:
    """Where a training is.

    Attributes:
        epoch: the one it is in, from 0.
        step: steps of it that are done.
        done: steps in all.
        total: sum of the loss over this epoch's pairs so far.
        pairs: this epoch's pairs so far.
        losses: mean loss of every step.
        history: one row an epoch: ``epoch``, ``loss``, and validation PCK at each alpha.
        empty: validation PCK of the empty prompt.
        best: the best epoch's number, from 1; 0 before the first.
        seconds: spent so far, for people.
    """

    epoch: int = 0
    step: int = 0
    done: int = 0
    total: float = 0.0
    pairs: int = 0
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    empty: dict[str, float] = field(default_factory=dict)
    best: int = 0
    seconds: float = 0.0


def save_state(
    path: Path,
    identity: Mapping[str, Any],
    progress: Progress,
    parameters: Sequence[torch.Tensor],
    best: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write everything needed to go on.

    Raises:
        OutputError: it cannot be written.
    """
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    for name, group in (("now", parameters), ("best", best)):
        tensors |= {f"{name}.{k}": value.detach().cpu().contiguous().clone() for k, value in enumerate(group)}
    for k, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{k}.{name}": value.detach().cpu().contiguous().clone() for name, value in moments.items()}
    about = {"identity": identity, "progress": asdict(progress)}
    write_atomic(path, save(tensors, metadata={_KEY: json.dumps(about)}))


def load_state(
    path: Path,
    identity: Mapping[str, Any],
    parameters: Sequence[torch.Tensor],
    best: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Go on from a state: fills parameters, best ones and the optimizer.

    Raises:
        OutputError: the state is another training's, or is damaged.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads(file.metadata()[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        earlier, progress = about["identity"], Progress(**about["progress"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise OutputError(f"'{path}' cannot be read ({error}); start afresh with --overwrite") from error
    check_conditions(path.parent.parent, earlier, json.loads(json.dumps(identity)), kind="folder")
    with torch.no_grad():
        for k, value in enumerate(parameters):
            value.copy_(tensors[f"now.{k}"])
        best[:] = [tensors[f"best.{k}"].to(value.device) for k, value in enumerate(parameters)]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, k, moment = name.split(".")
            state.setdefault(int(k), {})[moment] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return progress
