"""The cache: whatever takes long to make is made once, and trusted only if its manifest says so.

`Cache.get_or_make` is the one way in for everything made: exported graphs and their variants, engines, prompt
embeddings, checkpoints. What an artefact must have been made from (its identity) is the caller's knowledge.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from difftap.artifacts.digests import DigestMemo
from difftap.artifacts.files import atomic_path, output_errors, sweep
from difftap.artifacts.manifest import FileRecord, Manifest
from difftap.errors import ArtefactError

__all__ = ["Cache", "Making", "default_cache_folder"]

_LOG = logging.getLogger("difftap")


def default_cache_folder() -> Path:
    """Give ``$DIFFTAP_CACHE`` if it is set, else the user's cache folder."""
    chosen = os.environ.get("DIFFTAP_CACHE")
    return Path(chosen) if chosen else Path(user_cache_path("difftap"))


@dataclass(frozen=True)
class Making:
    """What the manifest of a new artefact says besides its identity and its own files.

    Attributes:
        beside: other files that it cannot do without (the weights that a graph points into).
        made_with: conditions that are written down and never compared, such as versions of packages.
        report: what was measured while it was made.
    """

    beside: Sequence[Path] = ()
    made_with: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cache:
    """The artefacts on this machine.

    Attributes:
        folder: the cache folder; made when first written to.
    """

    folder: Path

    @property
    def memo(self) -> DigestMemo:
        """The memory of large files' hashes."""
        return DigestMemo(self.folder / "digests.json")

    @contextlib.contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """Let one process at a time make what stands at a path; the others wait, then find it done.

        Raises:
            OutputError: the lock cannot be made.
        """
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(str(path.with_name(f".{path.name}.lock")))
            try:
                lock.acquire(timeout=2)
            except Timeout:
                _LOG.warning("another process is making '%s'; waiting for it", path)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def find(
        self, manifest: Path, identity: Mapping[str, Any], check: Callable[[Manifest], None] | None = None
    ) -> Manifest | None:
        """Read the manifest of an artefact that can be trusted; None if it was never finished.

        Args:
            manifest: where its manifest lies; its files are named from there.
            identity: what it must have been made from, name by name.
            check: raises ArtefactError for anything else that makes it another one than is meant.

        Raises:
            ArtefactError: it is there, and is stale, foreign, cut short or changed.
        """
        if not manifest.is_file():
            return None
        found = Manifest.load(manifest)
        found.check(manifest.parent, identity, self.memo.digest)
        if check is not None:
            check(found)
        return found

    def get_or_make(
        self,
        kind: str,
        path: Path,
        identity: Mapping[str, Any],
        make: Callable[[Path], Making],
        *,
        manifest: Path | None = None,
        check: Callable[[Manifest], None] | None = None,
        adopt: bool = False,
    ) -> Path:
        """Give the trusted artefact that stands at a path; make it if there is none.

        One that cannot be trusted is made again, with a warning that names the reason. Of several processes that want
        the same artefact one makes it and the others wait. A process that is killed leaves nothing that is trusted:
        the files get their name when they are whole, and the manifest is written after that.

        Args:
            kind: what the manifest calls it.
            path: the artefact's file or folder.
            identity: what decides its bytes or numbers, as plain JSON values.
            make: writes the file or folder to the scratch path it is given, in the same folder as ``path``.
            manifest: where its manifest lies; by default beside it, with ``.json`` for the file's ending.
            check: as in `find`.
            adopt: trust a folder without a manifest and write one. For what version 0.1.0 moved into place whole, but
                without a manifest.

        Raises:
            OutputError: the cache cannot be written.
        """
        manifest = path.with_suffix(".json") if manifest is None else manifest
        try:
            if self.find(manifest, identity, check) is not None:
                return path
        except ArtefactError as error:
            _LOG.warning("%s; making it again", error)
        with self.lock(manifest):
            with contextlib.suppress(ArtefactError):  # another process may have made it meanwhile
                if self.find(manifest, identity, check) is not None:
                    return path
            if adopt and path.is_dir() and not manifest.exists():
                try:
                    found = self._describe(kind, manifest, identity, _files(path), Making())
                    if check is not None:
                        check(found)
                    found.save(manifest)
                    return path
                except ArtefactError as error:
                    _LOG.warning("%s; making it again", error)
            with output_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                sweep(path)  # nobody else writes here: we hold the lock
            self.make(kind, path, identity, make, manifest=manifest)
        return path

    def make(
        self,
        kind: str,
        path: Path,
        identity: Mapping[str, Any],
        make: Callable[[Path], Making],
        *,
        manifest: Path | None = None,
    ) -> Manifest:
        """Make an artefact whatever stands at its path; the arguments are those of `get_or_make`.

        Raises:
            OutputError: it cannot be written.
        """
        manifest = path.with_suffix(".json") if manifest is None else manifest
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as scratch:
            made = make(scratch)
            manifest.unlink(missing_ok=True)  # before the files change: it must vouch for no others than its own
        found = self._describe(kind, manifest, identity, (*_files(path), *made.beside), made)
        found.save(manifest)
        return found

    def record(
        self,
        kind: str,
        manifest: Path,
        identity: Mapping[str, Any],
        files: Sequence[Path],
        report: Mapping[str, Any],
    ) -> Manifest:
        """Write the manifest of files that are there already, whoever made them."""
        found = self._describe(kind, manifest, identity, files, Making(report=report))
        with output_errors(manifest):
            manifest.parent.mkdir(parents=True, exist_ok=True)
        found.save(manifest)
        return found

    def _describe(
        self, kind: str, manifest: Path, identity: Mapping[str, Any], files: Sequence[Path], made: Making
    ) -> Manifest:
        home = manifest.parent
        # Relative where they lie below the manifest, so that a cache may be carried to another machine; what came
        # beside a checkpoint is named where it is.
        names = {f.relative_to(home).as_posix() if f.is_relative_to(home) else str(f): f for f in files}
        records = {name: FileRecord(file.stat().st_size, self.memo.digest(file)) for name, file in names.items()}
        return Manifest(kind, {**identity, **made.made_with}, records, made.report)

    def place_files(self, sources: Sequence[Path], folder: Path) -> tuple[Path, ...]:
        """Put files into a folder of artefacts, by hard link where the file system allows it, else as a copy.

        Runtimes refuse symbolic links that leave the graph's folder, so a link has to be a hard one.

        Raises:
            OutputError: the folder cannot be written.
        """
        placed = []
        for source in sources:
            target = folder / source.name
            placed.append(target)
            with output_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists() and self.memo.digest(target) == self.memo.digest(source):
                    continue
                with atomic_path(target) as scratch:
                    try:
                        os.link(source.resolve(), scratch)  # a hub snapshot is made of symbolic links
                    except OSError:
                        shutil.copyfile(source, scratch)
        return tuple(placed)


def _files(path: Path) -> tuple[Path, ...]:
    """List an artefact's own files: itself, or all below a folder, without those behind links to folders."""
    return tuple(sorted(p for p in path.rglob("*") if p.is_file())) if path.is_dir() else (path,)
