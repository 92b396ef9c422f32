"""Two FAISS distributions in one environment: they share an import name, and one breaks the other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import metadata

__all__ = ["faiss_clash"]

_FAISS = re.compile(r"faiss-(cpu|gpu(-.*)?)$")


def faiss_clash(names: Iterable[str] | None = None) -> str | None:
    """What is wrong with the FAISS distributions installed; None if nothing is.

    milvus-lite depends on faiss-cpu, so the extra ``milvus`` beside a GPU build overwrites that build's files.

    Args:
        names: names of the distributions installed; those of this environment by default.

    >>> faiss_clash(["numpy", "faiss-cpu"]) is None
    True
    """
    if names is None:
        names = [str(one.metadata["Name"]) for one in metadata.distributions()]
    flat = (name.lower().replace("_", "-") for name in names if name)
    found = sorted({name for name in flat if _FAISS.match(name)})
    if len(found) < 2:
        return None
    gpu = next((name for name in found if "gpu" in name), found[-1])
    others = [name for name in found if name != gpu]
    return (
        f"{' and '.join(found)} are installed together and overwrite each other's module 'faiss'; keep one: pip "
        f"uninstall {' '.join(found)}, then pip install {gpu} (or {others[0]}); milvus-lite needs faiss-cpu, so use it "
        "in another environment than a GPU build"
    )
