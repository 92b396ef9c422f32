"""Configuration files of checkpoints, and the rules for entries that decide the numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from difftap.artifacts.files import JsonObject
from difftap.errors import ModelError

__all__ = ["ConfigRules", "check_entries", "read_config"]


@dataclass(frozen=True)
class ConfigRules:
    """What difftap makes of each entry of one kind of configuration; `check_entries` refuses what is in none of these.

    Attributes:
        used: entries that decide numbers, and are applied: by difftap, or by the class that builds the network of them.
        irrelevant: entries of training, sampling or bookkeeping, which have no say in one pass up to a tap.
        allowed: entries that are used or irrelevant only with one of these values.
    """

    used: frozenset[str]
    irrelevant: frozenset[str]
    allowed: Mapping[str, tuple[object, ...]]

    @property
    def known(self) -> frozenset[str]:
        """All entries that have a rule."""
        return self.used | self.irrelevant | self.allowed.keys()


def check_entries(config: JsonObject, rules: ConfigRules, file: Path) -> None:
    """Refuse a configuration with an entry that would change the numbers and that difftap does not apply.

    An entry without a rule passes while its value is null, false or empty: programs write new options like that. So do
    names that begin with ``_``, which say what program wrote the file.

    Args:
        config: the content of the file.
        rules: what is made of each entry.
        file: where the entries stand, as an error names it.

    Raises:
        ModelError: there is one; names it and, where there are any, the values that are allowed.
    """
    for key, value in config.items():
        if key in rules.allowed and value not in rules.allowed[key]:
            allowed = ", ".join("null" if one is None else repr(one) for one in rules.allowed[key])
            raise ModelError(f"'{file}' has {key} = {value!r}, which difftap does not apply; allowed: {allowed}")
        # Not `value in (None, False)`: 0 equals False, and a new number may well mean something at 0.
        off = value is None or value is False or value in ("", [], {})
        if key not in rules.known and not key.startswith("_") and not off:
            raise ModelError(
                f"'{file}' has {key} = {_short(value)}, which difftap does not know and which may decide the features; "
                "allowed: entries of diffusers' UNet2DConditionModel, AutoencoderKL and schedulers"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_config(path: Path, what: str) -> JsonObject:
    """Read a configuration file, which is a JSON object.

    Args:
        path: the file.
        what: the part that it configures, as an error names it.

    Raises:
        ModelError: it is missing or damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"'{path.parent.parent}' has no {what}: '{path}' is missing; a model is a diffusers-format folder with "
            "unet/, vae/ and scheduler/"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read as JSON ({error}); get the checkpoint again") from error
    if not isinstance(data, dict):
        raise ModelError(f"'{path}' should hold a JSON object, got {type(data).__name__}; get the checkpoint again")
    return data
