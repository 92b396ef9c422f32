"""The cache: what takes long to make is made once, and is trusted only if its manifest says so.

Everything in the cache comes through `Cache.get_or_make`: exported graphs and their variants, engines, prompt
embeddings, checkpoints. The caller says what an artifact must have been made from: its identity.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from difftap.artifacts.digests import DigestMemo
from difftap.artifacts.files import atomic_path, output_errors, sweep
from difftap.artifacts.manifest import FileRecord, Manifest
from difftap.errors import ArtifactError

__all__ = ["Cache", "Making", "default_cache_folder"]

_LOG = logging.getLogger("difftap")


def default_cache_folder() -> Path:
    """Give the folder that ``$DIFFTAP_CACHE`` names if it is set, else difftap's folder in the user's cache."""
    chosen = os.environ.get("DIFFTAP_CACHE")
    return Path(chosen) if chosen else Path(user_cache_path("difftap"))


@dataclass(frozen=True)
class Making:
    """What the manifest of a new artifact says besides its identity and its own files.

    Attributes:
        beside: other files that it needs (the weights that a graph points into).
        made_with: conditions that are recorded but never compared, such as versions of packages.
        report: what was measured while it was made.
    """

    beside: Sequence[Path] = ()
    made_with: Mapping[str, object] = field(default_factory=dict)
    report: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Cache:
    """The artifacts on this machine.

    Attributes:
        folder: the cache folder; created by the first write.
    """

    folder: Path

    @property
    def memo(self) -> DigestMemo:
        """The remembered hashes of large files."""
        return DigestMemo(self.folder / "digests.json")

    @contextlib.contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """Let one process at a time make the artifact at a path; the others wait.

        Raises:
            OutputError: the lock cannot be made.
        """
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(str(path.with_name(f".{path.name}.lock")))
            try:
                lock.acquire(timeout=2)  # a short wait is not worth a message
            except Timeout:
                _LOG.warning("another process is making '%s'; waiting for it", path)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def find(
        self, manifest: Path, identity: Mapping[str, object], check: Callable[[Manifest], None] | None = None
    ) -> Manifest | None:
        """Read the manifest of an artifact that can be trusted; None if there is none.

        Args:
            manifest: path of its manifest; the artifact's files are named relative to its folder.
            identity: what it must have been made from, name by name.
            check: a further check; raises ArtifactError to refuse the artifact.

        Raises:
            ArtifactError: the artifact is stale, foreign, cut short or changed.
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
        identity: Mapping[str, object],
        make: Callable[[Path], Making],
        *,
        manifest: Path | None = None,
        check: Callable[[Manifest], None] | None = None,
        adopt: bool = False,
    ) -> Path:
        """Give the path of a trusted artifact; make it first if there is none.

        An artifact that cannot be trusted is made again, with a warning that names the reason. If several processes
        want the same artifact, one makes it and the others wait. A process that is killed leaves nothing that would be
        trusted: files get their names once they are whole, and the manifest is written last.

        Args:
            kind: the artifact's kind, for its manifest.
            path: the artifact's file or folder.
            identity: what decides its bytes or numbers, as plain JSON values.
            make: writes the file or folder to the scratch path it is given, in the same folder as ``path``.
            manifest: path of its manifest; by default ``path`` with the ending ``.json``.
            check: as in `find`.
            adopt: trust a folder that has no manifest, and write one: version 0.1.0 made checkpoint folders in one
                step, but wrote no manifest.

        Raises:
            OutputError: the cache cannot be written.
        """
        manifest = path.with_suffix(".json") if manifest is None else manifest
        try:
            if self.find(manifest, identity, check) is not None:
                return path
        except ArtifactError as error:
            _LOG.warning("%s; making it again", error)
        with self.lock(manifest):
            # Another process may have made it while this one waited. If it is still not trusted, the reason has been
            # logged above.
            with contextlib.suppress(ArtifactError):
                if self.find(manifest, identity, check) is not None:
                    return path
            if adopt and path.is_dir() and not manifest.exists():
                try:
                    found = self._describe(kind, manifest, identity, _files(path), Making())
                    if check is not None:
                        check(found)
                    found.save(manifest)
                    return path
                except ArtifactError as error:
                    _LOG.warning("%s; making it again", error)
            with output_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                sweep(path)  # safe, because no other process writes here while this one holds the lock
            self.make(kind, path, identity, make, manifest=manifest)
        return path

    def make(
        self,
        kind: str,
        path: Path,
        identity: Mapping[str, object],
        make: Callable[[Path], Making],
        *,
        manifest: Path | None = None,
    ) -> Manifest:
        """Make an artifact and replace what is at its path; the arguments are those of `get_or_make`.

        Raises:
            OutputError: it cannot be written.
        """
        manifest = path.with_suffix(".json") if manifest is None else manifest
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as scratch:
            made = make(scratch)
            manifest.unlink(missing_ok=True)  # before the new files take their place, which it does not describe
        found = self._describe(kind, manifest, identity, (*_files(path), *made.beside), made)
        found.save(manifest)
        return found

    def record(
        self,
        kind: str,
        manifest: Path,
        identity: Mapping[str, object],
        files: Sequence[Path],
        report: Mapping[str, object],
    ) -> Manifest:
        """Write a manifest for files that exist already.

        Raises:
            OutputError: it cannot be written.
        """
        found = self._describe(kind, manifest, identity, files, Making(report=report))
        with output_errors(manifest):
            manifest.parent.mkdir(parents=True, exist_ok=True)
        found.save(manifest)
        return found

    def _describe(
        self, kind: str, manifest: Path, identity: Mapping[str, object], files: Sequence[Path], made: Making
    ) -> Manifest:
        home = manifest.parent
        # Files below the manifest are named relative to it, so that the cache folder can be moved. Others (a
        # checkpoint's own weights) have no place in it, and are named by their full path.
        names = {f.relative_to(home).as_posix() if f.is_relative_to(home) else str(f): f for f in files}
        records = {name: FileRecord(file.stat().st_size, self.memo.digest(file)) for name, file in names.items()}
        return Manifest(kind, {**identity, **made.made_with}, records, dict(made.report))

    def place_files(self, sources: Sequence[Path], folder: Path) -> tuple[Path, ...]:
        """Put files into a folder of artifacts: as hard links where the file system allows them, else as copies.

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
                        # Not a symbolic link: runtimes refuse one that leaves the graph's folder. Resolved, because
                        # the files of a hub snapshot are symbolic links themselves.
                        os.link(source.resolve(), scratch)
                    except OSError:  # another file system, or one without hard links
                        shutil.copyfile(source, scratch)
        return tuple(placed)


def _files(path: Path) -> tuple[Path, ...]:
    """List an artifact's own files: the file itself, or all files below a folder (links to folders not followed)."""
    return tuple(sorted(p for p in path.rglob("*") if p.is_file())) if path.is_dir() else (path,)
