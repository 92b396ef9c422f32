"""The feature store: extracted maps of a data set in one zarr group, with where they came from; zarr and fsspec."""

from difftap.store.encoding import DTYPES, SCALES, Basis, Encoding, Fidelity
from difftap.store.reader import FeatureStore
from difftap.store.records import Failure, Page, Row
from difftap.store.writer import StoreWriter, check_writable, open_writer

__all__ = [
    "DTYPES",
    "SCALES",
    "Basis",
    "Encoding",
    "Failure",
    "FeatureStore",
    "Fidelity",
    "Page",
    "Row",
    "StoreWriter",
    "check_writable",
    "open_writer",
]
