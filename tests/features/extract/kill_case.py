"""Run by ``python -m tests.features.extract.kill_case``: extractions in processes that are killed, again and again."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from difftap.features.extract import ExtractSettings, extract_to_store
from difftap.features.store import Encoding, FeatureStore
from tests.harness import FakePipeline, numbered_pictures

ENGINE = 0.0005
SHARD = 4


class Noting(FakePipeline):
    """Notes, in a file, each image whose features are made."""

    def __init__(self, log):
        super().__init__(shapes=((4, 3, 3),), seconds=ENGINE)
        inner, handle = self.stages.tap, os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

        def tap(encoded):
            for features in inner(encoded):
                os.write(handle, f"{features.digest}\n".encode())
                yield features

        self.stages.tap = tap


def child(folder, count):
    """One run; every count of safe records is reported at once."""
    reported = os.open(folder / "reported", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    settings = ExtractSettings(Encoding("int8"), every=0.02, shard=SHARD)
    pipeline = Noting(folder / "made")
    extract_to_store(
        pipeline, numbered_pictures(count), folder / "s.zarr", settings,
        progress=lambda n: os.write(reported, f"{n}\n".encode()),
    )  # fmt: skip
    os._exit(0)


def numbers(path):
    """The whole lines of a file of numbers; a killed process leaves no partial ones, since each is one write."""
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def main(folder, count, kills):
    """Kill, look, go on; prints what was seen."""
    import zarr  # noqa: F401 - so that the children need not

    rng = random.Random(0)
    seen, killed, held = [], 0, {}
    finished = False
    while not finished:
        (folder / "reported").unlink(missing_ok=True)
        (folder / "made").unlink(missing_ok=True)
        running = os.fork()
        if running == 0:
            child(folder, count)
        # Killed while it starts, or some moment after so many records were reported; and at last not at all.
        goal = 0 if rng.random() < 0.2 else rng.randrange(1, 2 * count // kills)
        status = None
        while True:
            pid, status = os.waitpid(running, os.WNOHANG)
            if pid:
                break
            status = None
            if killed < kills and sum(numbers(folder / "reported")[1:]) >= goal:
                time.sleep(rng.random() * (0.02 if goal else 0.1))
                break
            time.sleep(0.0005)
        if status is None:
            os.kill(running, signal.SIGKILL)
            os.waitpid(running, 0)
            killed += 1
        else:
            assert status == 0, status
            finished = True
        # Looked at in a process of its own: zarr's threads would not survive the next fork.
        looking = os.fork()
        if looking == 0:
            look(folder)
        os.waitpid(looking, 0)
        now = json.loads((folder / "looked").read_text())
        safe = sum(numbers(folder / "reported"))
        made = (folder / "made").read_text().split() if (folder / "made").exists() else []
        seen.append(
            {
                "safe": safe,
                "in": len(now),
                "lost": sorted(set(held) - set(now)),
                "moved": sorted(key for key in held if now.get(key) != held[key]),
                "repeated": len({row[1] for row in held.values()} & set(made)),
            }
        )
        held = now
    print(json.dumps({"kills": killed, "seen": seen, "keys": list(held)}))


def look(folder):
    """Write what the store holds into a file."""
    rows = {}
    if (folder / "s.zarr" / "zarr.json").exists():
        rows = {row.key: [row.row, row.digest, dict(row.sha256)] for row in FeatureStore.open(folder / "s.zarr").rows}
    (folder / "looked").write_text(json.dumps(rows))
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
