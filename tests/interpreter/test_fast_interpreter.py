# SPDX-License-Identifier: Apache-2.0
"""The quick steps give what the steps of Triton's own interpreter give."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from testing.interpreted import pytestmark  # noqa: F401

tl = pytest.importorskip("triton.language")
fast_interpreter = pytest.importorskip("testing.fast_interpreter")
interpreter = pytest.importorskip("triton.runtime.interpreter")

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (
    "int1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "float8e4nv", "float8e5",
)  # fmt: skip


def test_they_are_installed():
    assert set(fast_interpreter.ORIGINAL) == {"generic_reduce", "_get_np_dtype", "_patch_builtin"}
    assert interpreter.ReduceOps.generic_reduce is fast_interpreter.generic_reduce


@pytest.mark.parametrize("keep_dims", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2, None])
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
def test_xor(dtype, axis, keep_dims):
    np_dtype = np.dtype(dtype)
    low, high = np.iinfo(np_dtype).min, np.iinfo(np_dtype).max
    values = np.random.default_rng(0).integers(low, high, (2, 4, 8), np_dtype, endpoint=True)
    element = getattr(tl, dtype)
    handle = interpreter.TensorHandle(values, element)
    x = tl.core.tensor(handle, tl.block_type(element, [2, 4, 8]))
    scope = interpreter._patch_lang(tl.standard._xor_combine.fn)
    try:
        ops = interpreter.ReduceOps(axis, tl.standard._xor_combine, keep_dims)
        (quick,), (slow,) = (
            reduce(ops, (x,))
            for reduce in (
                fast_interpreter.generic_reduce,
                fast_interpreter.ORIGINAL["generic_reduce"],
            )
        )
    finally:
        scope.restore()
    assert quick.handle.data.dtype == slow.handle.data.dtype
    assert quick.type == slow.type
    assert np.array_equal(quick.handle.data, slow.handle.data)


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(name):
    slow = fast_interpreter.ORIGINAL["_get_np_dtype"]
    element = getattr(tl, name)
    for dtype in (element, tl.block_type(element, [2]), tl.pointer_type(element)):
        for _ in range(2):
            assert fast_interpreter.get_np_dtype(dtype) == slow(dtype)
    pointers = tl.block_type(tl.pointer_type(element), [2])
    assert fast_interpreter.get_np_dtype(pointers) == slow(pointers)


def test_builtins():
    """In a fresh process the same builtins are replaced, also after two calls."""
    script = """
import triton.language as tl
from triton.runtime import interpreter
from testing import fast_interpreter

class Scope(list):
    def set_attr(self, owner, name, value):
        self.append((owner, name))

packages = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
for package in packages:
    scopes = [Scope() for _ in range(3)]
    interpreter._patch_builtin(package, None, scopes[0])
    fast_interpreter.patch_builtin(package, None, scopes[1])
    fast_interpreter.patch_builtin(package, None, scopes[2])
    assert scopes[0] and scopes[0] == scopes[1] == scopes[2], package
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "done\n"
