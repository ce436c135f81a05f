# SPDX-License-Identifier: Apache-2.0
"""A plan gives each product its kernel, for a reason. A table here has all cases."""

import logging
from typing import Any

import pytest
import torch

import moe_ops
from moe_ops.configs.device import KNOWN_GPUS, Device
from moe_ops.configs.problem import Operands, dense_operands
from testing.problem_keys import make_problem, with_words

pytest.importorskip("triton", exc_type=ImportError)

from moe_ops._triton import plan as planning
from moe_ops._triton.plan import plan, plan_once

H200, A100, B200 = (KNOWN_GPUS[name] for name in ("H200", "A100", "B200"))
INTERPRETED = Device("H", (9, 0), 232448, 4, is_interpreted=True)
BARE = make_problem("forward", "bfloat16", 8, 512, 256, 1024)
SIZES = ("bfloat16", 8, 512, 256, 1024)


def config(columns: int, depth: int = 64, rows: int = 128) -> str:
    """Return warp-specialised tiles of so many rows, 128 in dW, and columns for all three passes."""
    common: dict[str, Any] = {"use_tma_store": True, "warp_specialize": True, "num_warps": 8}
    return moe_ops.kernel_config(
        moe_ops.KernelConfigForward(
            BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=depth, use_tma_load_x=True, use_tma_load_w=True,
            **common,
        ),
        moe_ops.KernelConfigBackward_dX(
            BLOCK_M=rows, BLOCK_K=columns, BLOCK_N=depth, use_tma_load_dy=True, use_tma_load_w=True,
            **common,
        ),
        moe_ops.KernelConfigBackward_dW(
            BLOCK_N=128, BLOCK_K=columns, BLOCK_M=depth, use_tma_load_dy=True, use_tma_load_x=True,
            **common,
        ),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_tuned(monkeypatch):
    monkeypatch.setenv("MOE_OPS_AUTOTUNE", "0")


# (pass, words of the problem's key, columns of the tile) -> kernel, and whether it does the epilogue.
TABLE = [
    ("forward", "", 128, "pingpong", False),
    ("forward", "", 256, "cooperative", False),
    ("forward", "transposed", 256, "cooperative", False),
    ("forward", "scatter scale bias", 128, "pingpong", False),
    ("forward", "scatter", 256, "persistent", False),
    ("forward", "scale", 256, "persistent", False),
    ("forward", "bias", 256, "persistent", False),
    ("forward", "gather", 128, "persistent", False),
    ("forward", "gather", 256, "persistent", False),
    ("forward", "gather gated", 128, "pingpong", True),
    ("forward", "gather bias gated", 128, "pingpong", True),
    ("forward", "gather gated", 256, "persistent", True),
    ("forward", "gather transposed gated", 128, "persistent", True),
    ("forward", "gather activated", 128, "persistent", True),
    ("backward_dX", "", 128, "pingpong", False),
    ("backward_dX", "dots", 128, "persistent", False),
    ("backward_dX", "gather scale dots", 128, "persistent", False),
    ("backward_dX", "scatter", 128, "pingpong", False),
    ("backward_dX", "gated", 128, "pingpong", True),
    ("backward_dX", "transposed gated", 128, "pingpong", True),
    ("backward_dX", "gated", 256, "cooperative", False),
    ("backward_dW", "", 128, "pingpong", False),
    ("backward_dW", "", 256, "cooperative", False),
    ("backward_dW", "transposed", 256, "cooperative", False),
]


@pytest.mark.parametrize(("kind", "words", "columns", "kernel", "computes"), TABLE)
def test_the_kernel_on_hopper(kind, words, columns, kernel, computes):
    made = plan(make_problem(kind, *SIZES, words.split()), Operands(), H200, config(columns))
    assert (made.kernel, made.computes_epilogue, made.source) == (kernel, computes, "given")
    # The reason of a wish that is not met comes first.
    is_met = kernel != "persistent"
    assert (made.unmet == ()) == is_met
    assert is_met or made.unmet[0] == f"warp_specialize: {made.reason}"


@pytest.mark.parametrize(
    ("kind", "words", "kernel"),
    [
        ("forward", "", "tall"),
        ("forward", "transposed", "tall"),
        ("forward", "scatter", "persistent"),
        ("forward", "bias", "persistent"),
        ("forward", "gather gated", "persistent"),
        ("backward_dX", "", "tall"),
        ("backward_dX", "gated", "tall"),
        ("backward_dX", "dots", "persistent"),
    ],
)
def test_a_tall_tile_on_hopper(kind, words, kernel):
    problem = make_problem(kind, *SIZES, words.split())
    made = plan(problem, Operands(), H200, config(256, rows=192))
    # Triton's blocks are powers of two.
    rows = 192 if kernel == "tall" else 128
    assert (made.kernel, made.tile) == (kernel, (rows, 256, 64))
    if kernel == "tall":
        assert (made.group_rows, made.group_columns) == (64, 128)
    assert not made.computes_epilogue or "activation" in problem.epilogue


@pytest.mark.parametrize(
    ("device", "dtype", "operands", "reason"),
    [
        (A100, "bfloat16", Operands(), "NVIDIA A100-SXM4-80GB has 8.0"),
        (B200, "bfloat16", Operands(), "NVIDIA B200 has 10.0"),
        (INTERPRETED, "float16", Operands(), "Triton's interpreter"),
        (H200, "float32", Operands(), "this is float32"),
        (H200, "bfloat16", Operands(x=False), "TMA cannot describe the left operand"),
        (H200, "bfloat16", Operands(b=False), "TMA cannot describe the right operand"),
        (H200, "float16", Operands(y=False), "TMA cannot describe the output"),
    ],
)
@pytest.mark.parametrize("kind", ["forward", "backward_dX", "backward_dW"])
@pytest.mark.parametrize("columns", [128, 256])
def test_why_a_kernel_for_hopper_cannot_serve(kind, columns, device, dtype, operands, reason):
    # Of more rows than this, what TMA cannot describe is copied first.
    problem = make_problem(kind, dtype, *SIZES[1:4], 32)
    made = plan(problem, operands, device, config(columns))
    assert made.kernel == "persistent"
    assert reason in made.reason


@pytest.mark.parametrize(
    ("words", "operands", "columns", "kernel", "copied"),
    [
        ("", Operands(x=False), 128, "pingpong", (True, False)),
        ("", Operands(b=False), 256, "cooperative", (False, True)),
        ("", Operands(x=False, b=False), 128, "pingpong", (True, True)),
        ("gather", Operands(b=False), 256, "persistent", (False, True)),
        ("gather gated", Operands(), 128, "pingpong", (True, False)),
        ("gather gated", Operands(b=False), 128, "pingpong", (True, True)),
    ],
)
def test_what_is_copied_first(words, operands, columns, kernel, copied):
    made = plan(with_words(BARE, words.split()), operands, H200, config(columns))
    assert (made.kernel, made.copied) == (kernel, (*copied, False))
    assert made.options.get("GATHER_X", False) == (words == "gather")


def test_nothing_is_copied_for_a_configuration_without_descriptors():
    plain = moe_ops.kernel_config(moe_ops.KernelConfigForward())
    made = plan(BARE, Operands(x=False, b=False), H200, plain)
    assert not any(made.copied)
    assert not any(made.tma)


def test_descriptors_serve_where_they_can():
    wide = plan(BARE, Operands(), A100, config(256))
    assert wide.tma == Operands(False, False, False)
    for name in ("use_tma_load_x", "use_tma_load_w", "use_tma_store"):
        assert any(wish.startswith(f"{name}: it needs compute capability") for wish in wide.unmet)
    gathered = plan(with_words(BARE, ["gather"]), Operands(), H200, config(256))
    assert gathered.tma == Operands(False, True, True)
    assert "use_tma_load_x: gathered rows are loaded by pointers" in gathered.unmet
    few = make_problem("forward", "bfloat16", 8, 512, 256, 32, ["scatter"])
    scattered = plan(few, Operands(b=False), H200, config(256))
    assert scattered.tma == Operands(True, False, False)
    assert (scattered.options["TMA_X"], scattered.options["TMA_B"]) == (True, False)


def test_a_flattened_loop_beside_a_bias_is_a_wish_that_cannot_be_met():
    flat = moe_ops.kernel_config(moe_ops.KernelConfigForward(flatten=True))
    plain = moe_ops.kernel_config(moe_ops.KernelConfigForward(flatten=False))
    biased = with_words(BARE, ["bias"])
    made = plan(biased, Operands(), H200, flat)
    assert [wish.partition(":")[0] for wish in made.unmet] == ["flatten, ignored"]
    assert not made.options["FLATTEN"]
    # So it is where the fallback of another kernel computes the product.
    assert any(
        w.startswith("flatten, ignored") for w in plan(biased, Operands(), A100, config(256)).unmet
    )
    for problem, given in ((BARE, flat), (biased, plain), (biased, None)):
        assert plan(problem, Operands(), H200, given).unmet == ()


def test_a_configuration_that_nobody_gave_has_no_wishes_for_descriptors():
    made = plan(with_words(BARE, ["gather"]), Operands(), H200)
    assert made.source == "computed"
    assert made.unmet == ()


@pytest.mark.parametrize("rows", [1, 8, 32, 64])
def test_kernels_of_few_rows_find_their_tiles(rows):
    problem = make_problem("forward", "bfloat16", 8, 512, 256, rows)
    assert plan(problem, Operands(), H200).finds_tiles == (rows <= 32)
    assert not plan(problem, Operands(), H200, needs_schedule=True).finds_tiles
    dots = make_problem("backward_dX", "bfloat16", 8, 512, 256, rows, ["dots"])
    assert not plan(dots, Operands(), H200).finds_tiles


def test_where_a_configuration_came_from():
    shipped = make_problem("forward", "bfloat16", 128, 2048, 768, 1024)
    assert plan(shipped, Operands(), H200).source == "shipped"
    assert plan(shipped, Operands(), A100).source == "computed"
    given = moe_ops.kernel_config(moe_ops.KernelConfigForward(BLOCK_M=64))
    assert plan(shipped, Operands(), H200, given).source == "given"
    # A string for another pass says nothing about this one.
    other = moe_ops.kernel_config(backward_dX=moe_ops.KernelConfigBackward_dX(BLOCK_M=64))
    assert plan(shipped, Operands(), H200, other).source == "shipped"


def once(rows, device, kernel_config=None, bias=False):
    """Return the remembered plan of BARE at so many rows."""
    return plan_once(
        "forward", torch.bfloat16, 8, 512, 256, rows, False, False, False, bias, False, False,
        "none", True, True, True, device, kernel_config, False,
    )  # fmt: skip


def test_a_plan_is_made_once():
    assert once(1024, H200) is once(1024, H200)
    assert once(1024, H200).options == plan(BARE, Operands(), H200).options


def test_a_wish_that_cannot_be_met_is_logged_once(caplog):
    planning.plan_once.cache_clear()
    planning._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="moe_ops"):
        for rows in (1024, 2048):
            once(rows, A100, config(256))
    said = [record for record in caplog.records if "warp_specialize" in record.message]
    assert len(said) == 1
    assert said[0].levelno == logging.WARNING
    assert (
        "need Hopper (compute capability 9.x), and NVIDIA A100-SXM4-80GB has 8.0" in said[0].message
    )


def test_a_default_is_no_wish_to_be_warned_of(caplog):
    """A loop is flattened by default. explain tells that it is not, and the log only to who asks."""
    planning.plan_once.cache_clear()
    planning._log_once.cache_clear()
    given = moe_ops.kernel_config(moe_ops.KernelConfigForward())
    with caplog.at_level(logging.INFO, logger="moe_ops"):
        once(1024, H200, given, bias=True)
    (said,) = caplog.records
    assert said.levelno == logging.INFO
    assert "forward (given configuration): flatten, ignored: beside a bias" in said.message


@pytest.mark.parametrize(
    ("epilogue", "dtype", "columns", "parts", "is_stored"),
    [
        ("none", "float16", 16, 2, True),
        ("gated", "float16", 16, 2, False),
        ("gated", "float16", 16, 1, True),
        ("gated", "float16", 32, 2, True),
        ("gated", "float32", 16, 2, True),
        ("activated", "float16", 16, 2, True),
    ],
)
def test_no_descriptor_stores_less_than_16_bytes(epilogue, dtype, columns, parts, is_stored):
    words = ["gather", epilogue] if epilogue != "none" else []
    problem = make_problem("forward", dtype, *SIZES[1:], words)
    given = moe_ops.KernelConfigForward(
        BLOCK_N=columns, epilogue_subtile=parts, use_tma_store=True, flatten=False
    )
    made = plan(problem, Operands(), H200, moe_ops.kernel_config(given))
    assert made.tma.y == is_stored
    unmet = "use_tma_store: the parts of a tile are narrower than 16 bytes"
    assert made.unmet == (() if is_stored else (unmet,))


def test_an_early_start_is_not_for_dw():
    given = moe_ops.kernel_config(None, None, moe_ops.KernelConfigBackward_dW(launch_pdl=True))
    problem = make_problem("backward_dW", *SIZES)
    for device in (H200, A100):
        (unmet,) = plan(problem, Operands(), device, given).unmet
        assert unmet == "launch_pdl: it applies to forward and dX"


@pytest.mark.parametrize("width", [1000, 1001, 1004])
@pytest.mark.parametrize("inner", [344, 345])
@pytest.mark.parametrize("transposed", [False, True])
def test_dense_operands_are_what_the_launchers_find(width, inner, transposed):
    """The rule by widths agrees with the one by tensors, in every pass."""
    from moe_ops._triton.descriptors import can_describe, can_describe_rows

    words = ["transposed"] if transposed else []
    weight = (
        torch.empty(2, inner, width).half() if transposed else torch.empty(2, width, inner).half()
    )
    x, dy = torch.empty(4, inner).half(), torch.empty(4, width).half()
    b = can_describe(weight)
    stored = weight.shape[2]
    left, right = (x, dy) if transposed else (dy, x)
    expected = {
        "forward": (can_describe(x), b, can_describe_rows(width, x.dtype)),
        "backward_dX": (can_describe(dy), b, can_describe_rows(inner, x.dtype)),
        "backward_dW": (
            can_describe(left), can_describe(right), can_describe_rows(stored, x.dtype),
        ),
    }  # fmt: skip
    for kind, operands in expected.items():
        problem = make_problem(kind, "float16", 2, width, inner, 1024, words)
        assert dense_operands(problem) == Operands(*operands), kind


def test_a_measured_kernel_serves_or_gives_way_to_the_rules():
    """It serves copies of what TMA cannot describe. Nobody measured its fallback."""
    shipped = make_problem("forward", "bfloat16", 128, 2048, 768, 1024)
    assert plan(shipped, Operands(), H200).source == "shipped"
    made = plan(shipped, Operands(x=False), H200)
    assert (made.source, made.kernel, made.copied.x) == ("shipped", "pingpong", True)
    made = plan(shipped, Operands(y=False), H200)
    assert (made.source, made.kernel) == ("computed", "persistent")
    assert not made.config.warp_specialize
