# SPDX-License-Identifier: Apache-2.0
"""What the rules compute: for widths of whole 16 bytes, and for those without."""

from dataclasses import replace

import pytest
import torch

from moe_ops.configs.device import KNOWN_GPUS
from moe_ops.configs.footprint import shared_memory
from moe_ops.configs.heuristics import heuristic, heuristic_and_reason
from moe_ops.configs.problem import Operands, Problem, copies
from moe_ops.tuning import Experts, products_of

H100, A100 = KNOWN_GPUS["H100"], KNOWN_GPUS["A100"]


def layer(hidden_size: int, intermediate_size: int, **more: bool) -> Experts:
    up, down = (2 * intermediate_size, hidden_size), (hidden_size, intermediate_size)
    return Experts(24, 3, up, down, torch.bfloat16, **more)


def products(given: Experts, num_tokens: int = 10007) -> list[Problem]:
    return [problem for _, problem in products_of(given, num_tokens, device=H100)]


def wishes(problem: Problem) -> set[str]:
    """The descriptors that the computed configuration asks for."""
    config = heuristic(problem, H100).to_dict()
    return {name for name, value in config.items() if name.startswith("use_tma") and value}


@pytest.mark.parametrize("gpu", sorted(KNOWN_GPUS))
@pytest.mark.parametrize("num_tokens", [1, 200, 2048, 65536])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(2048, 768), (1001, 344), (4104, 1536), (2048, 16)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_computed_configuration_says_why(gpu, num_tokens, dtype, sizes, has_bias, transposed):
    device = KNOWN_GPUS[gpu]
    given = replace(layer(*sizes), dtype=dtype, has_bias=has_bias, transposed=transposed)
    for _, problem in products_of(given, num_tokens, True, device):
        for operands in (None, Operands(y=False), Operands(x=False)):
            config, reason = heuristic_and_reason(problem, device, operands)
            assert config == heuristic(problem, device, operands)
            assert len(reason) > 10, problem
            assert device.has_tma or "TMA cannot" not in reason
            assert has_bias or "bias" not in reason
            takes_copies = problem.gather and not problem.transposed
            assert takes_copies or "copying the rows" not in reason
            is_wide = config.tile[0] * config.tile[1] >= 128 * 256
            assert is_wide or not reason.startswith("the widest tile")
            assert not config.warp_specialize or "group of warps" in reason or "reads" in reason


@pytest.mark.parametrize("hidden_size", [1000, 1008, 1016, 2040])
@pytest.mark.parametrize("intermediate_size", [344, 352, 1400])
def test_a_multiple_of_8_gets_the_descriptors_of_a_multiple_of_16(hidden_size, intermediate_size):
    """TMA's rule is 16 bytes."""
    for problem in products(layer(hidden_size, intermediate_size)):
        assert len(wishes(problem)) == 3
        specialized = heuristic(problem, H100).warp_specialize
        if problem.has_activation:
            assert not specialized
        else:
            assert specialized


@pytest.mark.parametrize(
    ("kind", "out_features", "in_features", "transposed", "is_wide"),
    [("forward", 4096, 2056, False, True), ("forward", 4104, 2048, False, False)]
    + [("forward", 4104, 2048, True, True), ("backward_dX", 2048, 4096, False, False)]
    + [("backward_dX", 2056, 4096, False, True), ("backward_dX", 2048, 4104, False, True)]
    + [("backward_dX", 2048, 4104, True, False)]
    # A wide tile would pad a tenth more.
    + [("backward_dX", 2048, 1032, False, False), ("backward_dX", 2048, 664, False, True)]
    + [("forward", 1032, 2056, False, True)],
)
def test_a_wide_tile_where_rows_of_an_operand_begin_within_sectors(
    kind, out_features, in_features, transposed, is_wide
):
    problem = Problem(kind, "bfloat16", 8, out_features, in_features, 1024, transposed=transposed)
    config = heuristic(problem, H100)
    assert config.warp_specialize
    assert config.tile == ((128, 256, 64) if is_wide else (128, 128, 64))


def test_a_wide_tile_where_a_long_contraction_has_a_narrow_result():
    narrow = Problem("backward_dX", "bfloat16", 111, 8528, 672, 1024)
    assert heuristic(narrow, H100).tile == (128, 256, 64)
    assert heuristic(replace(narrow, in_features=2048), H100).tile == (128, 128, 64)
    # In tiles of 256 these are 768 columns, and in tiles of 128 640.
    assert heuristic(replace(narrow, in_features=592), H100).tile == (128, 128, 64)


@pytest.mark.parametrize(
    ("out_features", "in_features", "tile"),
    # Nothing is padded; 6912 x 1920 in place of 6912 x 2048; 640 columns in place of 768.
    [(2048, 4096, (128, 256, 32)), (6880, 1904, (256, 128, 32)), (8032, 552, (256, 128, 32))]
    # Rows of one operand begin within sectors.
    + [(2272, 4792, (256, 128, 32)), (4792, 2272, (128, 256, 32)), (2296, 4792, (128, 256, 32))],
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [512, 1024])
def test_the_wide_side_of_dw_pads_less_and_reads_less(
    out_features, in_features, tile, transposed, rows
):
    sizes = (8, out_features, in_features, rows)
    problem = Problem("backward_dW", "bfloat16", *sizes, transposed=transposed)
    config = heuristic(problem, H100)
    assert config.warp_specialize
    assert config.tile == tile


def test_the_activations_backward_is_on_top_where_that_is_faster():
    """Else the product is a bare one in a wide tile."""
    top = Problem("backward_dX", "bfloat16", 64, 2048, 1408, 300)
    top = replace(top, epilogue="gated_activation_backward")
    assert heuristic(top, H100).is_pingpong
    assert heuristic(top, H100).num_stages == 4
    # Rows of the pre-activation that begin within sectors; not those of dY alone.
    assert heuristic(replace(top, in_features=1400), H100).tile == (128, 256, 64)
    assert heuristic(replace(top, out_features=1032), H100).is_pingpong
    # Few rows and a long contraction; steps of 32 where rows begin at 64 bytes.
    long = replace(top, out_features=4096, rows=512)
    assert heuristic(long, H100).tile == (128, 256, 32)
    assert heuristic(replace(long, in_features=1424), H100).tile == (128, 256, 64)
    assert heuristic(replace(long, rows=1024), H100).is_pingpong


def test_gathered_rows_are_worth_a_copy_where_pointers_would_read_numbers():
    gather = Problem("forward", "bfloat16", 24, 688, 1000, 1024, gather=True)
    dx = Problem("backward_dX", "bfloat16", 24, 1000, 688, 64, gather=True, dots=True)
    for problem in (gather, dx):
        assert copies(problem, H100, Operands()) == (True, False, False)
    for other in (
        replace(gather, in_features=1008), replace(gather, rows=32), replace(gather, gather=False),
    ):  # fmt: skip
        assert not any(copies(other, H100, Operands())), other
    assert not any(copies(gather, A100, Operands()))


@pytest.mark.parametrize(
    ("rows", "x", "b", "expected"),
    [(1024, False, False, (True, True)), (1024, True, False, (False, True))]
    + [(1024, False, True, (True, False)), (64, False, True, (True, False))]
    + [(64, False, False, (True, True)), (32, False, True, (False, False))]
    + [(32, False, False, (False, False))],
)
def test_operands_that_tma_cannot_describe_are_worth_a_copy_for_many_rows(rows, x, b, expected):
    problem = Problem("forward", "bfloat16", 24, 688, 1001, rows)
    assert copies(problem, H100, Operands(x, b, True)) == (*expected, False)
    assert not any(copies(problem, A100, Operands(x, b, True)))


def test_the_steps_of_dw_are_deeper_where_pointers_store_but_do_not_load():
    dw = Problem("backward_dW", "bfloat16", 16, 2002, 1001, 1024)
    stored, loaded = (heuristic(dw, H100, Operands(x, True, False)) for x in (True, False))
    assert (stored.BLOCK_M, stored.num_stages) == (64, 4)
    assert (loaded.BLOCK_M, loaded.num_stages) == (32, 3)


def test_halves_of_a_weights_row_are_not_worth_a_copy_that_tma_cannot_describe():
    up = Problem("forward", "bfloat16", 24, 690, 1008, 1024, gather=True, transposed=True)
    up = replace(up, epilogue="gated_activation")
    assert not copies(up, H100, Operands(b=False)).b
    assert copies(replace(up, out_features=688), H100, Operands(b=False)).b


def test_the_bound_decides_between_pingpong_and_cooperative():
    """A wide tile where weights are the bound and the contraction is long."""
    bare = Problem("forward", "bfloat16", 128, 4096, 4096, 512)
    assert heuristic(bare, H100).tile == (128, 256, 32)
    for problem in (
        replace(bare, rows=1024), replace(bare, in_features=2048), replace(bare, bias=True),
        replace(bare, scatter=True),
    ):  # fmt: skip
        assert heuristic(problem, H100).is_pingpong, problem
    down = replace(bare, kind="backward_dX")
    assert heuristic(down, H100).tile == (128, 256, 32)


def test_where_tiles_are_tall():
    """Where most experts have one such tile, and the contraction is worth it."""
    bare = Problem("forward", "bfloat16", 384, 7168, 2048, 176)
    gated = replace(bare, kind="backward_dX", epilogue="gated_activation_backward")
    for problem in (bare, replace(bare, kind="backward_dX"), gated, replace(bare, transposed=True)):
        config = heuristic(problem, H100)
        assert (config.is_tall, config.group_m) == (True, 1), problem
        assert shared_memory(config, problem, H100) <= H100.shared_memory
    for problem in (
        replace(bare, rows=64), replace(bare, rows=512), replace(bare, in_features=1408),
        replace(bare, bias=True), replace(bare, gather=True), replace(bare, scatter=True),
        # 384 columns would be padded to 512, and a LoRA's rank to 256.
        replace(bare, out_features=384), replace(bare, out_features=16),
    ):  # fmt: skip
        assert not heuristic(problem, H100).is_tall, problem
    for device in (A100, KNOWN_GPUS["B200"], replace(H100, shared_memory=100_000)):
        assert not heuristic(bare, device).is_tall


@pytest.mark.parametrize(
    ("intermediate_size", "hidden_size", "rows", "bias", "copies"),
    [(768, 2048, 1024, False, False), (1408, 2048, 1024, False, False)]
    + [(3072, 2048, 1024, False, True), (3072, 2048, 512, False, False)]
    + [(3072, 2064, 1024, False, False), (1280, 768, 1024, False, True)]
    + [(1264, 768, 1024, False, False), (768, 2048, 1024, True, True)]
    + [(768, 2048, 512, True, True), (8192, 2048, 64, True, False)],
)
def test_where_an_up_projection_copies_its_rows(intermediate_size, hidden_size, rows, bias, copies):
    up = Problem(
        "forward", "bfloat16", 128, 2 * intermediate_size, hidden_size, rows, gather=True, bias=bias,
        epilogue="gated_activation",
    )  # fmt: skip
    assert heuristic(up, H100).is_pingpong == copies


@pytest.mark.parametrize("num_tokens", [1, 100])
def test_a_weight_that_pointers_read_number_by_number_is_loaded_by_a_descriptor(num_tokens):
    """Else few rows take pointers, which cost the host less."""
    for problem in products(layer(1000, 344), num_tokens):
        if problem.kind != "backward_dW":
            assert wishes(problem) == {"use_tma_load_w"}
    for problem in products(layer(1024, 352), num_tokens):
        if problem.kind != "backward_dW":
            assert wishes(problem) == set()


def test_operands_that_tma_cannot_describe_are_not_asked_for():
    for problem in products(layer(1001, 345)):
        assert wishes(problem) == set(), problem
    # 345 of 1000 rows: what is described of dW is loaded so, and the rest by pointers.
    *_, of_dw, _ = products(layer(1000, 345))
    assert (of_dw.kind, of_dw.out_features, of_dw.in_features) == ("backward_dW", 1000, 345)
    assert wishes(of_dw) == {"use_tma_load_dy"}
    assert not heuristic(of_dw, H100).warp_specialize


def test_tensors_that_are_not_aligned_count_as_such():
    """The widths say that TMA could describe them, and the tensors say that it cannot."""
    down = products(layer(1024, 512))[1]
    assert heuristic(down, H100).warp_specialize
    assert heuristic(down, H100, Operands()) == heuristic(down, H100)
    by_pointers = heuristic(down, H100, Operands(x=False))
    assert not by_pointers.warp_specialize
    assert not by_pointers.to_dict()["use_tma_load_x"]
    # Padded rows: the widths say that it cannot, and the tensors that it can.
    padded = products(layer(1001, 345))[1]
    assert heuristic(padded, H100, Operands(y=False)).to_dict()["use_tma_load_x"]


def test_gpus_without_tma_get_no_descriptors():
    for problem in products(layer(1000, 344)):
        config = heuristic(problem, A100, Operands()).to_dict()
        assert not any(value for name, value in config.items() if name.startswith("use_tma"))
