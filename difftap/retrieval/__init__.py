"""Retrieval: keep prototypes or patch features in an index, and find what is nearest to an object, point or image."""

from difftap.retrieval.kinds import INDEXED, IndexMetric, faiss_clash

__all__ = ["INDEXED", "IndexMetric", "faiss_clash"]
