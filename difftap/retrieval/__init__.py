"""Retrieval: prototypes or patch features in an index, and what is nearest to an object, a point or an image."""

from difftap.retrieval.clash import faiss_clash
from difftap.retrieval.spaces import INDEXED, Space

__all__ = ["INDEXED", "Space", "faiss_clash"]
