"""A run with Ray that stands still is given up, and one that is only slow is not; by a clock that the test moves."""

import queue

import pytest

from difftap.errors import BackendError, ImageError
from difftap.features.extract.cluster import watched

STALL = 5.0


def watch(results=(), counts=lambda now: 0):
    """What is yielded when results are there from the start; at each look one second goes by."""
    now = [0.0]
    waiting = queue.Queue()
    for one in results:
        waiting.put(one)

    def clock():
        return now[0]

    def count():
        now[0] += 1
        return counts(now[0])

    return watched(waiting, count, lambda: "stands still", STALL, clock, 0.001), now


def test_a_run_in_which_nothing_moves_is_given_up():
    given, now = watch()
    with pytest.raises(BackendError, match="stands still"):
        next(given)
    assert now[0] == STALL + 1


def test_finished_images_are_movement_though_no_shard_is_reported():
    given, now = watch(counts=lambda now: int(min(now, 40)) // 4)  # one every four seconds, until the fortieth
    with pytest.raises(BackendError, match="stands still"):
        next(given)
    assert now[0] == 40 + STALL + 1


def test_a_count_that_cannot_be_asked_for_is_no_movement():
    def lost(now):
        raise RuntimeError("the actor is gone")

    given, now = watch(counts=lost)
    with pytest.raises(BackendError, match="stands still"):
        next(given)
    assert now[0] == STALL + 1


def test_reports_are_movement():
    given, now = watch([{"shard": 0}, {"shard": 1}])
    assert next(given) == {"shard": 0}
    now[0] = 100.0
    assert next(given) == {"shard": 1}
    with pytest.raises(BackendError, match="stands still"):
        next(given)
    assert now[0] == 100 + STALL + 1


def test_it_ends_when_all_is_reported():
    given, _ = watch([{"shard": 0}, None])
    assert list(given) == [{"shard": 0}]


@pytest.mark.parametrize(
    ("report", "kind", "words"),
    [
        (
            RuntimeError("no more actors\nat all"),
            BackendError,
            "Ray gave up: no more actors; what was finished is safe",
        ),
        ({"kind": "ImageError", "error": "no picture"}, ImageError, "^no picture$"),
    ],
)
def test_what_a_worker_reports_is_raised(report, kind, words):
    given, _ = watch([report])
    with pytest.raises(kind, match=words):
        next(given)
