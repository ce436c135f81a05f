# SPDX-License-Identifier: Apache-2.0
"""What acts at the end of another module's import acts once for each import."""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest

from moe_ops._core.after_import import after_import


@pytest.fixture
def name(tmp_path, monkeypatch):
    """Return the name of a module that can be imported, and undo what the test changed."""
    (tmp_path / "module_to_import.py").write_text("number = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    yield "module_to_import"
    sys.modules.pop("module_to_import", None)


def test_once_for_each_import_and_reload(name):
    seen: list[ModuleType] = []
    # A list's own method is another object each time.
    action = seen.append
    for _ in range(2):
        after_import(name, action)
    module = importlib.import_module(name)
    assert seen == [module]
    for turn in range(2, 5):
        importlib.reload(module)
        assert seen == [module] * turn


def test_two_actions_on_one_module(name):
    seen = []
    after_import(name, lambda module: seen.append(("first", module.number)))
    after_import(name, lambda module: seen.append(("second", module.number)))
    importlib.import_module(name)
    assert sorted(seen) == [("first", 1), ("second", 1)]


def test_being_looked_up_is_not_being_imported(name):
    seen: list[ModuleType] = []
    after_import(name, seen.append)
    assert importlib.util.find_spec(name) is not None
    assert not seen
