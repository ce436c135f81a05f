# SPDX-License-Identifier: Apache-2.0
"""The ops are registered on CUDA as they should be, with whatever torch runs here."""

import json
import os
import subprocess
import sys

import pytest
import torch

from moe_ops._core.library import ENVIRONMENT_VARIABLE, OPS, SCHEMAS
from testing.on_device import ALL, move_sample
from testing.strategies import seeded_sample

pytestmark = pytest.mark.gpu


def fresh_python(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", ALL)
def test_triton_serves_cuda_by_default(name):
    assert ENVIRONMENT_VARIABLE not in os.environ
    choice = OPS[name].choose("cuda")
    assert (choice.name, choice.reason) == ("triton", "the default")
    for key in ("CUDA", "Autograd", "Meta", "CPU"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"moe::{name}", key)


def test_import_leaves_cuda_and_triton_alone():
    script = """
import json, sys, torch
before = set(sys.modules)
import moe_ops
added = [name for name in set(sys.modules) - before if name.startswith("triton")]
print(json.dumps([added, torch.cuda.is_initialized()]))
"""
    assert json.loads(fresh_python(script)) == [[], False]


@pytest.mark.parametrize("first", ["import moe_ops", "torch.zeros(1, device='cuda')"])
def test_ops_work_in_a_fresh_process(first):
    """The import may come first, or the context of CUDA."""
    script = f"""
import json, torch
{first}
import moe_ops
rows = torch.tensor([[0.0, 1.0], [2.0, 3.0]], device="cuda", requires_grad=True)
gather = torch.tensor([3, 0, 2, 1], device="cuda")
out = torch.ops.moe.permute(rows, gather, 2)
tangent = torch.tensor([[1.0], [2.0], [4.0], [8.0]], device="cuda").expand(4, 2)
(grad,) = torch.autograd.grad(out, rows, tangent)
print(json.dumps([out.tolist(), grad.tolist()]))
"""
    out, grad = json.loads(fresh_python(script))
    assert out == [[2.0, 3.0], [0.0, 1.0], [2.0, 3.0], [0.0, 1.0]]
    assert grad == [[10.0, 10.0], [5.0, 5.0]]


COMPILED = """
import json, threading, torch, triton, moe_ops

compilers, own = [], triton.compiler.compile

def noted(*args, **kwargs):
    compilers.append(threading.current_thread() is threading.main_thread())
    return own(*args, **kwargs)

triton.compiler.compile = noted
x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
up, down = (
    torch.randn(4, n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for n, d in ((128, 128), (128, 64))
)
ids = torch.arange(128, device="cuda").view(64, 2) % 4
weights = torch.rand(64, 2, device="cuda", requires_grad=True)
output = moe_ops.fused_experts(x, up, down, ids, weights)
torch.cuda.synchronize()
forward = len(compilers)
output.backward(torch.randn_like(output))
print(json.dumps([any(compilers), forward, len(compilers)]))
"""


def test_a_first_forward_compiles_its_backward_in_threads(tmp_path):
    told = fresh_python(COMPILED, TRITON_CACHE_DIR=str(tmp_path), MOE_OPS_AUTOTUNE="0")
    in_main_thread, forward, both = json.loads(told)
    assert not in_main_thread
    assert both == forward > 8


def test_env_says_that_triton_serves_cuda():
    script = "import sys; from moe_ops.cli import main; sys.exit(main(['env']))"
    lines = fresh_python(script).splitlines()
    for name in ALL:
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert "triton (the default)" in line
    assert any(line.startswith("torch ") and torch.__version__ in line for line in lines)


@pytest.mark.parametrize("name", ALL)
def test_fake_tensors_say_what_the_kernels_give(name):
    """Shapes, strides, dtypes and devices of every output are the same."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for seed in range(10):
        sample = move_sample(seeded_sample(SCHEMAS[name], seed, T=5, dtype=torch.bfloat16))
        real = sample()
        mode = FakeTensorMode()
        with mode:
            arguments = {
                argument: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                for argument, value in sample.arguments.items()
            }
            fake = sample(**arguments)
        real, fake = (o if isinstance(o, tuple) else (o,) for o in (real, fake))
        for one, two in zip(real, fake, strict=True):
            assert (one.shape, one.stride(), one.dtype, one.device) == (
                two.shape, two.stride(), two.dtype, two.device,
            ), sample  # fmt: skip
