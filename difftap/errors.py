"""What difftap raises.

::

    DifftapError
    |-- InputError (ValueError)            a value, file or option the user gave
    |   |-- ImageError                     an image that cannot be read or used
    |   |-- PointError                     a point or point file that cannot be used
    |   |-- PairsError                     a pair list that cannot be used
    |   |-- RecipeError                    a recipe, preset or tap that does not exist or fit
    |   `-- ModelError                     a checkpoint that is missing, incomplete or unsafe
    |-- MissingExtraError (ImportError)    an optional dependency; the message holds the pip line
    |-- BackendError (RuntimeError)        a runtime that is absent, or that failed
    |   `-- NonFiniteError                 a run whose output holds NaN or infinity
    |-- ArtifactError (RuntimeError)       a cached file that is stale, foreign, truncated or tampered
    `-- OutputError (OSError)              a result that could not be written

Every message is one line: what is wrong, what was got, what is allowed, how to mend it. The command line prints it and
exits with 2; anything else that escapes is a bug.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "ArtifactError",
    "BackendError",
    "DifftapError",
    "ImageError",
    "InputError",
    "MissingExtraError",
    "ModelError",
    "NonFiniteError",
    "OutputError",
    "PairsError",
    "PointError",
    "RecipeError",
    "first_line",
    "require",
]


class DifftapError(Exception):
    """Base of everything difftap raises on purpose.

    Attributes:
        detail: the end of the message, where it is to stand on lines of its own (the tree of folders that was
            expected); mostly nothing.
    """

    detail: str = ""


class InputError(DifftapError, ValueError):
    """A value, file or option the user gave cannot be used."""


class ImageError(InputError):
    """An image cannot be read or is not usable."""


class PointError(InputError):
    """A point, or a file of points, cannot be used."""


class PairsError(InputError):
    """A list of image pairs cannot be used."""


class RecipeError(InputError):
    """A recipe, preset, tap or matcher does not exist or does not fit."""


class ModelError(InputError):
    """A checkpoint is missing, incomplete, of another kind, or unsafe to load."""


class MissingExtraError(DifftapError, ImportError):
    """An optional dependency is not installed; the message holds the pip line."""


class BackendError(DifftapError, RuntimeError):
    """A runtime is absent, or failed while opening or running an engine."""


class NonFiniteError(BackendError):
    """An engine's output holds NaN or infinity."""


class ArtifactError(DifftapError, RuntimeError):
    """A cached file is stale, foreign, truncated or tampered with."""


class OutputError(DifftapError, OSError):
    """A result could not be written."""

    # OSError swaps in its own __str__ for two arguments; one message is all we ever pass.


def first_line(error: BaseException) -> str:
    """Shorten another package's error to the one line that fits into ours."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def require(module: str, extra: str, why: str) -> ModuleType:
    """Import an optional dependency, or say how to get it.

    Args:
        module: import name, e.g. ``"torch"``.
        extra: the difftap extra that installs it, e.g. ``"export"``.
        why: what needs it, as the subject of a sentence, e.g. ``"exporting a checkpoint"``.

    Raises:
        MissingExtraError: the module is not importable; the message holds the pip line.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{why} needs the package '{module}', which cannot be imported here ({error}); "
            f"install it with: pip install 'difftap[{extra}]' (in a checkout: make setup)"
        ) from error
