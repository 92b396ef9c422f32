"""Pairs to learn from: a data set's own lists, else parts of its images."""

from types import SimpleNamespace

import pytest

from difftap.errors import InputError
from difftap.tuning import training_pairs
from difftap.tuning.training_pairs import load_training_pairs


@pytest.fixture
def dataset(monkeypatch):
    """Puts a data set in the loader's place; gives what was asked of it."""

    def choose(lists):
        asked = []

        def load(name, root, *, split="all", **options):
            asked.append((split, options))
            made = [SimpleNamespace(name=f"{split}-{k}", category=c) for k, c in enumerate(lists[split])]
            return SimpleNamespace(samples=made, generators={split: None})

        monkeypatch.setattr(training_pairs, "loader", lambda name: SimpleNamespace(SPLITS=tuple(lists)))
        monkeypatch.setattr(training_pairs, "load", load)
        monkeypatch.setattr(training_pairs, "_digest", lambda samples: ",".join(one.name for one in samples))
        return asked

    return choose


def names(samples):
    return [one.name for one in samples]


def test_its_own_lists_are_taken(dataset, tmp_path):
    asked = dataset({"trn": ["cat"] * 3 + ["dog"], "val": ["cow", "dog", "cat"], "test": ["cat"]})
    pairs = load_training_pairs("spair", tmp_path, tmp_path / "made", options={"layout": "small"}, allow_missing=True)
    assert [split for split, _ in asked] == ["trn", "val"]
    assert all(o == {"layout": "small", "allow_missing": True, "cache": tmp_path / "made"} for _, o in asked)
    assert names(pairs.train) == ["trn-0", "trn-1", "trn-2", "trn-3"]
    assert names(pairs.val) == ["val-1", "val-2"]  # no training pair is of the first one's class
    assert pairs.classes == ("cat", "dog")
    assert pairs.generators == {"trn": None, "val": None}
    assert pairs.about == {
        "name": "spair", "how": "its own lists trn and val", "layout": "small", "train_pairs": 4, "val_pairs": 2,
        "pairs_sha256": "trn-0,trn-1,trn-2,trn-3,val-1,val-2",
    }  # fmt: skip


def test_limits_take_pairs_at_even_steps(dataset, tmp_path):
    dataset({"trn": ["cat"] * 7, "val": ["cat"] * 5})
    pairs = load_training_pairs("spair", tmp_path, tmp_path, limit=3, val_limit=2)
    assert names(pairs.train) == ["trn-0", "trn-2", "trn-4"]  # of seven: 0, 7/3, 14/3
    assert names(pairs.val) == ["val-0", "val-2"]
    assert names(load_training_pairs("spair", tmp_path, tmp_path, limit=7).train) == [f"trn-{k}" for k in range(7)]


def test_without_validation_pairs_of_the_classes_it_is_refused(dataset, tmp_path):
    dataset({"trn": ["cat"], "val": ["dog"]})
    with pytest.raises(InputError, match="no validation pair of 'spair' is of a class with training pairs"):
        load_training_pairs("spair", tmp_path, tmp_path)
