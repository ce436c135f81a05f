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


EXPERTS = """
import json, threading, torch, triton, moe_ops

def experts(device, **options):
    leaf = dict(device=device, dtype=torch.bfloat16, requires_grad=True)
    x = torch.randn(64, 128, **leaf)
    up, down = (torch.randn(4, n, d, **leaf) for n, d in ((128, 128), (128, 64)))
    ids = torch.arange(128, device=device).view(64, 2) % 4
    weights = torch.rand(64, 2, device=device, requires_grad=True)
    return moe_ops.fused_experts(x, up, down, ids, weights, **options)
"""
COMPILED = """
compiled, loaded, own = [], [], triton.compiler.compile

def thread():
    return "main" if threading.current_thread() is threading.main_thread() else "another"

def noted(*args, **kwargs):
    compiled.append(thread())
    return own(*args, **kwargs)

triton.compiler.compile = noted
hook = lambda module, function, name, *_: loaded.append([thread(), torch.cuda.current_device()])
triton.knobs.runtime.kernel_load_end_hook.add(hook)
output = experts("cuda")
torch.cuda.synchronize()
forward = [len(compiled), len(loaded)]
output.backward(torch.randn_like(output))
both = [len(compiled), len(loaded)]
print(json.dumps([forward, both, sorted(set(compiled)), sorted(map(list, set(map(tuple, loaded))))]))
"""
OTHER_DEVICE = """
for device in ("cuda:1", "cuda:0", "cuda:1"):
    output = experts(device)
    output.backward(torch.ones_like(output))
    torch.cuda.synchronize(device)
    print(bool(output.isfinite().all()))
"""
MISFIT = """
large = moe_ops.KernelConfigBackward_dX(BLOCK_M=256, BLOCK_N=256, BLOCK_K=256, num_stages=4)
output = experts("cuda", kernel_config=moe_ops.kernel_config(backward_dX=large))
torch.cuda.synchronize()
try:
    output.backward(torch.ones_like(output))
except ValueError as error:
    print(error)
"""


def test_a_first_forward_compiles_and_loads_its_backward_in_threads(tmp_path):
    told = fresh_python(EXPERTS + COMPILED, TRITON_CACHE_DIR=str(tmp_path), MOE_OPS_AUTOTUNE="0")
    forward, both, compilers, loaders = json.loads(told)
    assert forward == both
    assert min(forward) > 8
    assert compilers == ["another"]
    assert loaders == [["another", 0]]


@pytest.mark.multi_gpu
def test_a_first_call_may_be_on_another_device_than_the_current_one(tmp_path):
    """Kernels that are compiled ahead go where they are launched from."""
    told = fresh_python(EXPERTS + OTHER_DEVICE, TRITON_CACHE_DIR=str(tmp_path))
    assert told.split() == ["True"] * 3


def test_a_misfit_of_the_backward_does_not_reach_its_forward(tmp_path):
    told = fresh_python(EXPERTS + MISFIT, TRITON_CACHE_DIR=str(tmp_path))
    assert "kernel_config does not fit this GPU" in told


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
