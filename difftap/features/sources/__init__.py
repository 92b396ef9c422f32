"""Where a data set's images come from: a folder, a list, a glob, tar files, Parquet or Arrow columns.

A source lists its items once, in an order that does not change; an item is small, knows its key, and loads its image by
itself, in any thread, process or machine that sees the files.
"""

from difftap.features.sources.items import Item, Source
from difftap.features.sources.opening import open_source

__all__ = ["Item", "Source", "open_source"]
