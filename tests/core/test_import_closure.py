# SPDX-License-Identifier: Apache-2.0
"""The closure of imports misses no way to load a module. The trees here are small."""

import pytest

from testing.import_closure import closure, module_name, source_file


def write(root, files):
    """Write modules of the package `package`."""
    for name, source in files.items():
        file = root / "src" / "package" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)


def loaded(root, *start):
    return sorted(name.removeprefix("package.") for name in closure(root, start))


@pytest.mark.parametrize(
    "code",
    [
        "import package.b.c",
        "import os, package.b.c as c",
        "from package.b import c",
        "from package.b.c import something",
        "from .b import c",
        "from . import b\nfrom .b.c import something",
        "def f():\n    from package.b import c",
        "class A:\n    async def f(self):\n        if self:\n            import package.b.c",
        "try:\n    import nothing\nexcept ImportError:\n    import package.b.c",
        "import importlib\nm = importlib.import_module('package.b.c')",
        "op.implement('triton', 'package.b.c:function')",
        "run([python, '-m', 'package.b.c'])",
        "script = '''\nimport sys; from package.b import c\nc.main({setting})\n'''",
        "script = f'''\nfrom package.b.c import (\n    x,\n)\n{setting!r}\n'''",
    ],
)
def test_every_way_to_load_a_module_is_followed(tmp_path, code):
    write(tmp_path, {"__init__": "", "a": code, "b/__init__": "", "b/c": "", "unused": ""})
    found = closure(tmp_path, ["package.a"])
    names = {"package", "package.a", "package.b", "package.b.c"}
    assert set(found) == names
    assert {module_name(tmp_path, file) for file in found.values()} == names


def test_packages_above_and_what_they_import_are_loaded(tmp_path):
    files = {"__init__": "from package import base", "base": "", "x": "", "b/c": "", "unused": ""}
    write(tmp_path, {**files, "b/__init__": "import package.x"})
    assert loaded(tmp_path, "package.b.c") == ["b", "b.c", "base", "package", "x"]


def test_circles_and_chains_end(tmp_path):
    write(tmp_path, {"a": "import package.b", "b": "import package.c", "c": "import package.a"})
    assert loaded(tmp_path, "package.a") == ["a", "b", "c"]


@pytest.mark.parametrize(
    "code",
    [
        "# import package.b",
        '"""\nimport package.b\n"""',
        "def f():\n    '''\n    import package.b\n    '''",
        "from package import b_",
        "text = 'package.b: is not imported'",
    ],
)
def test_what_loads_nothing_is_not_followed(tmp_path, code):
    write(tmp_path, {"__init__": "", "a": code, "b": ""})
    assert loaded(tmp_path, "package.a") == ["a", "package"]


def test_relative_imports_of_a_package_and_above_it(tmp_path):
    above = "from . import x\nfrom .. import b"
    write(tmp_path, {"__init__": "", "a/__init__": above, "a/x": "", "b": ""})
    assert loaded(tmp_path, "package.a") == ["a", "a.x", "b", "package"]


def test_folders_without_an_init_and_moved_packages(tmp_path):
    for file in ("testing/x.py", "op_schemas/__init__.py"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("import moe_ops.op_schemas")
    assert set(closure(tmp_path, ["testing.x"])) == {"testing.x", "moe_ops.op_schemas"}
    assert source_file(tmp_path, "op_schemas.nothing") is None
