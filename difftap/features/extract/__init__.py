"""Extract the features of a data set, streaming, into a store or as batches, on one machine or with Ray."""

from difftap.features.extract.batches import Batch, Extractor
from difftap.features.extract.extraction import ExtractionSummary, ExtractSettings, default_workers, extract_to_store
from difftap.features.extract.stream import Outcome, stream

__all__ = [
    "Batch",
    "ExtractSettings",
    "ExtractionSummary",
    "Extractor",
    "Outcome",
    "default_workers",
    "extract_to_store",
    "stream",
]
