"""Backends by name."""

import pytest

from difftap.engine.registry import BACKENDS, get_backend
from difftap.errors import InputError


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_has_its_own_name(name):
    assert get_backend(name).name == name


@pytest.mark.parametrize(("name", "words"), [("torch-compile", "dift-tuned"), ("cuda", "allowed: ")])
def test_other_names_are_refused_with_what_there_is(name, words):
    with pytest.raises(InputError, match=words) as refused:
        get_backend(name)
    assert all(known in str(refused.value) for known in BACKENDS)
