"""Parts of a data set share no image and hold every class."""

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difftap.datasets.parts import PARTS, part_of_images, take_part
from difftap.errors import InputError
from tests.bench.pck_cases import samples


@given(st.dictionaries(st.sampled_from("abc"), st.integers(1, 30), min_size=1))
def test_every_image_has_one_part_whatever_the_order(counts):
    images = [(category, str(k)) for category, count in counts.items() for k in range(count)]
    parts = part_of_images(images)
    assert parts == part_of_images(images[::-1])
    assert set(parts) == set(images)
    for category, count in counts.items():
        held = Counter(part for (owner, _), part in parts.items() if owner == category)
        assert count < 3 or set(held) == set(PARTS)
        assert held["train"] >= 1


def test_parts_share_no_image(tmp_path):
    (one,) = samples(tmp_path, 1)
    places = [tmp_path / "cat" / f"{k}.png" for k in range(10)]
    made = [
        dataclasses.replace(one, name=f"{a.stem}-{b.stem}", source=a, target=b)
        for a in places
        for b in places
        if a != b
    ]
    found, count = {}, {}
    for part in PARTS:
        chosen = take_part(made, part, tmp_path)
        count[part] = len(chosen)
        found[part] = {path for sample in chosen for path in (sample.source, sample.target)}
    assert count == {"train": 4 * 3, "val": 3 * 2, "test": 3 * 2}
    assert not (found["train"] & found["val"] or found["train"] & found["test"] or found["val"] & found["test"])
    with pytest.raises(InputError, match="part is 'all'"):
        take_part(made, "all", tmp_path)
    with pytest.raises(InputError, match="part 'test' holds no pair of the 1"):
        take_part(made[:1], "test", tmp_path)


def test_a_made_target_goes_with_its_source(tmp_path):
    made = [
        dataclasses.replace(sample, target=tmp_path / "made" / f"{k}.png", category="cat")
        for k, sample in enumerate(samples(tmp_path, 6))
    ]
    taken = [sample.name for part in PARTS for sample in take_part(made, part, tmp_path, tmp_path / "made")]
    assert sorted(taken) == sorted(sample.name for sample in made)


def test_small_classes_by_hand():
    """Shares of 4, 3 and 3 of ten, and where a class is too small for them one image each, training first."""
    wanted = {1: (1, 0, 0), 2: (1, 1, 0), 3: (1, 1, 1), 4: (2, 1, 1), 5: (2, 2, 1), 10: (4, 3, 3)}
    for count, sizes in wanted.items():
        held = Counter(part_of_images([("cat", str(k)) for k in range(count)]).values())
        assert tuple(held[part] for part in PARTS) == sizes, count
    # Nearly everything to train on: still one each for the other two.
    held = Counter(part_of_images([("cat", str(k)) for k in range(6)], (0.98, 0.01)).values())
    assert tuple(held[part] for part in PARTS) == (4, 1, 1)
