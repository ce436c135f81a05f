# SPDX-License-Identifier: Apache-2.0
"""Launchers make the copies that their plans promise, and hand kernels what their flags say.

No GPU is needed: the launchers run on meta tensors, and what they launch is noted and not compiled.
"""

import contextlib
import dataclasses
import os
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("notes launches, which TRITON_INTERPRET=1 interprets", allow_module_level=True)
pytest.importorskip("triton", exc_type=ImportError)

from triton.runtime.jit import JITFunction

import moe_ops
from moe_ops._triton.descriptors import can_describe
from moe_ops._triton.plan import Plan, plan_once
from moe_ops._triton.recorder import Recorder
from moe_ops._triton.replay import Record
from moe_ops.configs import cache
from moe_ops.ops.fused_experts import triton as fused_experts
from moe_ops.quantization.stored import StoredWeight
from testing import kernel_calls as calls
from testing.compiled import GPUS, compiling_for
from testing.kernel_calls import Sizes

WIDTHS = (1, 8, 16, 24, 40, 100, 136, 344, 345, 1000, 1001, 1024)
# What copies operands, and which of its arguments it writes.
COPIES = {
    "gather_rows_kernel": "output_ptr", "copy_rows_kernel": "output_ptr",
    "shift_rows_kernel": "output_ptr",
}  # fmt: skip


@dataclasses.dataclass
class Launch:
    """One launch: its kernel's name, and its arguments by name."""

    name: str
    values: dict[str, Any]

    def operand(self, *names: str) -> torch.Tensor:
        """Return the first of these arguments that there is, or what its descriptor describes."""
        (found, *_) = (v for n in names if (v := self.values.get(n)) is not None)
        base = getattr(found, "base", found)
        assert isinstance(base, torch.Tensor), (self.name, names)
        return base


@contextlib.contextmanager
def noted(gpu: str) -> Iterator[tuple[list[Plan], list[Launch]]]:
    """Yield the plans that launchers make inside, and the launches. Nothing is compiled."""
    plans: list[Plan] = []
    launches: list[Launch] = []

    def planned(*args: Any, **kwargs: Any) -> Plan:
        plans.append(plan_once(*args, **kwargs))
        return plans[-1]

    def note(kernel: Any, *args: Any, **kwargs: Any) -> None:
        values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        missing = set(kernel.arg_names) - set(values)
        assert not missing, f"{kernel.fn.__name__} got no {missing}"
        launches.append(Launch(kernel.fn.__name__, values))

    with (
        compiling_for(GPUS[gpu]),
        mock.patch.object(JITFunction, "run", note),
        mock.patch("moe_ops._triton.gemm.plan_once", planned),
        mock.patch("moe_ops._triton.weight_gradient.plan_once", planned),
    ):
        yield plans, launches


def memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def check(plans: list[Plan], launches: list[Launch]) -> int:
    """Hold each product's launch against its plan, and return how many operands were copied."""
    copied: set[int] = set()
    products = []
    for launch in launches:
        if launch.name in COPIES:
            copied.add(memory(launch.values[COPIES[launch.name]]))
        elif "tiles_ptr" in launch.values or "offsets_ptr" in launch.values:
            if launch.name.endswith(("schedule_kernel", "offsets_kernel", "dots_kernel")):
                continue
            if not launch.name.endswith("dbias_kernel"):
                products.append(launch)
    assert len(products) == len(plans)
    found = 0
    for plan, launch in zip(plans, products, strict=True):
        is_dw = "bwd_dw" in launch.name
        x = launch.operand(
            *(("g_ptr", "g_desc", "left_desc") if is_dw else ("x_ptr", "x_desc", "dy_desc"))
        )
        b = launch.operand(
            *(("x_ptr", "x_desc", "right_desc") if is_dw else ("b_ptr", "b_desc", "w_desc"))
        )
        what = (launch.name, plan.copied, tuple(x.shape), x.stride(), tuple(b.shape), b.stride())
        if plan.copied.x:
            # Rows that their owner has ordered where TMA can load them are not copied again.
            assert can_describe(x), what
            assert not launch.values.get("GATHER_X", False), what
            found += memory(x) in copied
        if plan.copied.b:
            assert memory(b) in copied, what
            found += 1
        elif not is_dw:
            assert memory(b) not in copied, what
        for flag, names in {
            "TMA_X": ("x_desc",), "TMA_B": ("b_desc",), "TMA_Y": ("y_desc",), "TMA_G": ("g_desc",),
        }.items():  # fmt: skip
            if flag in launch.values and names[0] in launch.values:
                described = launch.values[names[0]]
                assert launch.values[flag] == (described is not None), (flag, what)
                if described is not None:
                    assert can_describe(described.base) or described.base.ndim > 3, (flag, what)
        if launch.values.get("GATHER_X"):
            assert not launch.values["TMA_X"], what
    return found


@pytest.fixture(autouse=True)
def _nothing_tuned():
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MOE_OPS_AUTOTUNE", "0")
        cache.forget()
        yield
    cache.forget()


def draw(seed: int) -> tuple[str, Sizes, torch.dtype, dict[str, Any]]:
    generator = random.Random(seed)
    sizes = Sizes(
        num_tokens=generator.choice((1, 50, 300, 9000)), top_k=generator.choice((1, 2, 3)),
        num_experts=generator.choice((1, 3, 8)), out_features=generator.choice(WIDTHS),
        in_features=generator.choice(WIDTHS),
    )  # fmt: skip
    dtype = generator.choice((torch.bfloat16, torch.float16, torch.float16, torch.float32))
    flags: dict[str, Any] = {n: generator.random() < 0.5 for n in ("bias", "transposed")}
    return generator.choice(("sm_80", "sm_90", "sm_90", "sm_100")), sizes, dtype, flags


@pytest.mark.parametrize("seed", range(60))
def test_grouped_gemm(seed):
    gpu, sizes, dtype, flags = draw(seed)
    flags |= ({}, {"permute_x": True}, {"permute_y": True})[seed % 3]
    made = calls.grouped_gemm(sizes, dtype, weights=seed % 2 == 0, **flags)
    for call in made.values():
        with noted(gpu) as (plans, launches):
            call()
        check(plans, launches)


@pytest.mark.parametrize("seed", range(60))
def test_fused_experts(seed):
    gpu, sizes, dtype, flags = draw(seed)
    modes: tuple[dict[str, Any], ...] = (
        {}, {"weights_before": True}, {"interleaved": True}, {"gated": False}, {"activation": "gelu"},
        {"recompute": "pre_activation"},
    )  # fmt: skip
    sizes = dataclasses.replace(sizes, out_features=2 * sizes.out_features)
    for call in calls.experts(sizes, dtype, **modes[seed % len(modes)], **flags).values():
        with noted(gpu) as (plans, launches):
            call()
        check(plans, launches)


def test_these_draws_copy_operands():
    """Else the tests above would hold nothing."""
    found = 0
    for seed in range(60):
        gpu, sizes, dtype, flags = draw(seed)
        with noted(gpu) as (plans, launches):
            made = calls.grouped_gemm(
                sizes, dtype, permute_x=True, bias=flags["bias"], transposed=flags["transposed"]
            )
            for call in made.values():
                call()
        found += check(plans, launches)
    assert found > 20


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("size", "format"), [("training", None), ("decode-8", None), ("training", "nf4")]
)
def test_inference_keeps_no_pre_activation(size, format, gpu):
    """It would be the largest tensor of a call without a gradient."""
    made = calls.experts(calls.SIZES[size], torch.bfloat16, format=format)
    for call, stores in (("inference", False), ("forward", True)):
        with noted(gpu) as (_, launches):
            made[call]()
        found = [launch.values for launch in launches if "STORE_Z" in launch.values]
        # A quantised weight comes in parts.
        assert found
        assert {values["STORE_Z"] for values in found} == {stores}


@pytest.mark.parametrize("format", ["nf4", "fp8_block"])
@pytest.mark.parametrize("size", ["training", "decode-8"])
def test_quantised_experts_do_what_their_plan_says(format, size):
    """Of Qwen3-30B's sizes the up projection has two parts, each with a schedule of its own."""
    made = calls.experts(calls.SIZES[size], torch.bfloat16, format=format)
    with noted("sm_90") as (_, launches):
        made["inference"]()
    names = [launch.name for launch in launches]
    decodes = size == "decode-8"
    assert names.count("_quantized_fwd_kernel") == (2 if decodes else 0)
    assert names.count("_dequantize_fwd_kernel") == (0 if decodes else 3)
    with noted("sm_90") as (_, launches):
        made["backward"]()
    parts = [launch for launch in launches if launch.name == "_dequantize_fwd_kernel"]
    assert [part.values["output_ptr"].shape[0] for part in parts] == [128, 64, 64]
    schedules = [launch for launch in launches if launch.name == "tile_schedule_kernel"]
    of_parts = [(s.values["first_expert"], s.values["end_expert"]) for s in schedules]
    assert of_parts[-2:] == [(0, 64), (64, 128)]


class NotedLaunches:
    """A driver that launches nothing."""

    def launch(self, compiled: Any, grid: tuple[int, ...], values: dict[str, Any]) -> Any:
        pointers = [v[0] if isinstance(v, tuple) and not hasattr(v, "slot") else v
                    for v in values.values()]  # fmt: skip
        return SimpleNamespace(slots={p.slot for p in pointers if hasattr(p, "slot")})

    def zero(self, pointer: Any, size: int) -> Any:
        return SimpleNamespace(slots={pointer.slot})

    def is_current(self, index: int) -> bool:
        return True

    def stream(self, index: int) -> int:
        return 0


@pytest.mark.parametrize("num_tokens", [3, 300])
@pytest.mark.parametrize("format", ["nf4", "fp8_block"])
def test_calls_of_quantised_experts_can_be_replayed(num_tokens, format):
    """They ask torch for memory alone, and everything else is launches."""
    up, down = (StoredWeight._make(stored(format, s)) for s in ((3, 48, 40), (3, 40, 24)))
    x = torch.zeros(num_tokens, 40, dtype=torch.bfloat16)
    ids = torch.zeros(num_tokens, 2, dtype=torch.int32)
    weights = torch.zeros(num_tokens, 2)
    given = [x, *up[:4], *down[:4], ids, weights]

    def recorded(function: Any, inputs: list[Any], *arguments: Any, **flags: Any) -> Any:
        with noted("sm_90"), Recorder(inputs, NotedLaunches()) as watched:
            outputs = function(*arguments, **flags)
        assert watched.obstacle is None
        assert watched.launches
        Record(watched, tuple(t for t in outputs if t.numel()), inputs[0])
        return outputs

    output, z, *routing = recorded(
        fused_experts.fused_experts, given, x, up, down, ids, weights, for_backward=True
    )
    inputs = [output, *given, z, *routing]
    dz, *_ = recorded(
        fused_experts.fused_experts_down_backward, inputs,
        output, x, up, down, weights, None, None, z, *routing,
        "silu", True, False, None, False, [True, False, True, False], False,
    )  # fmt: skip
    recorded(
        fused_experts.fused_experts_up_backward, [dz, *inputs],
        dz, x, up, None, *routing, 2, [True, False, False, False], False,
    )  # fmt: skip


def stored(format: str, shape: tuple[int, int, int]) -> list[Any]:
    weight = moe_ops.quantize_weight(torch.ones(shape), format)
    tensors = [t.detach() if isinstance(t, torch.Tensor) else t for t in weight.stored]
    return [*tensors, shape[2]]
