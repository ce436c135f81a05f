# SPDX-License-Identifier: Apache-2.0
"""Checks values against the oracle and by their norms, and errors on every kind of tensor."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from testing import oracle
from testing.strategies import Sample
from testing.tolerances import DECIDED_GAP, RELATIVE_NORM, ROUNDED_OTHERWISE


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new memory with NaN, or with the largest integer, until something is written to it."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@contextlib.contextmanager
def fp8_can_be_compared() -> Iterator[None]:
    """Let torch.allclose take FP8 tensors. opcheck finds arguments that were written to with it."""
    original = torch.allclose

    def allclose(input: Tensor, other: Tensor, *args: Any, **kwargs: Any) -> bool:
        if input.dtype == other.dtype == torch.float8_e4m3fn:
            return torch.equal(input.view(torch.uint8), other.view(torch.uint8))
        return original(input, other, *args, **kwargs)

    with mock.patch.object(torch, "allclose", allclose):
        yield


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    what: str = "values",
) -> None:
    """Hold ||actual - expected|| within the tolerance of `dtype`, by default actual's.

    The tolerance is relative to ||expected||, or to ||scale|| where that is larger. A sum that may
    cancel has the size of its terms for its scale.
    """
    assert tuple(actual.shape) == tuple(expected.shape), what
    error = (actual.detach().double() - expected.detach().double()).norm().item()
    reference = expected.detach().double().norm().item()
    if scale is not None:
        reference = max(reference, scale.detach().double().norm().item())
    limit = RELATIVE_NORM[dtype or actual.dtype] * reference
    assert error <= limit, f"{what}: ||error|| {error:.3g}, allowed {limit:.3g}"


def assert_rows_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """Hold every row (last dimension) by itself, so that one wrong row of many shows."""
    assert actual.shape == expected.shape, what
    if expected.shape[-1] < 16:
        # A row of a few sums that may cancel has no size to compare with. All rows together have.
        assert_close(actual, expected, dtype=dtype, what=what)
        return
    error = (actual.double() - expected).norm(dim=-1)
    # Rows that nearly cancel are as exact as their neighbours, not as their own small norm.
    norms = expected.norm(dim=-1)
    present = norms[norms > 0]
    typical = present.mean() if present.numel() else norms.sum()
    limit = RELATIVE_NORM[dtype] * torch.maximum(norms, torch.where(norms > 0, typical, norms))
    wrong = ~(error <= limit)
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} rows are wrong, the first at "
        f"{wrong.nonzero()[0].tolist()}: ||error|| {error[wrong][0]:.3g}, "
        f"allowed {limit[wrong][0]:.3g}"
    )


def assert_rounded_once(actual: Tensor, expected: Tensor) -> None:
    """Hold values that were rounded once, to actual's dtype, against those before the rounding."""
    assert actual.shape == expected.shape
    if actual.dtype == torch.float32:
        assert_close(actual, expected)
    else:
        differ = actual != expected.to(actual.dtype)
        assert differ.double().mean() < ROUNDED_OTHERWISE


def coarser(*dtypes: torch.dtype) -> torch.dtype:
    return max(dtypes, key=RELATIVE_NORM.__getitem__)


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def assert_matches_oracle(sample: Sample, outputs: Any) -> None:
    """Hold the outputs of `sample`'s op against the oracle."""
    if sample.schema.name == "topk_routing":
        _assert_topk_routing(sample.arguments, *outputs)
        return
    name, arguments = oracle.plain_call(sample.schema.name, sample.arguments)
    expected = as_tuple(getattr(oracle, name)(**arguments))
    gaps = oracle.unspecified(name, expected)
    expected = oracle.without_weight(sample.schema.name, expected)
    gaps = oracle.without_weight(sample.schema.name, gaps)
    scales = oracle.without_weight(sample.schema.name, as_tuple(_scale(sample)))
    for declared, got, want, scale, gap in zip(
        sample.schema.outputs, as_tuple(outputs), expected, scales, gaps, strict=True
    ):
        assert got is not None
        what = f"{sample}: {declared.name}"
        if want is None:
            assert got.numel() == 0, f"{what}: not asked for"
        elif want.is_floating_point():
            # A sum over bf16 rows that comes out as fp32 is no better than its rows.
            first = next(iter(sample.arguments.values()))
            dtype = coarser(got.dtype, first.dtype) if first.is_floating_point() else got.dtype
            dtype = got.dtype if name == "topk_routing_backward" else dtype
            assert got.shape == want.shape, what
            sides = [got, want, scale]
            if gap is not None:
                sides = [side.masked_fill(gap, 0.0) for side in sides]
            assert_close(*sides[:2], dtype=dtype, scale=sides[2], what=what)
        else:
            assert got.tolist() == want.tolist(), what


def _scale(sample: Sample) -> Any:
    """Return the size of the terms that each output is a sum of: the op of absolute values."""
    name, arguments = oracle.plain_call(sample.schema.name, sample.arguments)
    if name == "topk_routing_backward":
        return arguments["grad_topk_weights"] * arguments["scaling_factor"]
    if name == "dequantize_weight":
        return None
    return getattr(oracle, name)(**_sizes(arguments))


def _sizes(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call whose terms are all positive, without an activation limit."""
    sizes = {
        # FP8 tensors have no abs().
        name: oracle.to_fp64(value).abs()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
    return {**sizes, "activation_limit": None} if "activation_limit" in sizes else sizes


def fits_fp16(sample: Sample) -> bool:
    """Return whether the oracle's results are within fp16's range."""
    name, arguments = oracle.plain_call(sample.schema.name, sample.arguments)
    results = as_tuple(getattr(oracle, name)(**arguments))
    floating = [t for t in results if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
    return all(t.abs().max() <= torch.finfo(torch.float16).max for t in floating)


def is_decided(sample: Sample) -> bool:
    """Return whether rounding cannot move an activation of `sample` over a kink, to another slope."""
    _, arguments = oracle.plain_call(sample.schema.name, sample.arguments)
    if "activation_limit" not in arguments or arguments.get("pre_activation") is not None:
        # No kinks, or at values that are given.
        return True
    limit, kinks = arguments["activation_limit"], [0.0] if "relu" in arguments["activation"] else []
    kinks += [] if limit is None else [limit, -limit]
    found, size = (_pre_activation(call) for call in (arguments, _sizes(arguments)))
    margin = RELATIVE_NORM[next(iter(sample.arguments.values())).dtype] * size
    # Rows of dropped slots are zero, of size zero.
    return not any(((found - kink).abs() < margin).any() for kink in kinks)


def _pre_activation(arguments: dict[str, Any]) -> Tensor:
    if "gate_up_lora_a" in arguments:
        return oracle.fused_experts_lora_forward(**arguments)[1]
    if "topk_ids" in arguments:
        return oracle.fused_experts_forward(**{**arguments, "recompute": "none"})[1]
    names = [
        "gate_up_proj", "down_proj", "topk_weights", "gate_up_bias", "down_bias", "token_counts",
        "gather_indices", "activation", "gated", "interleaved", "activation_limit",
        "weights_before",
    ]  # fmt: skip
    x = arguments["hidden_states"]
    x = torch.zeros_like(arguments["grad_output"]) if x is None else x
    return oracle.expert_layer(x, **{name: arguments[name] for name in names})[1]


def _assert_topk_routing(arguments: dict[str, Any], topk_weights: Tensor, topk_ids: Tensor) -> None:
    logits, bias = oracle.to_fp64(arguments["logits"], arguments["selection_bias"])
    groups = [arguments[name] for name in ("num_groups", "top_groups", "group_score")]
    function, before = arguments["score_function"], arguments["score_before_topk"]
    _, expected_ids = oracle.topk_routing(**arguments)
    for token, (got, want) in enumerate(zip(topk_ids.tolist(), expected_ids.tolist(), strict=True)):
        keys = oracle.selection_keys(logits[token], bias, function, before)
        gap = oracle.selection_gap(keys, arguments["top_k"], *groups)
        assert got == want or gap < DECIDED_GAP, f"token {token}: ids {got}, expected {want}"
        assert len(set(got)) == len(got), f"token {token}: ids {got} repeat"
    expected = oracle.routing_weights(
        logits, topk_ids, function, before, arguments["renormalize"], arguments["scaling_factor"]
    )
    assert_close(topk_weights, expected, what="topk_weights")


def oracle_gradients(sample: Sample, grad_output: Tensor) -> dict[str, Tensor]:
    """Return the oracle's gradient of every differentiable argument of `sample`."""
    name, arguments = oracle.plain_call(sample.schema.name, sample.arguments)
    function = getattr(oracle, name)
    return oracle.gradients(function, arguments, sample.differentiable(), grad_output)


def specified_gradient(sample: Sample, argument: str, gradient: Tensor) -> Tensor:
    """Return a gradient with zeros in the rows of which the op's contract says nothing."""
    if (sample.schema.name, argument) != ("ep_combine", "input"):
        return gradient
    return gradient.masked_fill(_rows_without_a_token(sample).to(gradient.device), 0.0)


# The outputs, or the gradients behind them, of which the contract leaves rows open.
_WITH_GAPS = {"ep_dispatch": 0, "ep_combine_backward": 0, "ep_combine": 1}


def specified(sample: Sample, results: Any) -> tuple[Any, ...]:
    """Return outputs, and gradients if there are any, with zeros where the contract is silent."""
    found = list(as_tuple(results))
    index = _WITH_GAPS.get(sample.schema.name, len(found))
    if index < len(found):
        gaps = _rows_without_a_token(sample).to(found[index].device)
        found[index] = found[index].masked_fill(gaps, 0.0)
    return tuple(found)


def has_gaps(sample: Sample) -> bool:
    """Return whether the contract leaves rows of the op's outputs, or of gradients, open."""
    return sample.schema.name in _WITH_GAPS and bool(_rows_without_a_token(sample).any())


def _rows_without_a_token(sample: Sample) -> Tensor:
    """Return which of the rows (W * C, 1) that ranks send hold no token."""
    sizes = [sample.arguments[name] for name in ("num_experts", "world_size", "capacity")]
    if sample.schema.name == "ep_dispatch":
        places = oracle.sent_slots(sample.arguments["topk_ids"], *sizes)
    else:
        places = sample.arguments["sent_slots"]
    return ~oracle.filled_rows(places, *sizes)[:, None]


def assert_rejects(
    error: type[Exception],
    texts: tuple[str, ...],
    function: Callable[..., Any],
    arguments: dict[str, Any],
) -> str:
    """Check that `function` raises `error` with every one of `texts`, and return its text.

    The text is the same in eager mode, on fake tensors and on meta tensors.
    """

    def moved(convert: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return {
            name: convert(value) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }

    with pytest.raises(error) as eager:
        function(**arguments)
    for text in texts:
        assert text in str(eager.value)

    mode = FakeTensorMode()
    with mode, pytest.raises(error) as fake:
        function(**moved(mode.from_tensor))
    assert str(fake.value) == str(eager.value)

    with pytest.raises(error) as meta:
        function(**moved(lambda tensor: tensor.to("meta")))
    assert str(meta.value).replace("meta", "cpu") == str(eager.value)
    return str(eager.value)


def gradient_scales(sample: Sample, grad_output: Tensor) -> dict[str, Tensor]:
    """Return the size of the terms that each gradient is a sum of."""
    if sample.schema.name == "topk_routing":
        return {"logits": grad_output * sample.arguments["scaling_factor"]}
    name, arguments = oracle.plain_call(sample.schema.name, sample.arguments)
    function, sizes = getattr(oracle, name), _sizes(arguments)
    return oracle.gradients(function, sizes, sample.differentiable(), grad_output.abs())
