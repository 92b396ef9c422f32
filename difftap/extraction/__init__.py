"""Extraction at data-set scale: staged and streaming, into a store or as batches, on one machine or with Ray."""

from difftap.extraction.batches import Batch, Extractor
from difftap.extraction.run import Run, Settings, default_workers, extract_to_store
from difftap.extraction.stream import Outcome, stream

__all__ = ["Batch", "Extractor", "Outcome", "Run", "Settings", "default_workers", "extract_to_store", "stream"]
