# SPDX-License-Identifier: Apache-2.0
"""The index in testing/__init__.py names what is in the folder."""

import pkgutil
import re

import testing


def test_the_index_names_every_module():
    """A new module gets a line there, and a module that goes takes its line along."""
    assert testing.__doc__ is not None
    listed = re.findall(r"^    (\w+) +\S", testing.__doc__, re.MULTILINE)
    assert sorted(listed) == sorted(m.name for m in pkgutil.iter_modules(testing.__path__))
