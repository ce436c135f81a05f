# SPDX-License-Identifier: Apache-2.0
"""Tuning tries configurations that are valid, fit and differ, the heuristic's choice first."""

import itertools
from dataclasses import replace
from typing import Any, cast

import pytest

from moe_ops.configs.device import Device
from moe_ops.configs.footprint import shared_memory
from moe_ops.configs.heuristics import heuristic
from moe_ops.configs.kernel_config import PASSES
from moe_ops.configs.kernel_string import kernel_config, parse
from moe_ops.configs.problem import Problem
from moe_ops.tuning.space import MAX_CANDIDATES, candidates
from testing.problem_keys import make_problem, with_words

KIB = 1024
DEVICES = [
    Device("64 KiB", (7, 5), 64 * KIB, 40),
    Device("99 KiB", (8, 9), 99 * KIB, 128),
    Device("164 KiB", (8, 0), 164 * KIB, 108),
    Device("228 KiB", (9, 0), 228 * KIB - 1024, 132),
    Device("interpreter", (0, 0), 1024 * KIB, 4),
]
HOPPER = DEVICES[3]
FLAGS = {
    "forward": [(), ("gather", "bias"), ("scatter", "scale"), ("transposed",)],
    "backward_dX": [(), ("scatter",), ("gather", "scale", "dots"), ("transposed",)],
    "backward_dW": [(), ("transposed",)],
}
PROBLEMS = [
    make_problem(kind, dtype, 64, *sizes, rows, flags)
    for kind, dtype, sizes, rows in itertools.product(
        PASSES, ("bfloat16", "float32"), ((1536, 2048), (100, 36)), (1, 32, 64, 1024)
    )
    for flags in FLAGS[kind]
]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_valid_fitting_and_different(device):
    for problem in PROBLEMS:
        found = candidates(problem, device)
        assert found[0] == heuristic(problem, device)
        # They are enough to choose from and few enough to try.
        assert 8 <= len(found) <= MAX_CANDIDATES, problem
        assert len(set(found)) == len(found)
        for config in found:
            assert type(config) is PASSES[problem.kind]
            assert shared_memory(config, problem, device) <= device.shared_memory
            # The constructor checks it, so the string that the op gets is valid too.
            text = kernel_config(**cast(dict[str, Any], {problem.kind: config}))
            assert parse(text) == {problem.kind: config}


def tried(problem: Problem, field: str) -> set[Any]:
    """Return the values of a field that the candidates have on Hopper."""
    return {getattr(config, field) for config in candidates(problem, HOPPER)}


def test_tails_are_halved_in_some():
    problem = make_problem("forward", "bfloat16", 64, 1536, 2048, 64)
    assert True in tried(problem, "tail_tiles")


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_descriptors_only_where_they_apply(device):
    for problem in PROBLEMS:
        # The rows have 72 or 200 bytes, and descriptors want multiples of 16.
        odd = problem.in_features == 36 and problem.dtype == "bfloat16"
        _, *others = candidates(problem, device)
        for config in others:
            descriptors = [
                name for name, value in config.to_dict().items() if "tma" in name and value
            ]
            if odd or not device.has_tma or problem.dtype == "float32":
                assert not descriptors
            if "gather" in problem.flags and not config.warp_specialize:
                assert not {"use_tma_load_x", "use_tma_load_dy"} & set(descriptors)
            if "scatter" in problem.flags and not config.warp_specialize:
                assert "use_tma_store" not in descriptors


def test_choices_that_hopper_needs():
    """Both ways of each choice are tried where the choice matters."""
    large = make_problem("forward", "bfloat16", 128, 1536, 2048, 1024)
    assert {(c.BLOCK_M, c.BLOCK_N) for c in candidates(large, HOPPER)} >= {
        (128, 256), (256, 128), (128, 128), (64, 256), (64, 128),
    }  # fmt: skip
    expected: dict[str, set[Any]] = {
        "flatten": {True, False}, "use_tma_store": {True, False}, "use_tma_load_w": {True, False},
        "group_m": {4, 8, 16}, "num_warps": {4, 8}, "num_stages": {3, 4, 5},
        "epilogue_subtile": {1, 2}, "programs_per_sm": {1, 2},
    }  # fmt: skip
    for field, values in expected.items():
        assert tried(large, field) >= values, field
    down = replace(large, kind="backward_dX", epilogue="gated_activation_backward")
    for problem in (
        large,
        down,
        *(with_words(large, f) for f in (("gather", "gated"), ("scatter",), ("bias",))),
    ):
        assert tried(problem, "warp_specialize") == {True, False}
    for flag in ("gather", "dots"):
        assert tried(with_words(large, (flag,)), "warp_specialize") == {False}
    few = make_problem("forward", "bfloat16", 128, 1536, 2048, 4)
    assert tried(few, "BLOCK_M") == {16, 32}
    assert tried(few, "use_tma_load_w") == tried(few, "launch_pdl") == {True, False}
    dw = make_problem("backward_dW", "bfloat16", 128, 1536, 2048, 1024)
    tiles = {(c.BLOCK_N, c.BLOCK_K) for c in candidates(dw, HOPPER)}
    assert tiles >= {(128, 256), (256, 128), (128, 128), (64, 256)}
    assert tried(dw, "warp_specialize") == {True, False}
    assert tried(dw, "use_tma_load_x") == tried(dw, "use_tma_store") == {True, False}


def test_what_makes_no_difference_is_not_tried():
    for flags in ((), ("bias",)):
        problem = make_problem("forward", "bfloat16", 128, 1536, 2048, 1024, flags)
        # Only loops that are not flattened can halve tails.
        plain = [c for c in candidates(problem, HOPPER) if not c.to_dict()["tail_tiles"]]
        pairs = len(plain) - len({replace(config, flatten=False) for config in plain})
        assert (pairs > 0) == ("bias" not in flags)
