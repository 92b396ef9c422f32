"""A FAISS index in a folder: the file of the index, the file of its rows, and a manifest that names both.

A change writes new files beside the old ones, and then replaces the manifest in one step. If the change is interrupted,
a reader finds the old index. The next change removes the files that an interrupted one left.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from difftap.artifacts.files import atomic_path, only_writer, output_errors
from difftap.artifacts.manifest import FileRecord, Manifest
from difftap.errors import ArtifactError, InputError, OutputError, first_line
from difftap.retrieval.index import Index, IndexInfo, Rows, VectorBatch
from difftap.retrieval.kinds import FaissIndex, load_faiss, set_effort, to_gpu

__all__ = ["FolderIndex", "check_new", "held_folder", "write_index"]

_MANIFEST = "index.json"
# Our files' names begin so; those with a dot are scratch files of atomic writes. Others are never removed.
_OURS = ("index-", "rows-", "vectors-", ".index", ".rows")


def _direct_queries(width: int) -> int:
    """Say how many queries FAISS takes at once for which it sums squared differences.

    For more it computes |x|^2 + |y|^2 - 2 x.y. In float32 the difference of such large numbers loses small distances
    that decide the order, and "flat" would not be exact. The limit is a number of queries times their width, and in
    older versions a number of queries.
    """
    limit = int(load_faiss("searching an index").cvar.distance_compute_blas_threshold)
    return max(1, (limit - 1) // width if limit >= 1000 else limit - 1)


class FolderIndex(Index):
    """An open FAISS index in a folder; see `Index`."""

    def __init__(self, folder: Path, about: IndexInfo, index: FaissIndex, rows_file: Path, gpu: bool) -> None:
        self.where, self.about = str(folder), about
        self._folder, self._index, self._rows_file = folder, index, rows_file
        self._gpu = gpu
        self._searched = to_gpu(index) if gpu else index  # the copy that answers; `_index` is the one that is saved
        self._rows: Rows | None = None

    @classmethod
    def open(cls, folder: Path, *, gpu: bool = False) -> FolderIndex:
        """Open an index for searching; ``gpu`` puts it on the GPU.

        Raises:
            InputError: there is none.
            ArtifactError: its files are damaged or are not those that its manifest names.
            BackendError: there is no GPU, or it cannot hold the index.
            MissingExtraError: FAISS or pyarrow is not installed.
        """
        faiss = load_faiss("opening an index")
        if not (folder / _MANIFEST).is_file():
            raise InputError(f"no index at '{folder}'; make one with 'difftap index build'")
        manifest = Manifest.load(folder / _MANIFEST)
        manifest.check(folder, {})
        about = IndexInfo.from_dict(manifest.made_from, str(folder))
        names = {Path(name).suffix: folder / name for name in manifest.files}
        try:
            index = faiss.read_index(str(names[".faiss"]))
        except (RuntimeError, KeyError) as error:
            raise ArtifactError(f"index '{folder}' cannot be read ({first_line(error)}); build it again") from error
        if index.ntotal != about.count or index.d != about.width:
            raise ArtifactError(f"index '{folder}' holds {index.ntotal} vectors of {index.d}, not what it says")
        set_effort(index, about.report.get("effort"))
        return cls(folder, about, index, names[".parquet"], gpu)

    def find(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See `Index.find`."""
        if self._gpu or (self.about.kind, self.about.space.product) != ("flat", "l2"):
            return self._searched.search(queries, k)
        step = _direct_queries(self.about.width)
        parts = [self._searched.search(queries[i : i + step], k) for i in range(0, max(1, len(queries)), step)]
        scores, rows = (np.concatenate(each) for each in zip(*parts, strict=True))
        return scores, rows

    def rows(self) -> Rows:
        """See `Index.rows`."""
        if self._rows is None:
            self._rows = Rows.load(self._rows_file)
            if len(self._rows) != self.about.count:
                raise ArtifactError(f"'{self._rows_file}' has {len(self._rows)} rows, the index {self.about.count}")
        return self._rows

    def facts(self, rows: NDArray[np.int64]) -> Rows:
        """See `Index.facts`."""
        return self.rows().take(rows)

    def add(self, batches: Iterable[VectorBatch]) -> int:
        """See `Index.add`. Until all vectors are saved, the folder holds the old index.

        After an error, do not use this object again, because some of the vectors may be in its memory.
        """
        with held_folder(self._folder):
            # The folder was not locked between opening and adding, so another process may have added rows.
            current = IndexInfo.from_dict(Manifest.load(self._folder / _MANIFEST).made_from, self.where)
            if current.count != self.about.count:
                raise InputError(f"index '{self.where}' was changed meanwhile; try again")
            parts = [self.rows()]
            for batch in batches:
                self._index.add(self.about.space.prepare(batch.vectors))
                parts.append(batch.rows)
            rows = Rows.concat(parts)
            added = len(rows) - self.about.count
            about = replace(self.about, count=len(rows))
            if added:
                self._rows_file = write_index(self._folder, about, self._index, rows)
            self.about, self._rows = about, rows
            self._searched = to_gpu(self._index) if self._gpu else self._index
        return added

    def close(self) -> None:
        """See `Index.close`."""
        for name in ("_index", "_searched"):  # FAISS frees the memory with the last reference
            vars(self).pop(name, None)


def check_new(folder: Path, overwrite: bool) -> None:
    """Check that an index can be made in a folder.

    Raises:
        OutputError: it holds an index and ``overwrite`` is not set, or other files; or its parent does not exist.
    """
    if not folder.absolute().parent.is_dir():
        raise OutputError(f"cannot write '{folder}': its folder does not exist; make it first")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"cannot write '{folder}': a file stands there; give the name of a new folder")
    if (folder / _MANIFEST).exists() and not overwrite:
        raise OutputError(f"'{folder}' holds an index already; add to it with 'difftap index add', or --overwrite it")
    strange = _strange(folder)
    if strange:
        raise OutputError(f"cannot write '{folder}': it holds '{strange}', which is no index's; give a new folder")


def _strange(folder: Path) -> str | None:
    if not folder.is_dir():
        return None
    kept = (_MANIFEST, ".lock", *_OURS)
    return next((path.name for path in sorted(folder.iterdir()) if not path.name.startswith(kept)), None)


@contextlib.contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Lock an index's folder for a change; make the folder if it does not exist.

    Raises:
        OutputError: another process is changing it, or it cannot be written.
    """
    with output_errors(folder):
        folder.mkdir(exist_ok=True)
    with only_writer(folder, folder / ".lock"):
        _sweep(folder)
        yield


def _sweep(folder: Path) -> None:
    """Remove those of our files that the manifest does not name."""
    kept = {_MANIFEST, ".lock"}
    if (folder / _MANIFEST).exists():
        kept |= set(Manifest.load(folder / _MANIFEST).files)
    for path in folder.iterdir():
        if path.name.startswith(_OURS) and path.name not in kept and path.is_file():
            with contextlib.suppress(OSError):
                path.unlink()


def write_index(folder: Path, about: IndexInfo, index: FaissIndex, rows: Rows) -> Path:
    """Write an index's files, and last the manifest that names them. The caller has locked the folder (`held_folder`).

    Returns:
        the file of the rows.

    Raises:
        OutputError: the folder cannot be written.
    """
    faiss = load_faiss("saving an index")
    generation = secrets.token_hex(4)  # new names, so that the old manifest's files stay until it is replaced
    vectors_file, rows_file = folder / f"index-{generation}.faiss", folder / f"rows-{generation}.parquet"
    # FAISS does not report errors that appear when it closes a file (a full disk); a Python file does.
    with atomic_path(vectors_file) as scratch, open(scratch, "wb") as handle:
        faiss.write_index(index, faiss.PyCallbackIOWriter(handle.write, 1 << 20))
    rows.save(rows_file)
    files = {path.name: FileRecord.of(path) for path in (vectors_file, rows_file)}
    Manifest("index", about.to_dict(), files).save(folder / _MANIFEST)
    _sweep(folder)
    return rows_file
