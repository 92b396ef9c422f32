"""Groups of options, rules between options, and what was renamed."""

import importlib
import inspect

import click
import pytest
from click.testing import CliRunner

import difftap
from difftap.cli import cli
from difftap.commands.lazy import RENAMED, LazyGroup
from difftap.commands.options import Command, Option
from difftap.errors import InputError


def commands(command=cli, path=()):
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            yield from commands(command.get_command(click.Context(command), name), (*path, name))
    else:
        yield pytest.param(command, id=" ".join(path))


@pytest.mark.parametrize("command", list(commands()))
def test_groups_fit_the_classes_they_make(command):
    """Options name fields of the class, and their defaults are the fields'."""
    options = {one.name: one for one in command.params}
    callback = command.callback
    while hasattr(callback, "gives"):
        _, make, names = callback.gives
        if isinstance(make, str):
            module, name = make.split(":")
            fields = inspect.signature(getattr(importlib.import_module(module), name)).parameters
            assert set(names) <= set(fields)
            for one in names:
                if one in options and options[one].default is not None and not options[one].multiple:
                    assert options[one].to_info_dict()["default"] in (fields[one].default, None), one
        callback = callback.__wrapped__


@pytest.mark.parametrize("command", list(commands()))
def test_a_rule_names_options_and_is_checked(command):
    ruled = [one for one in command.params if isinstance(one, Option) and one.rules]
    assert not ruled or isinstance(command, Command)
    names = {one.name for one in command.params}
    for rule in getattr(command, "rules", ()):
        assert set(rule.of) & names


def test_a_renamed_command_answers_with_what_takes_its_place(monkeypatch):
    monkeypatch.setitem(RENAMED, "old", "'old' is 'new'")
    with pytest.raises(InputError, match="'old' is 'new'"):
        CliRunner().invoke(LazyGroup("x"), ["old"], catch_exceptions=False)
    monkeypatch.setitem(RENAMED, "match --old", "--old is --new")
    with pytest.raises(InputError, match="--old is --new"):
        CliRunner().invoke(cli, ["match", "--old=3"], prog_name="difftap", catch_exceptions=False)


@pytest.mark.parametrize("name", sorted(difftap._RENAMED))
def test_a_renamed_module_answers_with_its_new_name(name):
    with pytest.raises(ImportError, match="was renamed: import difftap"):
        importlib.import_module(name)
    parent, _, last = name.rpartition(".")
    if parent != "difftap":
        with pytest.raises(ImportError, match="was renamed"):
            exec(f"from {parent} import {last}")
    importlib.import_module(difftap._RENAMED[name].split()[0])


@pytest.mark.parametrize("command", list(commands()))
def test_every_option_reaches_the_command_or_an_object_that_it_takes(command):
    """What no group and no parameter takes would be offered, accepted and dropped."""
    callback, taken = command.callback, set()
    while hasattr(callback, "gives"):
        taken |= set(callback.gives[2])
        callback = callback.__wrapped__
    taken |= set(inspect.signature(inspect.unwrap(callback)).parameters)
    assert {one.name for one in command.params} <= taken
