"""Killed with -9 at random moments, a run loses and repeats nothing that it reported done."""

import json
import subprocess
import sys

from difftap.features.extract import ExtractSettings, extract_to_store
from difftap.features.store import Encoding, FeatureStore
from difftap.features.store.care import verify
from tests.features.extract.cases import SHARD
from tests.harness import FakePipeline, numbered_pictures

COUNT, KILLS = 300, 36


def test_many_random_kills(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.features.extract.cases", str(tmp_path), str(COUNT), str(KILLS)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] >= KILLS // 2
    progressed = sum(one["in"] > 0 for one in told["seen"])
    assert progressed >= 5  # the kills must have come while there was something to lose
    for one in told["seen"]:
        assert one["lost"] == []
        assert one["moved"] == []
        assert one["repeated"] == 0
        assert one["safe"] <= one["in"]  # what was reported is in; a little more may be
    assert told["keys"] == [item.key for item in numbered_pictures(COUNT)]
    assert list(verify(FeatureStore.open(tmp_path / "s.zarr"))) == []
    extract_to_store(
        FakePipeline(shapes=((4, 3, 3),)),
        numbered_pictures(COUNT),
        tmp_path / "whole.zarr",
        ExtractSettings(Encoding("int8"), shard=SHARD),
    )
    first, second = (FeatureStore.open(tmp_path / name) for name in ("s.zarr", "whole.zarr"))
    assert [(row.key, row.sha256) for row in first.rows] == [(row.key, row.sha256) for row in second.rows]
