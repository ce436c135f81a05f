# SPDX-License-Identifier: Apache-2.0
"""Which measured problem is the nearest, and when none is near enough."""

import math
from dataclasses import replace

import pytest

from moe_ops.configs import choose
from moe_ops.configs.device import KNOWN_GPUS, Device
from moe_ops.configs.footprint import shared_memory
from moe_ops.configs.heuristics import heuristic
from moe_ops.configs.kernel_config import KernelConfig, KernelConfigForward
from moe_ops.configs.neighbour import MAX_DISTANCE, distance, nearest
from moe_ops.configs.problem import Operands, problem_of
from testing.problem_keys import make_problem, with_words

H100 = KNOWN_GPUS["H100"]
SHIPPED = choose.shipped((9, 0))
BARE = make_problem("forward", "bfloat16", 64, 2048, 1024, 1024)


@pytest.fixture(autouse=True)
def _nothing_tuned(monkeypatch):
    monkeypatch.setenv("MOE_OPS_AUTOTUNE", "0")
    monkeypatch.delenv("MOE_OPS_NEIGHBOURS", raising=False)
    choose.forget()
    yield
    choose.forget()


def table(*keys: str) -> dict[str, KernelConfig]:
    return {key: KernelConfigForward(group_m=1 + index) for index, key in enumerate(keys)}


def test_the_distance_is_between_logarithms():
    wider = replace(BARE, out_features=4 * 2048)
    assert distance(BARE, wider) == distance(wider, BARE) == MAX_DISTANCE
    assert distance(BARE, replace(BARE, out_features=4096, in_features=512)) == math.sqrt(2)
    assert distance(BARE, replace(BARE, num_experts=8)) == 0
    assert distance(replace(BARE, out_features=0), BARE) == math.log2(2048)


def test_the_nearest_wins():
    near = "forward bfloat16 E8 N3072 D1024 rows1024"
    far = "forward bfloat16 E8 N2048 D2048 rows1024"
    assert nearest(BARE, table(far, near), H100) == near
    assert nearest(BARE, table(far), H100) == far


def test_of_equally_near_ones_the_number_of_experts_decides():
    keys = [f"forward bfloat16 E{experts} N4096 D1024 rows1024" for experts in (8, 128, 512)]
    assert nearest(BARE, table(*keys), H100) == keys[1]


@pytest.mark.parametrize(
    "key",
    [
        "forward bfloat16 E64 N8192 D1024 rows1024",  # four times as wide
        "forward bfloat16 E64 N4096 D4096 rows1024",
        "forward bfloat16 E64 N2048 D1024 rows512",
        "forward bfloat16 E64 N2048 D1024 rows1024 bias",
        "forward bfloat16 E64 N2048 D1024 rows1024 gather gated",
        "forward float32 E64 N2048 D1024 rows1024",
        "backward_dX bfloat16 E64 N2048 D1024 rows1024",
        "forward bfloat16 E64 N2040 D1024 rows1024",  # pointers read its rows in no vectors
    ],
)
def test_what_is_no_neighbour(key):
    assert nearest(BARE, table(key), H100) is None


def test_elements_of_16_bits_are_alike():
    near = "forward float16 E64 N2048 D2048 rows1024"
    assert nearest(BARE, table(near), H100) == near


def test_a_configuration_that_does_not_fit_is_passed_over():
    keys = [f"forward bfloat16 E64 N{width} D1024 rows1024" for width in (2304, 4096)]
    configs = {
        keys[0]: KernelConfigForward(128, 256, 64, 8, 3, use_tma_store=True),
        keys[1]: KernelConfigForward(64, 64, 32, 4, 2),
    }
    assert nearest(BARE, configs, H100) == keys[0]
    small = Device("small", (9, 0), 64 * 1024, 132)
    assert shared_memory(configs[keys[0]], BARE, small) > small.shared_memory
    assert nearest(BARE, configs, small) == keys[1]


@pytest.mark.parametrize("key", SHIPPED)
def test_a_key_tells_its_problem(key):
    assert problem_of(key).key == key


@pytest.mark.parametrize(
    "key",
    ["", "forward", "forward bfloat16 E8 N1 D2", "forward bfloat16 E8 N1 D2 rows3 fast"]
    + [
        "forward bfloat16 E8 N1 D2 rows3 bias gather",
        "backward_dW bfloat16 E8 N1 D2 rows3 gated x",
    ],
)
def test_what_is_no_key(key):
    with pytest.raises(ValueError, match="expected the key of a problem"):
        problem_of(key)


# deepseek-v2-lite's, between those of olmoe and of large.
UP = make_problem("forward", "bfloat16", 64, 2816, 2048, 1024, ("gather", "gated"))
OLMOE = "forward bfloat16 E64 N2048 D2048 rows1024 gather gated"


def test_a_neighbour_is_chosen_before_the_rules(monkeypatch):
    chosen = choose.choose(UP, H100)
    assert (chosen.source, chosen.neighbour) == ("neighbour", OLMOE)
    assert chosen.config == SHIPPED[OLMOE]
    monkeypatch.setenv("MOE_OPS_NEIGHBOURS", "0")
    # What was chosen holds until forget().
    assert choose.choose(UP, H100) == chosen
    choose.forget()
    computed = choose.choose(UP, H100)
    assert (computed.source, computed.neighbour) == ("computed", None)
    assert computed.config == heuristic(UP, H100)


def test_what_no_neighbour_is_chosen_for():
    assert choose.choose(with_words(UP, ["gather", "bias", "gated"]), H100).source == "computed"
    assert choose.choose(UP, KNOWN_GPUS["B200"]).source == "computed"
    assert choose.choose(UP, H100, operands=Operands(b=False)).source == "computed"
    assert choose.choose(problem_of(OLMOE), H100).source == "shipped"


def test_the_plan_names_the_neighbour():
    pytest.importorskip("triton", exc_type=ImportError)
    from moe_ops._triton.plan import plan

    made = plan(UP, Operands(), H100)
    assert (made.source, made.neighbour) == ("neighbour", OLMOE)
    assert plan(problem_of(OLMOE), Operands(), H100).neighbour is None
