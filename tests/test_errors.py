"""The exception tree is the one that the module's docstring draws."""

import inspect
import re

import pytest

from difftap import errors
from difftap.errors import DifftapError, MissingExtraError, require


def _drawn() -> dict[str, tuple[str, str | None]]:
    """Class -> (parent, builtin) as drawn."""
    found, stack = {}, []
    for line in errors.__doc__.splitlines():
        match = re.match(r"^( {4})((?:[|` ]   )*)([|`]-- )?(\w+Error)(?: \((\w+)\))?", line)
        if not match:
            continue
        depth = len(match[2]) // 4 + bool(match[3])
        del stack[depth:]
        found[match[4]] = (stack[-1] if stack else "Exception", match[5])
        stack.append(match[4])
    return found


def test_the_tree_is_as_drawn():
    drawn = _drawn()
    classes = {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, DifftapError)
    }
    assert set(drawn) == set(classes)
    for name, (parent, builtin) in drawn.items():
        assert classes[name].__bases__[0].__name__ == parent
        if builtin:
            assert builtin in [base.__name__ for base in classes[name].__bases__]


def test_the_message_survives_whatever_the_builtin_does_with_it():
    for name in errors.__all__:
        kind = getattr(errors, name)
        if inspect.isclass(kind):
            assert str(kind("what, got, allowed, fix")) == "what, got, allowed, fix"


def test_require_gives_the_module_or_the_pip_line():
    assert require("json", "export", "nothing").loads("1") == 1
    with pytest.raises(MissingExtraError) as caught:
        require("no_such_module_at_all", "export", "exporting a checkpoint")
    text = str(caught.value)
    assert text.startswith("exporting a checkpoint needs the package 'no_such_module_at_all'")
    assert text.endswith("pip install 'difftap[export]' (in a checkout: make setup)")
    assert isinstance(caught.value, ImportError)
