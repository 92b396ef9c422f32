"""What a training is told: each wrong value is refused, and the nearest right one is not."""

import pytest

from difftap.errors import InputError
from difftap.tuning.settings import TuneSettings


@pytest.mark.parametrize(
    ("wrong", "words", "right"),
    [
        ({"kind": "pair"}, "kind is 'pair'; allowed: single", {}),
        ({"initial": "full"}, "initial is 'full'; allowed: published, empty, random", {"initial": "random"}),
        ({"loss": "ours"}, "loss is 'ours'; allowed: published, normalised", {"loss": "normalised"}),
        ({"draws": "once"}, "draws is 'once'; allowed: fresh, fixed", {"draws": "fixed"}),
        ({"reading": "edges"}, "reading is 'edges'", {"reading": "corners"}),
        ({"epochs": 0}, "epochs is 0; allowed: 1 or more", {"epochs": 1}),
        ({"batch": 0}, "batch is 0; allowed: 1 or more", {"batch": 1}),
        ({"tokens": -1}, "tokens is -1; allowed: 0 or more", {"tokens": 0}),
        ({"steps": -1}, "steps is -1; allowed: 0 or more", {"steps": 0}),
        ({"rate": 0.0}, r"rate is 0\.0; allowed: a number above 0", {"rate": 1e-9}),
        ({"linear_rate": float("nan")}, "linear_rate is nan", {"linear_rate": 1e-9}),
        ({"shared": 2}, "shared is 2; allowed: with kind cpm alone", {"shared": 2, "kind": "cpm"}),
        (
            {"kind": "cpm", "shared": 6, "tokens": 6},
            "shared is 6 of 6 tokens; allowed: fewer",
            {"kind": "cpm", "shared": 5, "tokens": 6},
        ),
    ],
)
def test_wrong_values_are_refused(wrong, words, right):
    with pytest.raises(InputError, match=words):
        TuneSettings(**{"kind": "single", **wrong})
    TuneSettings(**{"kind": "single", **right})
