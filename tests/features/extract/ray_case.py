"""Run by ``python -m tests.features.extract.ray_case``: an extraction with two Ray workers, one of which is killed."""

import functools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from difftap.features.extract import ExtractSettings
from difftap.features.extract.cluster import Cluster, extract_on_cluster
from difftap.pipeline.environment import Runtime
from tests.harness import FakePipeline, numbered_pictures

COUNT = 240


def parents():
    """Every process's parent."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        found[int(path.parent.name)] = int(fields[1])
    return found


def workers():
    """This process's own Ray actors that extract."""
    tree, mine = parents(), []
    for pid in tree:
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"ray::" not in title or b"MapWorker" not in title:
            continue
        above = pid
        while above > 1 and above != os.getpid():
            above = tree.get(above, 0)
        if above == os.getpid():
            mine.append(pid)
    return mine


def main(folder):
    """Extract; kill a worker once something is done."""
    done, killed = [0], []

    def progress(count):
        done[0] += count

    def kill():
        while done[0] < COUNT // 10:
            time.sleep(0.01)
        victim = workers()[0]
        os.kill(victim, signal.SIGKILL)
        killed.append(victim)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    pipeline = FakePipeline()
    run = extract_on_cluster(
        pipeline.recipe, Runtime(), numbered_pictures(COUNT), folder / "s.zarr", ExtractSettings(shard=8, every=0.2),
        Cluster(workers=2, stall=60), opener=functools.partial(FakePipeline, seconds=0.02), progress=progress,
    )  # fmt: skip
    print(json.dumps({"written": run.written, "failed": run.failed, "killed": len(killed), "safe": done[0]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
