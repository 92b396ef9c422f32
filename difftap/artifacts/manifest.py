"""Manifests: an artifact is trusted only if its manifest says so.

Every cached artifact (an exported graph, an engine, a prompt's embedding) has a JSON manifest beside it. The manifest
says what the artifact was made from, and the SHA-256 of each of its files. It is written last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from difftap.artifacts.files import JsonObject, write_atomic
from difftap.errors import ArtifactError

__all__ = ["FileRecord", "Manifest", "file_digest"]

SCHEMA = 1
_CHUNK = 1 << 22  # bytes read at once, so that hashing gigabytes takes little memory


def file_digest(path: Path) -> str:
    """Give a file's SHA-256 as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and SHA-256."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Measure and hash a file."""
        return cls(path.stat().st_size, file_digest(path))


def text_digest(data: Mapping[str, object]) -> str:
    """Hash plain data with SHA-256, whatever the order of its keys and the spaces of its file."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, what it was made from, and what its files must look like.

    Attributes:
        kind: ``graph``, ``weights``, ``engine``, ``prompt``, ``checkpoint`` or ``index``.
        made_from: every condition that decides the artifact's bytes or numbers.
        files: the record of each file, by its path relative to the manifest's folder.
        report: what was measured when it was made (fidelity), for people; not part of its identity.
    """

    kind: str
    made_from: JsonObject
    files: Mapping[str, FileRecord]
    report: JsonObject = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the manifest as JSON with its own hash, atomically."""
        data = {"schema": SCHEMA, **asdict(self)}
        write_atomic(path, json.dumps({**data, "sha256": text_digest(data)}, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            ArtifactError: it is missing, is not JSON, or has another schema.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            said = data.pop("sha256", None)  # those of difftap 0.1.0 have none
            if said is not None and said != text_digest(data):
                raise ArtifactError(f"manifest '{path}' was changed (SHA-256 differs)")
            if data["schema"] != SCHEMA:
                raise ArtifactError(f"manifest '{path}' has schema {data['schema']}, this difftap reads {SCHEMA}")
            files = {name: FileRecord(**record) for name, record in data["files"].items()}
            return cls(data["kind"], dict(data["made_from"]), files, dict(data.get("report", {})))
        except FileNotFoundError as error:
            raise ArtifactError(f"no manifest at '{path}'") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"manifest '{path}' cannot be read ({error}); it is damaged") from error

    def check(self, folder: Path, expected: Mapping[str, object], digest: Callable[[Path], str] = file_digest) -> None:
        """Make sure that the artifact is the expected one and that its files are whole.

        Args:
            folder: the folder that file names are relative to.
            expected: the values that ``made_from`` must have, name by name; other names are not compared.
            digest: computes a file's SHA-256; `DigestMemo.digest` does not read unchanged large files again.

        Raises:
            ArtifactError: a condition differs (stale or foreign), or a file is missing, cut short or changed.
        """
        for name, value in expected.items():
            if self.made_from.get(name) != value:
                raise ArtifactError(
                    f"{self.kind} in '{folder}' was made for {name} = {self.made_from.get(name)!r}, not {value!r}"
                )
        for name, record in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ArtifactError(f"'{path}' is missing")
            if path.stat().st_size != record.size:  # the usual damage, and found without reading the file
                raise ArtifactError(f"'{path}' has {path.stat().st_size} bytes, its manifest says {record.size}")
            if digest(path) != record.sha256:
                raise ArtifactError(f"'{path}' is not the file its manifest describes (SHA-256 differs)")
