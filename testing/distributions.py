# SPDX-License-Identifier: Apache-2.0
"""Builds the wheel and the sdist of a release, and checks them: texts, contents, an installation."""

import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from testing.fresh_python import checked, fresh_python, pip_install

# What somebody needs to test, build and read the release without the repository.
IN_SDIST = (
    "tests/conftest.py", "tests/ops", "testing/oracle", "op_schemas/permute.yaml", "docs/conf.py",
    "docs/start.md", "benchmarks/results", "demo", "examples", "Makefile", "setup.py",
    "pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
)  # fmt: skip

# The installed package's Python runs this outside of the tree.
OPCHECK = """
import torch, moe_ops
rows = torch.arange(6.0).view(3, 2).requires_grad_()
slots = torch.tensor([5, 0, 2, 4, 1, 3])
output = moe_ops.permute(rows, slots, 2)
assert output.tolist() == [[2.0 * (s // 2), 2.0 * (s // 2) + 1] for s in slots.tolist()]
torch.library.opcheck(torch.ops.moe.permute.default, (rows, slots, 2))
print(moe_ops.__version__, moe_ops.__file__)
"""


def build(root: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from the sdist; return the wheel and the sdist."""
    dist = root / "dist"
    for old in dist.glob("*"):
        old.unlink()
    checked(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, root, cwd=root)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    return wheel, sdist


def problems(wheel: Path, sdist: Path, version: str) -> list[str]:
    """Return what is wrong with the two files, one line each."""
    found = []
    if not wheel.name.endswith("-py3-none-any.whl"):
        found.append(f"{wheel.name}: expected a pure Python wheel")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"torch_moe_ops-{version}.dist-info/"
    strangers = [name for name in names if not name.startswith(("moe_ops/", info))]
    found += [f"{wheel.name}: holds {name}" for name in strangers]
    for name in ("moe_ops/__init__.py", f"moe_ops/op_schemas/released/{version}.yaml"):
        if name not in names:
            found.append(f"{wheel.name}: lacks {name}")
    with tarfile.open(sdist) as archive:
        members = [name.partition("/")[2] for name in archive.getnames()]
    for part in (*IN_SDIST, f"op_schemas/released/{version}.yaml"):
        if not any(member == part or member.startswith(f"{part}/") for member in members):
            found.append(f"{sdist.name}: lacks {part}")
    return found


def check_texts(wheel: Path, sdist: Path) -> None:
    """Let twine check that an index can render the description."""
    checked(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=wheel.parent)


def check_installation(wheel: Path, version: str) -> None:
    """Install the wheel into a new environment and run opcheck on an op there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        python = fresh_python(folder)
        pip_install(python, wheel, cwd=folder)
        said = checked(python, "-I", "-c", OPCHECK, cwd=folder).splitlines()[-1]
    if not said.startswith(f"{version} {folder}"):
        raise RuntimeError(f"expected moe_ops {version} of {folder}, got {said}")
