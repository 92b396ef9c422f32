"""With Ray, two workers fill one store; one that is killed is replaced, and nothing is missing or there twice."""

import json
import subprocess
import sys

import pytest

from difftap.features.extract import ExtractSettings, extract_to_store
from difftap.features.store import FeatureStore
from difftap.features.store.care import verify
from tests.features.extract.ray_case import COUNT
from tests.harness import FakePipeline, numbered_pictures


@pytest.mark.slow  # Ray takes some 20 s to start, be killed and recover
def test_a_worker_killed_during_the_run(tmp_path):
    pytest.importorskip("ray")
    done = subprocess.run(
        [sys.executable, "-m", "tests.features.extract.ray_case", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"written": COUNT, "failed": 0, "killed": 1, "safe": COUNT}
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert sorted(store.keys()) == [item.key for item in numbered_pictures(COUNT)]
    assert list(verify(store)) == []
    extract_to_store(FakePipeline(), numbered_pictures(COUNT), tmp_path / "whole.zarr", ExtractSettings(shard=8))
    whole = FeatureStore.open(tmp_path / "whole.zarr")
    assert {row.key: row.sha256 for row in store.rows} == {row.key: row.sha256 for row in whole.rows}
