# SPDX-License-Identifier: Apache-2.0
"""The shapes that the sweep draws."""

import math

import pytest

from benchmarks.draws import EXPERTS, GB, MOST_SLOTS, TOKENS, WIDTHS, draw_shapes, num_bytes
from benchmarks.suite import NAMED, SUITE, Shape

LIMIT = 60 * GB


@pytest.mark.parametrize("seed", range(4))
def test_every_draw_is_within_bounds(seed):
    draws, _ = draw_shapes(seed, 200, LIMIT)
    assert len(draws) == 200
    for shape in (draw.shape for draw in draws):
        for width in (shape.hidden_size, shape.intermediate_size):
            assert width % 8 == 0
            assert WIDTHS[0] <= width <= WIDTHS[1]
        assert EXPERTS[0] <= shape.num_experts <= EXPERTS[1]
        assert TOKENS[0] <= shape.num_tokens <= TOKENS[1]
        assert 1 <= shape.top_k <= min(MOST_SLOTS, shape.num_experts)
        assert num_bytes(shape) <= LIMIT
        assert not shape.is_gpt_oss
    assert len({draw.shape.name for draw in draws}) == 200
    assert [draw.routing for draw in draws] == ["uniform", "zipf"] * 100


def test_a_seed_names_its_shapes():
    first, again = draw_shapes(7, 48, LIMIT), draw_shapes(7, 48, LIMIT)
    assert first == again
    assert draw_shapes(7, 12, LIMIT)[0] == first[0][:12]
    others = [draw.shape for draw in draw_shapes(8, 48, LIMIT)[0]]
    assert not set(others) & {draw.shape for draw in first[0]}


def test_the_draws_do_not_change():
    """Another machine has to measure the same shapes."""
    draws, repeated = draw_shapes(0, 3, LIMIT)
    assert [draw.shape for draw in draws] == [
        Shape("0/00", 1076, 4776, 3544, 21, 6),
        Shape("0/01", 3597, 1040, 3872, 11, 6),
        Shape("0/02", 16920, 5960, 1472, 10, 7),
    ]
    assert repeated == []


def test_what_exceeds_the_limit_is_drawn_again_and_listed():
    limit = 2 * GB
    draws, repeated = draw_shapes(0, 48, limit)
    free, none = draw_shapes(0, 48 + len(repeated), math.inf)
    assert none == []
    large = [draw.shape for draw in free if num_bytes(draw.shape) > limit]
    assert len(repeated) == len(large) > 10
    # The generator goes on where a draw was refused.
    kept = [draw.shape for draw in free if num_bytes(draw.shape) <= limit]
    assert [shape.hidden_size for shape in kept] == [d.shape.hidden_size for d in draws]
    assert repeated[0] == "0/00 T 1076 H 4776 I 3544 E 21 K 6: 5 GB"
    assert [draw.routing for draw in draws] == ["uniform", "zipf"] * 24


def test_sizes_are_log_uniform_and_slots_uniform():
    shapes = [draw.shape for draw in draw_shapes(1, 2000, math.inf)[0]]
    for low, high, sizes in (
        (*WIDTHS, [shape.hidden_size for shape in shapes]),
        (*WIDTHS, [shape.intermediate_size for shape in shapes]),
        (*EXPERTS, [shape.num_experts for shape in shapes]),
        (*TOKENS, [shape.num_tokens for shape in shapes]),
    ):
        below = sum(size < math.sqrt(low * high) for size in sizes) / len(sizes)
        assert 0.45 < below < 0.55
    of_many = [shape.top_k for shape in shapes if shape.num_experts >= MOST_SLOTS]
    for top_k in range(1, MOST_SLOTS + 1):
        assert 0.07 < of_many.count(top_k) / len(of_many) < 0.13


def test_bytes_of_a_step():
    shape = Shape("", 10, 8, 16, 4, 2)
    weights, tokens, rows = 4 * 3 * 8 * 16, 10 * 8, 20
    # x, output and their gradients; rows of 8 before and after, of 32 and 16 between.
    assert num_bytes(shape) == 2 * (2 * weights + 4 * tokens + rows * (8 + 32 + 16 + 8))


def test_named_shapes_have_names_of_their_own():
    names = [shape.name for shape in (*NAMED, *SUITE)]
    assert len(set(names)) == len(names)
    assert [shape.name for shape in NAMED if shape.is_gpt_oss] == ["gpt-oss-120b biases"]
