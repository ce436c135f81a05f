# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm and its gradients are right at ragged and even sizes of several tiles.

T tokens, K top_k, R = T * K rows, E experts, N out_features, D in_features.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from testing import checks, reference
from testing.gemm_problem import MODES, SHAPES, check, problem
from testing.on_device import DEVICE, DTYPES
from testing.tolerances import RELATIVE_NORM, TF32_NORM

pytestmark = pytest.mark.gpu

moe = torch.ops.moe

LAYOUTS = ("contiguous", "transposed", "padded", "expert-last")
ROUTINGS = ("uniform", "dropped", "hot_and_empty", "zipf")


CASES = [
    pytest.param(shape, mode, dtype, i, id=f"{shape}-{mode}-{str(dtype).removeprefix('torch.')}")
    for i, (shape, mode, dtype) in enumerate(
        (shape, mode, dtype) for shape in SHAPES for mode in MODES for dtype in DTYPES
    )
]


@pytest.mark.parametrize(("shape", "mode", "dtype", "seed"), CASES)
def test_sizes_and_flags(shape, mode, dtype, seed):
    check(
        problem(
            SHAPES[shape],
            dtype,
            # There are 11 x 6 x 3 cases. Strides that share no factor with these meet every pair.
            routing=ROUTINGS[seed // 5 % 4],
            layout=LAYOUTS[seed // 7 % 4],
            index_dtype=(torch.int32, torch.int64)[seed // 3 % 2],
            **MODES[mode],
        )
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["permute_x", "permute_y-weights-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_the_weight(layout, mode, dtype):
    check(problem(SHAPES["even"], dtype, layout=layout, **MODES[mode]))


@pytest.mark.parametrize("stored", ["(E, N, D)", "(E, D, N)"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradient_has_the_strides_of_the_weight(stored, dtype):
    layout = "contiguous" if stored == "(E, N, D)" else "transposed"
    given = problem(SHAPES["even"], dtype, layout=layout)
    _, gradients = given.run()
    assert gradients["weight"].stride() == given.arguments["weight"].stride()


@pytest.mark.parametrize("routing", reference.ROUTINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["even", "odd", "decode"])
def test_routings(shape, mode, routing):
    check(problem(SHAPES[shape], torch.bfloat16, routing=routing, **MODES[mode]))


@pytest.mark.parametrize("stored", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_experts_have_exactly_zero_gradients(stored, dtype):
    """The first, the last and neighbours in between are empty."""
    given = problem((400, 2, 8, 256, 192), dtype, layout=stored, bias=True, poison=False)
    given.arguments["token_counts"] = torch.tensor(
        [0, 300, 0, 0, 1, 499, 0, 0], dtype=torch.int32, device=DEVICE
    )
    check(given)
    _, gradients = given.run()
    empty = given.arguments["token_counts"] == 0
    assert (gradients["weight"][empty] == 0).all()
    assert (gradients["bias"][empty] == 0).all()


@pytest.mark.parametrize("rows", ["transposed", "padded", "odd-offset", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_the_rows(rows, dtype):
    """Descriptors can read some of these strides and not others."""

    def strided(tensor: Tensor) -> Tensor:
        if rows == "transposed":
            return tensor.t().contiguous().t()
        if rows == "expanded":
            return tensor[:1].clone().expand_as(tensor)
        start = 8 if rows == "padded" else 1
        room = tensor.new_full((tensor.shape[0], tensor.shape[1] + 16), float("nan"))
        return room[:, start : start + tensor.shape[1]].copy_(tensor)

    given = problem(SHAPES["even"], dtype, poison=False, weights=True)
    given.arguments["input"] = strided(given.arguments["input"])
    given.grad_output = strided(given.grad_output)
    check(given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [(100, 100), (128, 100), (100, 128)])
def test_ragged_rows_in_wider_ones(out_features, in_features, dtype):
    """Rows of 200 bytes stand every 208: descriptors can read them, but not write a gradient so."""

    def pad(rows: Tensor) -> Tensor:
        width = rows.shape[-1] // 8 * 8 + 16
        room = rows.new_full((*rows.shape[:-1], width), float("nan"))
        return room[..., : rows.shape[-1]].copy_(rows)

    given = problem((900, 1, 3, out_features, in_features), dtype)
    for name in ("input", "weight"):
        given.arguments[name] = pad(given.arguments[name])
    given.grad_output = pad(given.grad_output)
    check(given)


@pytest.mark.parametrize("shape", ["even", "odd", "decode"])
@pytest.mark.parametrize("mode", MODES)
def test_tf32(shape, mode):
    """TF32 keeps as many digits as fp16."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        check(problem(SHAPES[shape], torch.float32, **MODES[mode]), dtype=torch.float16)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


PRECISION_SETTINGS = {
    "nothing": "",
    "highest": 'torch.set_float32_matmul_precision("highest")',
    "high": 'torch.set_float32_matmul_precision("high")',
    "allow_tf32": "torch.backends.cuda.matmul.allow_tf32 = True",
    "matmul": 'torch.backends.cuda.matmul.fp32_precision = "tf32"',
    "everywhere": 'torch.backends.fp32_precision = "tf32"',
}
MEASURE_PRECISION = """
import json, torch, moe_ops
{setting}
torch.manual_seed(0)
x, w = torch.randn(512, 256, device="cuda"), torch.randn(1, 256, 256, device="cuda")
counts = torch.tensor([512], device="cuda")
exact = x.double() @ w[0].double().T
grad = torch.randn(512, 256, device="cuda")
x.requires_grad_(); w.requires_grad_()
y = moe_ops.grouped_gemm(x, w, counts)
dx, dw = torch.autograd.grad(y, (x, w), grad)
pairs = {{
    "torch": (x @ w[0].T, exact),
    "forward": (y, exact),
    "dx": (dx, grad.double() @ w[0].double()),
    "dw": (dw[0], grad.double().T @ x.double()),
}}
errors = {{n: float((a.double() - e).norm() / e.norm()) for n, (a, e) in pairs.items()}}
print(json.dumps(errors))
"""


@pytest.mark.parametrize("setting", PRECISION_SETTINGS)
def test_fp32_products_are_as_torch_is_told(setting):
    """torch has two interfaces for it. Mixing them raises, so each has a fresh process."""
    script = MEASURE_PRECISION.format(setting=PRECISION_SETTINGS[setting])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout)
    fp32_norm = RELATIVE_NORM[torch.float32]
    tf32 = errors.pop("torch") > fp32_norm
    assert tf32 == (setting not in {"nothing", "highest"})
    for name, error in errors.items():
        low, high = (fp32_norm, TF32_NORM) if tf32 else (-1, fp32_norm)
        assert low < error < high, (setting, name, error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["even", "odd", "decode"])
def test_rounds_once(shape, mode, dtype):
    """Products, bias and weight are computed in fp32 and rounded once.

    One more rounding would move about every fourth element by one unit in the last place. Sums in
    another order move a few.
    """
    given = problem(SHAPES[shape], dtype, **MODES[mode])
    output, _ = given.run()
    want, _ = given.expected()
    assert (output != want.to(dtype)).double().mean() < 0.05


def test_gradients_that_are_not_needed_change_nothing():
    """The gradients of any subset of the arguments have the same bits as when all are needed."""
    given = problem(SHAPES["even"], torch.bfloat16, permute_y=True, weights=True, bias=True)
    _, everything = given.run()
    for chosen in (["input"], ["weight"], ["topk_weights"], ["bias"], ["input", "bias"]):
        arguments = {
            name: value.detach() if isinstance(value, Tensor) else value
            for name, value in given.arguments.items()
        }
        leaves = [arguments[name].requires_grad_() for name in chosen]
        output = moe.grouped_gemm(**arguments)
        found = torch.autograd.grad(output, leaves, given.grad_output)
        for name, gradient in zip(chosen, found, strict=True):
            assert torch.equal(gradient, everything[name]), (chosen, name)


def test_autocast_multiplies_in_its_dtype():
    given = problem(SHAPES["even"], torch.float32, bias=True, poison=False)
    arguments = given.arguments
    with torch.autocast("cuda", torch.bfloat16):
        output = moe.grouped_gemm(**arguments)
    casts = {name: arguments[name].bfloat16() for name in ("input", "weight", "bias")}
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, moe.grouped_gemm(**{**arguments, **casts}))


def test_forced_pytorch_implementation_gives_the_same(tmp_path):
    """MOE_OPS_IMPLEMENTATION=pytorch takes CUDA tensors, slowly, to help look for a bug."""
    file = tmp_path / "outputs.pt"
    script = f"""
import torch
from testing.gemm_problem import MODES, problem
from testing.gemm_problem import SHAPES
outputs = [
    problem(SHAPES["odd"], torch.float32, poison=False, **mode).run() for mode in MODES.values()
]
torch.save(outputs, {str(file)!r})
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "MOE_OPS_IMPLEMENTATION": "pytorch", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = torch.load(file)
    for (output, gradients), mode in zip(outputs, MODES.values(), strict=True):
        want, want_gradients = problem(SHAPES["odd"], torch.float32, poison=False, **mode).run()
        checks.assert_close(output, want)
        for name, gradient in want_gradients.items():
            checks.assert_close(gradients[name], gradient, what=name)
