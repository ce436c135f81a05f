# SPDX-License-Identifier: Apache-2.0
"""Build script: maps op_schemas/ into the package and refuses to build a malformed schema.

Metadata is in pyproject.toml. Nothing here imports torch or moe_ops: a build needs setuptools and
PyYAML only.
"""

import ast
import contextlib
import importlib.util
import os
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
SCHEMA_DIR = ROOT / "op_schemas"
SCHEMA_READER = ROOT / "src" / "moe_ops" / "_core" / "schema" / "__init__.py"


def read_version() -> str:
    """The literal assigned to __version__ in src/moe_ops/_version.py, read without importing it."""
    path = ROOT / "src" / "moe_ops" / "_version.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise SystemExit(f"moe_ops: no __version__ = ... in {path}")


def validate_schemas() -> None:
    """Read every YAML file with the package's own reader; the first error ends the build.

    The reader is a package whose imports are relative, so it can be loaded alone, by its path.
    """
    name = "_moe_ops_build_schema"
    spec = importlib.util.spec_from_file_location(name, SCHEMA_READER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its own imports and dataclasses look for it
    spec.loader.exec_module(module)
    try:
        module.load_all(SCHEMA_DIR)
    except module.SchemaError as error:
        raise SystemExit(f"moe_ops: malformed op schema: {error}") from None


class EditableWheel(editable_wheel):  # type: ignore[misc]
    """Install an editable package by a path to src, in which a link leads to the schemas.

    For a package that is mapped from elsewhere setuptools installs a finder, and Python asks it after
    it has searched sys.path. There a clone that is called moe_ops would be found first, by a script
    in its parent folder, as a package without an __init__.py. Where no link can be made, the finder
    stays.
    """

    def finalize_options(self) -> None:
        """Make the link, and let src alone hold the packages."""
        link = ROOT / "src" / "moe_ops" / "op_schemas"
        if not link.exists():
            with contextlib.suppress(OSError):
                link.symlink_to(os.path.relpath(SCHEMA_DIR, link.parent), target_is_directory=True)
        if link.exists():
            self.distribution.package_dir = {"": "src"}
        super().finalize_options()


validate_schemas()

setup(
    version=read_version(),
    cmdclass={"editable_wheel": EditableWheel},
    packages=sorted({*find_packages("src"), "moe_ops.op_schemas"}),
    package_dir={"": "src", "moe_ops.op_schemas": "op_schemas"},
    package_data={
        "moe_ops": ["py.typed"],
        "moe_ops.configs": ["tables/*.json"],
        "moe_ops.op_schemas": ["*.yaml", "released/*.yaml"],
    },
)
