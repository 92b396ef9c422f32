"""Every command that can be resumed, killed with -9 at random moments through the command line: the result is the same.

What is compared is what an unbroken run leaves, byte for byte where files hold no times; nothing else may lie around.
Learning prompts takes too long for this; tests/tuning kills a training of its own.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from difftap.features.store import FeatureStore
from tests.datasets.builders import write_voc
from tests.harness import DIFFTAP, child_environment, write_picture

pytestmark = pytest.mark.heavy
KILLS = 3


def matches(folder: Path) -> list[str]:
    for k in range(8):
        write_picture(folder / f"{k}.png", (40 + k, 30), seed=k)
    rows = [f"{a}.png,{b}.png" for a in range(8) for b in range(8)]
    (folder / "pairs.csv").write_text("source,target\n" + "\n".join(rows) + "\n")
    return ["match", "--pairs", "pairs.csv", "--grid", "2", "-o", "OUT"]


def predictions(folder: Path) -> list[str]:
    for k in range(6):
        write_picture(folder / "photos" / f"{k}.png", (60, 50), seed=k)
    return ["bench", "pck", "synthetic", "photos", "-o", "OUT"]


def store(folder: Path) -> list[str]:
    for k in range(60):
        write_picture(folder / "photos" / f"{k:03d}.png", (40, 30), seed=k)
    return ["extract", "photos", "--commit-every", "0.2", "-o", "OUT"]


def prototypes(folder: Path) -> list[str]:
    pytest.importorskip("pyarrow")
    write_voc(folder / "VOC2012", {f"{k:03d}": ({"_1": (0, 0, 20, 15)}, {1: 8}) for k in range(96)})
    return ["prototypes", "build", "voc", "VOC2012", "-o", "OUT"]


def written(output: Path) -> dict[str, object]:
    """What a run left, by name; a store by its images and their hashes, since its journal may be cut otherwise."""
    if (output / "zarr.json").exists():
        return {row.key: row.sha256 for row in FeatureStore.open(output).rows}
    files = [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]
    kept = {"", ".jsonl", ".safetensors", ".parquet"}
    return {str(path.relative_to(output)): path.read_bytes() for path in files if path.suffix in kept}


def growth(output: Path) -> int:
    """How much has been written so far, in scratch folders beside the output too."""
    return sum(
        path.stat().st_size
        for place in output.parent.glob(f"*{output.name}*")
        for path in (place.rglob("*") if place.is_dir() else [place])
        if path.is_file()
    )


@pytest.mark.parametrize("prepare", [matches, predictions, store, prototypes])
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(tmp_path, prepare: Callable[[Path], list[str]]):
    asked = [*prepare(tmp_path), "--size", "128", "--threads", "1"]
    environment = child_environment(OMP_NUM_THREADS="1")

    def start() -> subprocess.Popen:
        words = [one.replace("OUT", "out/result") for one in asked]
        with open(tmp_path / "log.txt", "w") as log:
            return subprocess.Popen([*DIFFTAP, *words], cwd=tmp_path, env=environment, stdout=log, stderr=log)

    output = tmp_path / "out" / "result"
    output.parent.mkdir()
    whole = start()
    assert whole.wait(timeout=240) == 0, (tmp_path / "log.txt").read_text()
    total = growth(output)
    output.parent.rename(tmp_path / "whole")  # the same place for both: some outputs name files below it
    output.parent.mkdir()
    chance, kills = random.Random(0), 0
    for _ in range(KILLS):
        running = start()
        goal = growth(output) + chance.randrange(1, max(2, total // (KILLS + 1)))
        deadline = time.monotonic() + 120
        while running.poll() is None and growth_or_none(output) < goal and time.monotonic() < deadline:
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        running.wait()
        kills += running.returncode == -signal.SIGKILL
    assert kills >= 2  # else there was nothing to resume
    last = start()
    assert last.wait(timeout=240) == 0, (tmp_path / "log.txt").read_text()
    assert written(output) == written(tmp_path / "whole" / "result")
    assert sorted(path.name for path in output.parent.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def growth_or_none(output: Path) -> int:
    """As `growth`; 0 while a file vanishes under the look."""
    try:
        return growth(output)
    except OSError:
        return 0
