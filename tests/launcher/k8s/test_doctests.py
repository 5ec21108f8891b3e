"""The examples in the docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import launcher.k8s

MODULES = [module.name for module in pkgutil.iter_modules(launcher.k8s.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_doctests_say_the_truth(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"launcher.k8s.{name}")).failed == 0


def test_there_are_some() -> None:
    """A module list that came out empty would pass as well."""
    assert len(MODULES) > 20
