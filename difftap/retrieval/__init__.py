"""Retrieval: prototypes or patch features in an index, and what is nearest to an object, a point or an image."""

from difftap.retrieval.kinds import INDEXED, IndexMetric, faiss_clash

__all__ = ["INDEXED", "IndexMetric", "faiss_clash"]
