"""The feature store: the extracted maps of a data set, with their provenance, in one zarr group."""

from difftap.features.store.encoding import DTYPES, SCALES, Basis, Encoding, Fidelity
from difftap.features.store.reader import FeatureStore
from difftap.features.store.schema import Failure, ShardEntry, StoredRow
from difftap.features.store.writer import StoreWriter, check_writable, open_writer

__all__ = [
    "DTYPES",
    "SCALES",
    "Basis",
    "Encoding",
    "Failure",
    "FeatureStore",
    "Fidelity",
    "ShardEntry",
    "StoreWriter",
    "StoredRow",
    "check_writable",
    "open_writer",
]
