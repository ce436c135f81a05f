# SPDX-License-Identifier: Apache-2.0
"""A launch gets a given, tuned, shipped or computed configuration. Computed ones fit every GPU."""

import itertools
import json
from dataclasses import replace
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ops.configs import cache, choose
from moe_ops.configs.device import KNOWN_GPUS, Device
from moe_ops.configs.footprint import fitting, shared_memory
from moe_ops.configs.heuristics import heuristic
from moe_ops.configs.kernel_config import (
    PASSES,
    KernelConfigBackward_dX,
    KernelConfigForward,
)
from moe_ops.configs.kernel_string import kernel_config
from moe_ops.configs.problem import ROWS_BUCKETS, Problem, rows_bucket
from testing.problem_keys import make_problem, with_words

KIB = 1024
DEVICES = {
    "64 KiB, sm_75": Device("a", (7, 5), 64 * KIB, 40),
    "99 KiB, sm_89": Device("b", (8, 9), 99 * KIB, 58),
    "164 KiB, sm_80": Device("c", (8, 0), 164 * KIB, 108),
    "227 KiB, sm_90": Device("d", (9, 0), 227 * KIB, 132),
    "227 KiB, sm_100": Device("e", (10, 0), 227 * KIB, 148),
    # There are no such GPUs. What is chosen for an architecture has to shrink with the memory.
    "64 KiB, sm_90": Device("f", (9, 0), 64 * KIB, 132),
    "48 KiB, sm_80": Device("g", (8, 0), 48 * KIB, 20),
}
HOPPER = DEVICES["227 KiB, sm_90"]
PROBLEM = make_problem("forward", "bfloat16", 8, 512, 256, 64, ("gather",))
DTYPES = ("bfloat16", "float16", "float32")


@pytest.fixture(autouse=True)
def _forgetful(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_OPS_CACHE_DIR", str(tmp_path))
    cache.forget()
    yield
    cache.forget()


def test_given_before_shipped_before_computed(monkeypatch):
    computed = heuristic(PROBLEM, HOPPER)
    given_config, table = KernelConfigForward(group_m=11), KernelConfigForward(group_m=12)
    assert choose.choose(PROBLEM, HOPPER, None).config == computed
    monkeypatch.setattr(choose, "shipped", lambda name: {PROBLEM.key: table})
    cache.forget()
    assert choose.choose(PROBLEM, HOPPER, None).config == table
    assert (
        choose.choose(PROBLEM, HOPPER, kernel_config(forward=given_config)).config == given_config
    )
    # A string for another pass says nothing about this one.
    other = kernel_config(backward_dX=KernelConfigBackward_dX())
    assert choose.choose(PROBLEM, HOPPER, other).config == table
    assert choose.choose(PROBLEM, HOPPER, kernel_config()).config == table


def test_a_shipped_table_is_read_by_architecture(tmp_path, monkeypatch):
    config = KernelConfigForward(group_m=5, num_stages=2)
    (tmp_path / "tables").mkdir()
    content = {"device": "Some GPU", "configs": {PROBLEM.key: config.to_dict()}}
    (tmp_path / "tables" / "sm_87.json").write_text(json.dumps(content))
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    choose.shipped.cache_clear()
    assert choose.shipped((8, 7)) == {PROBLEM.key: config}
    assert choose.shipped((9, 0)) == {}
    choose.shipped.cache_clear()


def test_all_gpus_of_an_architecture_get_the_shipped_configurations():
    """Whatever their names and their numbers of SMs, if they have the memory."""
    problem = make_problem("forward", "bfloat16", 128, 2048, 768, 1024)
    expected = choose.shipped((9, 0))[problem.key]
    for name in ("H100", "H100-PCIe", "H200", "GH200"):
        chosen = choose.choose(problem, KNOWN_GPUS[name])
        assert (chosen.config, chosen.source) == (expected, "shipped"), name
    fewer = Device("Some MIG slice", (9, 0), 227 * KIB, 60)
    assert choose.choose(problem, fewer).config == expected
    less = DEVICES["64 KiB, sm_90"]
    chosen = choose.choose(problem, less)
    assert chosen.source == "computed"
    assert shared_memory(chosen.config, problem, less) <= less.shared_memory
    assert choose.choose(problem, KNOWN_GPUS["B200"]).source == "computed"


def test_what_was_tuned_on_one_gpu_serves_that_gpu_alone():
    """Before what is shipped; another GPU of the architecture has its own file."""
    problem = make_problem("forward", "bfloat16", 128, 2048, 768, 1024)
    tuned = KernelConfigForward(group_m=11)
    cache.store(KNOWN_GPUS["H100"].name, {problem.key: tuned})
    chosen = choose.choose(problem, KNOWN_GPUS["H100"])
    assert (chosen.config, chosen.source) == (tuned, "tuned")
    assert choose.choose(problem, KNOWN_GPUS["H100-PCIe"]).source == "shipped"


def test_the_key_tells_problems_apart():
    assert PROBLEM.key == "forward bfloat16 E8 N512 D256 rows64 gather"
    assert (
        make_problem("backward_dW", "float16", 1, 2, 3, 4).key
        == "backward_dW float16 E1 N2 D3 rows4"
    )


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "bucket"),
    [(0, 8, 1), (1, 8, 1), (8, 8, 1), (9, 8, 8), (64, 8, 8), (65, 8, 32), (256, 8, 32)]
    + [
        (257, 8, 64),
        (513, 8, 176),
        (1409, 8, 512),
        (512, 1, 512),
        (513, 1, 1024),
        (1 << 30, 1, 1024),
    ]
    + [(5, 0, 8), (0, 0, 1)],
)
def test_rows_bucket(num_rows, num_experts, bucket):
    assert rows_bucket(num_rows, num_experts) == bucket


@given(st.integers(0, 2**40), st.integers(1, 4096))
def test_rows_bucket_is_the_range_of_the_mean(num_rows, num_experts):
    bucket = rows_bucket(num_rows, num_experts)
    mean = num_rows / num_experts
    assert bucket in ROWS_BUCKETS
    assert mean <= bucket or bucket == ROWS_BUCKETS[-1]
    assert all(mean > end for end in ROWS_BUCKETS if end < bucket)


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA H200", "nvidia_h200"),
        ("NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm4_80gb"),
        ("  Tesla  T4 ", "tesla_t4"),
        ("../../etc (x)", "etc_x"),
    ],
)
def test_table_name(device_name, name):
    assert cache.table_name(device_name) == name


def problems() -> list[Problem]:
    flags = [(), ("bias",), ("gather", "scale", "bias"), ("scatter", "scale"), ("scale", "dots")]
    return [
        make_problem(kind, dtype, 8, 512, 256, rows, chosen)
        for kind, dtype, rows, chosen in itertools.product(PASSES, DTYPES, ROWS_BUCKETS, flags)
    ]


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_heuristics_fit(device):
    for problem in problems():
        config = heuristic(problem, device)
        assert type(config) is PASSES[problem.kind]
        assert shared_memory(config, problem, device) <= device.shared_memory, problem
        assert config.num_stages >= 2, problem
        descriptors = [value for name, value in config.to_dict().items() if "use_tma" in name]
        assert device.has_tma or not any(descriptors), problem


@pytest.mark.parametrize("name", ["99 KiB, sm_89", "164 KiB, sm_80", "227 KiB, sm_90"])
def test_an_sm_holds_both_programs_of_few_rows(name):
    problem, device = replace(PROBLEM, rows=32), DEVICES[name]
    config = heuristic(problem, device)
    assert config.programs_per_sm == 2
    assert 2 * shared_memory(config, problem, device) <= device.shared_memory


def test_descriptors_are_used_where_there_are_some():
    for kind in PASSES:
        config = heuristic(make_problem(kind, "bfloat16", 8, 512, 256, 1024), HOPPER).to_dict()
        assert any(value for name, value in config.items() if "use_tma_load" in name), kind


@pytest.mark.parametrize("kind", PASSES)
def test_warps_are_specialized_on_hopper_where_no_row_is_gathered(kind):
    bare = make_problem(kind, "bfloat16", 128, 1536, 2048, 1024)
    assert heuristic(bare, HOPPER).warp_specialize
    others = [replace(bare, dtype="float32")]
    if kind != "backward_dW":
        for served in (("scatter",), ("scale",), ("bias",), ("scatter", "scale", "bias")):
            assert heuristic(with_words(bare, served), HOPPER).is_pingpong, served
        flags = ("gather", "dots")
        others += [replace(bare, rows=32), *(with_words(bare, (flag,)) for flag in flags)]
    for problem in others:
        assert not heuristic(problem, HOPPER).warp_specialize, problem
    for name in ("99 KiB, sm_89", "164 KiB, sm_80"):
        assert not heuristic(bare, DEVICES[name]).warp_specialize
    blackwell = replace(HOPPER, capability=(10, 0))
    assert not heuristic(bare, blackwell).warp_specialize


def test_two_programs_share_an_sm_where_rows_are_gathered():
    """They do on Hopper, but not for experts of few rows, which are bound by their weights."""
    gathered = make_problem("forward", "bfloat16", 128, 1536, 2048, 1024, ("gather",))
    for rows, programs in ((64, 1), (512, 1), (1024, 2)):
        assert heuristic(replace(gathered, rows=rows), HOPPER).programs_per_sm == programs
    blackwell = replace(HOPPER, capability=(10, 0))
    assert heuristic(gathered, blackwell).programs_per_sm == 1
    assert heuristic(replace(gathered, kind="backward_dX"), HOPPER).programs_per_sm == 1


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64])
def test_blocks_are_no_wider_than_the_rank_of_lora(kind, rank):
    for sides in ((rank, 2048), (1536, rank)):
        config = heuristic(
            replace(PROBLEM, kind=kind, out_features=sides[0], in_features=sides[1]), HOPPER
        )
        widths = (config.BLOCK_N, config.BLOCK_K)
        blocks = dict(zip(sides, widths, strict=True))
        assert blocks.pop(rank) == max(16, 1 << (rank - 1).bit_length())
        assert next(iter(blocks.values())) >= 32


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("memory", [0, 1025, 4 * KIB, 16 * KIB, 48 * KIB, 99 * KIB, 227 * KIB])
def test_fitting_ends_and_only_shrinks(kind, memory):
    device = Device("x", (9, 0), memory, 1)
    blocks = itertools.product((16, 64, 256), repeat=3)
    for (m, n, k), stages, dtype in itertools.product(blocks, (1, 2, 8), DTYPES):
        given_config = PASSES[kind](BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_stages=stages)
        problem = make_problem(kind, dtype, 1, 512, 512, 64)
        config = fitting(given_config, problem, device)
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_stages"):
            assert getattr(config, name) <= getattr(given_config, name)
        smallest = (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K) == (16, 16, 16)
        assert smallest or shared_memory(config, problem, device) <= memory
        if shared_memory(given_config, problem, device) <= memory:
            assert config == given_config
