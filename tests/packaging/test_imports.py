# SPDX-License-Identifier: Apache-2.0
"""Importing moe_ops is quick and loads little. Few modules register ops and loggers."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "moe_ops"

# Reading and compiling the schemas of all ops should take little beside importing torch. It took
# 0.2 of that where it was measured. The slack is for loaded machines.
IMPORT_TIME_BUDGET = 0.3

LAZY = ("triton", "transformers", "torch.utils.flop_counter", "torch._inductor")


def fresh_python(script: str) -> str:
    # Users' Pythons keep the bytecode of what they imported once.
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**kept, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_stays_lazy() -> None:
    script = """
import json, sys, torch
before = set(sys.modules)
import moe_ops
print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
"""
    added, cuda_initialized = json.loads(fresh_python(script))
    assert "moe_ops._core.library" in added
    assert not [name for name in added if name.startswith(LAZY)]
    assert not cuda_initialized


@pytest.mark.parametrize("missing", ["triton", "transformers"])
def test_ops_work_without(missing: str) -> None:
    script = f"""
import sys
sys.modules[{missing!r}] = None  # an import of it raises ModuleNotFoundError
import json, torch, moe_ops
rows = torch.tensor([[0.0, 1.0], [2.0, 3.0]], requires_grad=True)
out = torch.ops.moe.permute(rows, torch.tensor([3, 0, 2, 1]), 2)
(grad,) = torch.autograd.grad(out, rows, torch.tensor([[1.0], [2.0], [4.0], [8.0]]).expand(4, 2))
print(json.dumps([out.tolist(), grad.tolist()]))
"""
    out, grad = json.loads(fresh_python(script))
    assert out == [[2.0, 3.0], [0.0, 1.0], [2.0, 3.0], [0.0, 1.0]]
    assert grad == [[10.0, 10.0], [5.0, 5.0]]


@pytest.mark.slow
def test_import_time() -> None:
    script = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import moe_ops
print(middle - start, time.perf_counter() - middle)
"""
    # The least of several runs counts, because another process can only make an import slower.
    runs = [tuple(map(float, fresh_python(script).split())) for _ in range(3)]
    torch_seconds, moe_ops_seconds = (min(seconds) for seconds in zip(*runs, strict=True))
    print(f"import torch {torch_seconds:.2f} s, then import moe_ops {moe_ops_seconds:.3f} s")
    assert moe_ops_seconds < IMPORT_TIME_BUDGET * torch_seconds


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """Yield (file, call, name of what is called) of each call in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                yield str(path.relative_to(PACKAGE)), node, name


def test_only_the_library_module_defines_ops() -> None:
    makers = {"Library", "custom_op", "define", "triton_op"}
    found = [(file, name) for file, _, name in calls() if name in makers]
    assert sorted(found) == [("_core/library.py", "Library"), ("_core/library.py", "define")]


def test_one_logger() -> None:
    loggers = {
        (file, ast.unparse(argument))
        for file, call, name in calls()
        if name == "getLogger"
        for argument in call.args or [ast.Constant(None)]
    }
    assert loggers
    assert {name for _, name in loggers} == {"'moe_ops'"}


# Files of the first folder may not import the second. What tests share is in testing/.
MAY_NOT_IMPORT = [
    ("tests", "tests"),
    ("benchmarks", "tests"),
    ("testing", "tests"),
    ("testing", "benchmarks"),
    ("src", "tests"),
    ("src", "testing"),
    ("src", "benchmarks"),
]


def imported_packages(source: str) -> set[str]:
    """Return the top-level names that a file imports, also in functions and scripts in strings."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"^\s*(?:from|import) (\w+)", node.value, re.MULTILINE))
            # import_module, importorskip and monkeypatch take such strings.
            found |= set(re.findall(r"\A(\w+)(?:\.\w+)+\Z", node.value))
    return found


@pytest.mark.parametrize(("folder", "package"), MAY_NOT_IMPORT)
def test_who_imports_whom(folder: str, package: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    guilty = [
        str(file.relative_to(ROOT))
        for file in files
        if package in imported_packages(file.read_text(encoding="utf-8"))
    ]
    assert not guilty, f"files that import {package}"


@pytest.mark.parametrize(
    "source",
    [
        "import {0}.ops",
        "import os, {0}",
        "from {0} import conftest",
        "def f():\n    from {0}.ops.a import b",
        "run('import {0}.ops')",
        "run('''\nimport os\nfrom {0}.ops import b\n''')",
        "pytest.importorskip('{0}.ops.a')",
    ],
)
def test_every_kind_of_import_is_seen(source: str) -> None:
    assert "somewhere" in imported_packages(source.format("somewhere"))
    assert "somewhere" not in imported_packages(source.format("elsewhere"))
