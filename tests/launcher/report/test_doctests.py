"""The examples in the docstrings of the report and of what shows progress."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import launcher.report

MODULES = [f"launcher.report.{module.name}" for module in pkgutil.iter_modules(launcher.report.__path__)]


@pytest.mark.parametrize("name", [*MODULES, "launcher.bottomline", "launcher.gang.tally", "launcher.spec"])
def test_doctests_say_the_truth(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_some() -> None:
    """A module list that came out empty would pass as well."""
    assert len(MODULES) > 10
