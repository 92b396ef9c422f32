"""Every ``__all__`` is true, and the public names import."""

import importlib
import pkgutil

import pytest

import difftap

MODULES = sorted(m.name for m in pkgutil.walk_packages(difftap.__path__, "difftap."))


@pytest.mark.parametrize("name", MODULES)
def test_all_is_true(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"an optional package is missing: {error}")
    exported = getattr(module, "__all__", ())
    assert len(set(exported)) == len(exported)
    for member in exported:
        assert hasattr(module, member), f"{name}.__all__ names '{member}', which does not exist"


def test_public_names_import():
    for name in difftap.__all__:
        assert getattr(difftap, name) is not None
    assert set(dir(difftap)) == set(difftap.__all__)


def test_an_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'Matcha'; public names: .*Pipeline"):
        _ = difftap.Matcha
