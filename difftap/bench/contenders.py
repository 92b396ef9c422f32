"""What `difftap bench throughput` measures: our backends in their precisions, and rivals, today's usual ways."""

from __future__ import annotations

from dataclasses import dataclass

from difftap.engine import BACKENDS, check_precision, choose_device, get_backend
from difftap.engine.backend import PRECISIONS
from difftap.errors import BackendError, InputError

__all__ = ["RIVALS", "Contender", "parse_backends", "parse_rivals"]

RIVALS = {
    "dift": "DIFT's way in torch: the image repeated through the VAE for every member, the UNet stopped after the tap",
    "dift-tuned": "the same tuned: the VAE once an image, channels last, compiled",
}
_RIVAL_PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Contender:
    """One way that is measured, a row of the table.

    Attributes:
        name: a backend's name, or one of `RIVALS`.
        precision: the precision that it computes in.
        device: the device that it runs on.
    """

    name: str
    precision: str = "fp32"
    device: str = "cpu"

    @property
    def rival(self) -> bool:
        """Whether it is one of `RIVALS` and not a backend of ours."""
        return self.name in RIVALS

    @property
    def label(self) -> str:
        """The row's name: ``name:precision``."""
        return f"{self.name}:{self.precision}"


def parse_backends(text: str, device: str = "auto") -> tuple[list[Contender], dict[str, str]]:
    """Find the backends that a list names.

    Args:
        text: ``all``, or names with commas between: ``name:precision`` for one precision, ``name`` or ``name:all`` for
            all precisions that the backend has on the device.
        device: a device's name, or ``auto`` for each backend's best.

    Returns:
        the contenders in order; and, for ``all``, the reason for each backend that cannot run here.

    Raises:
        InputError: a name or a precision is unknown.
        BackendError: a named backend cannot run here, or not in that precision.
    """
    found: list[Contender] = []
    absent: dict[str, str] = {}
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in BACKENDS if parts == ["all"] else parts:
        name, _, precision = part.partition(":")
        backend = get_backend(name)
        try:
            where = choose_device(backend, device)
            hindrance = backend.cannot_run(where)
            if hindrance:
                raise BackendError(hindrance)
        except BackendError as error:
            if parts != ["all"]:
                raise
            absent[name] = str(error)
            continue
        if precision in ("", "all"):
            wanted = backend.precisions(where)
        else:
            _known(precision, part, PRECISIONS)
            check_precision(backend, where, precision)
            wanted = (precision,)
        found += [Contender(name, one, where) for one in wanted]
    return list(dict.fromkeys(found)), absent


def parse_rivals(text: str, device: str) -> list[Contender]:
    """Find the rivals that a list names: ``none``, or ``dift``, ``dift-tuned``, with ``:fp16`` or ``:bf16``.

    Raises:
        InputError: a name or a precision is unknown.
    """
    found = []
    for part in [part.strip() for part in text.split(",") if part.strip()]:
        if part == "none":
            continue
        name, _, precision = part.partition(":")
        if name not in RIVALS:
            raise InputError(f"no rival '{name}'; allowed: {', '.join(RIVALS)}, none")
        _known(precision or "fp32", part, _RIVAL_PRECISIONS)
        found.append(Contender(name, precision or "fp32", device))
    return list(dict.fromkeys(found))


def _known(precision: str, part: str, allowed: tuple[str, ...]) -> None:
    if precision not in allowed:
        raise InputError(f"'{part}' asks for precision '{precision}'; allowed: {', '.join(allowed)}")
