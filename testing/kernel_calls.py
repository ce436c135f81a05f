# SPDX-License-Identifier: Apache-2.0
"""Calls every Triton launcher on meta tensors, which have sizes and no memory.

T tokens, K top_k, R = T * K rows, E experts, N out_features, D in_features.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ops._triton import dequantize
from moe_ops._triton import expert_parallel as ep
from moe_ops._triton.routing import routing_indices
from moe_ops.ops.fused_experts import triton as fused_experts
from moe_ops.ops.fused_experts_lora import triton as adapted
from moe_ops.ops.grouped_gemm import triton as gemm
from moe_ops.ops.permute import triton as permute
from moe_ops.ops.topk_routing import triton as topk_routing
from moe_ops.ops.unpermute import triton as unpermute
from moe_ops.quantization import storage
from moe_ops.quantization.formats import FORMATS
from moe_ops.quantization.stored import StoredWeight

Call = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call. The defaults are those of Qwen3-30B-A3B."""

    num_tokens: int = 8192
    top_k: int = 8
    num_experts: int = 128
    out_features: int = 1536
    in_features: int = 2048


SIZES = {
    "training": Sizes(),
    "long": Sizes(num_tokens=65536),
    "decode-1": Sizes(num_tokens=8),
    "decode-8": Sizes(num_tokens=128),
    "decode-32": Sizes(num_tokens=512),
    "prefill-64": Sizes(num_tokens=1024),
    "prefill-128": Sizes(num_tokens=2048),
    # LoRA's two products beside the up projection.
    "lora-A": Sizes(out_features=16),
    "lora-B": Sizes(in_features=16),
    # Rows that no descriptor reads and no vector instruction spans.
    "uneven": Sizes(out_features=1533, in_features=2043),
}


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def grouped_gemm(
    sizes: Sizes,
    dtype: torch.dtype,
    *,
    permute_x: bool = False,
    permute_y: bool = False,
    weights: bool = False,
    bias: bool = False,
    transposed: bool = False,
    kernel_config: str | None = None,
) -> dict[str, Call]:
    """Return the forward and each backward of one call, by name."""
    rows = sizes.num_tokens * sizes.top_k
    shape = (sizes.num_experts, sizes.out_features, sizes.in_features)
    x = _empty(sizes.num_tokens if permute_x else rows, sizes.in_features, dtype=dtype)
    weight = _empty(*shape, dtype=dtype)
    if transposed:
        weight = _empty(shape[0], shape[2], shape[1], dtype=dtype).transpose(1, 2)
    counts, gather = _empty(sizes.num_experts), _empty(rows)
    scale = _empty(sizes.num_tokens, sizes.top_k, dtype=torch.float32) if weights else None
    biases = _empty(*shape[:2], dtype=dtype) if bias else None
    grad = _empty(rows, sizes.out_features, dtype=dtype)
    flags = (sizes.top_k, permute_x, permute_y)
    routing = (counts, gather, scale)

    def dx(dots: bool) -> Call:
        needs = [True, dots]
        return lambda: gemm.grouped_gemm_dx(
            grad, weight, *routing, x, biases, *flags, needs, kernel_config
        )

    calls: dict[str, Call] = {
        "forward": lambda: gemm.grouped_gemm(x, weight, *routing, biases, *flags, kernel_config),
        "dx": dx(False),
        "dw": lambda: gemm.grouped_gemm_dw(
            grad, x, *routing, *flags, [True, bias], transposed, kernel_config
        ),
    }
    return {**calls, "dx-dots": dx(True)} if weights else calls


def stored_weight(
    format: str, shape: tuple[int, int, int], scale_encoding: str | None = None
) -> StoredWeight:
    """Return a quantised weight without memory."""
    layout = storage.layout_of("kernel_calls", format, shape, scale_encoding=scale_encoding)
    tensors = storage.empty(layout, "meta").tensors
    names = ("codes", "scale", "nested_scale", "nested_offset")
    stored: list[Any] = [tensors.get(name) for name in names]
    return StoredWeight._make((*stored, format, layout.group_size, layout.scale_encoding, shape[2]))


def quantized_gemm(
    sizes: Sizes,
    dtype: torch.dtype,
    format: str,
    *,
    permute_x: bool = False,
    permute_y: bool = False,
    weights: bool = False,
    bias: bool = False,
    scale_encoding: str | None = None,
) -> dict[str, Call]:
    """Return the forward and the backward of one call, by name."""
    rows = sizes.num_tokens * sizes.top_k
    shape = (sizes.num_experts, sizes.out_features, sizes.in_features)
    weight = stored_weight(format, shape, scale_encoding)
    x = _empty(sizes.num_tokens if permute_x else rows, sizes.in_features, dtype=dtype)
    scale = _empty(sizes.num_tokens, sizes.top_k, dtype=torch.float32) if weights else None
    biases = _empty(*shape[:2], dtype=dtype) if bias else None
    grad = _empty(rows, sizes.out_features, dtype=dtype)
    routing = (_empty(sizes.num_experts), _empty(rows), scale)
    flags = (sizes.top_k, permute_x, permute_y)
    return {
        "forward": lambda: gemm.grouped_gemm(x, weight, *routing, biases, *flags),
        "dx": lambda: gemm.grouped_gemm_dx(
            grad, weight, *routing, x, biases, *flags, [True, weights]
        ),
    }


def dequantize_weight(sizes: Sizes, dtype: torch.dtype, format: str) -> dict[str, Call]:
    """Return the call for each encoding of scales that the format has, by its name."""
    shape = (sizes.num_experts, sizes.out_features, sizes.in_features)
    return {
        scale.name: functools.partial(
            dequantize.dequantize_weight, *stored_weight(format, shape, scale.name), dtype
        )
        for scale in FORMATS[format].scales
    }


def experts(
    sizes: Sizes,
    dtype: torch.dtype,
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    activation_limit: float | None = None,
    weights_before: bool = False,
    bias: bool = False,
    transposed: bool = False,
    recompute: str = "none",
    kernel_config: str | None = None,
    format: str | None = None,
) -> dict[str, Call]:
    """Return the calls of fused_experts. The sizes are those of its up projection.

    With a format its weights are quantised, and have no gradient.
    """
    num_tokens, top_k, num_experts = sizes.num_tokens, sizes.top_k, sizes.num_experts
    width, hidden = sizes.out_features, sizes.in_features
    inner = width // 2 if gated else width
    width = 2 * inner if gated else inner

    def matrices(rows: int, columns: int) -> Tensor | StoredWeight:
        if format is not None:
            return stored_weight(format, (num_experts, rows, columns))
        if transposed:
            return _empty(num_experts, columns, rows, dtype=dtype).transpose(1, 2)
        return _empty(num_experts, rows, columns, dtype=dtype)

    x = _empty(num_tokens, hidden, dtype=dtype)
    up, down = matrices(width, hidden), matrices(hidden, inner)
    weights = _empty(num_tokens, top_k, dtype=torch.float32)
    biases: list[Any] = [
        _empty(num_experts, n, dtype=dtype) if bias else None for n in (width, hidden)
    ]
    flags: tuple[Any, ...] = (activation, gated, interleaved, activation_limit, weights_before)
    ids = _empty(num_tokens, top_k)
    forward: tuple[Any, ...] = (
        x, up, down, ids, weights, *biases, *flags, recompute, kernel_config,
    )  # fmt: skip
    rows = [_empty(num_tokens * top_k) for _ in range(2)]
    z = _empty(num_tokens * top_k, width, dtype=dtype) if recompute == "none" else None
    routing = (_empty(num_experts), *rows)
    down_backward: tuple[Any, ...] = (
        x, x, up, down, weights, *biases, z, *routing, *flags,
        [True, format is None, not weights_before, bias], transposed, kernel_config,
    )  # fmt: skip
    dz = _empty(num_tokens * top_k, width, dtype=dtype)
    up_backward: tuple[Any, ...] = (
        dz, x, up, weights if weights_before else None, *routing, top_k,
        [True, format is None, weights_before, bias], transposed, kernel_config,
    )  # fmt: skip
    return {
        "inference": lambda: fused_experts.fused_experts(*forward),
        "forward": lambda: fused_experts.fused_experts(*forward, for_backward=True),
        "backward": lambda: (
            fused_experts.fused_experts_down_backward(*down_backward),
            fused_experts.fused_experts_up_backward(*up_backward),
        ),
    }  # fmt: skip


def adapted_experts(
    sizes: Sizes,
    dtype: torch.dtype,
    *,
    ranks: tuple[int, int] = (16, 16),
    interleaved: bool = False,
    bias: bool = False,
) -> dict[str, Call]:
    """Return the calls of fused_experts_lora. The sizes are those of its up projection."""
    num_tokens, top_k, num_experts = sizes.num_tokens, sizes.top_k, sizes.num_experts
    inner, hidden = sizes.out_features // 2, sizes.in_features
    width, num_rows = 2 * inner, num_tokens * top_k

    def matrices(*shape: int) -> Tensor:
        return _empty(num_experts, *shape, dtype=dtype)

    x = _empty(num_tokens, hidden, dtype=dtype)
    projections = matrices(width, hidden), matrices(hidden, inner)
    weights = _empty(num_tokens, top_k, dtype=torch.float32)
    up_rank, down_rank = ranks
    adapters = (
        matrices(up_rank, hidden), matrices(width, up_rank), matrices(down_rank, inner),
        matrices(hidden, down_rank),
    )  # fmt: skip
    up_bias, down_bias = (matrices(n) if bias else None for n in (width, hidden))
    flags = ("silu", True, interleaved, None)
    forward: tuple[Any, ...] = (
        x, *projections, _empty(num_tokens, top_k), weights, *adapters, up_bias, down_bias, *flags,
    )  # fmt: skip
    kept = (_empty(num_rows, n, dtype=dtype) for n in (width, up_rank, down_rank))
    routing = (_empty(num_experts), _empty(num_rows), _empty(num_rows))
    backward: tuple[Any, ...] = (
        x, x, *projections, weights, *adapters, down_bias, *kept, *routing, *flags, [True] * 6,
    )  # fmt: skip
    return {
        "lora-inference": lambda: adapted.fused_experts_lora(*forward),
        "lora-forward": lambda: adapted.fused_experts_lora(*forward, for_backward=True),
        "lora-backward": lambda: adapted.fused_experts_lora_backward(*backward),
    }


def routing(sizes: Sizes, dtype: torch.dtype) -> Iterator[Call]:
    """Yield calls of the ops that route and move rows, with each flag at least once."""
    num_tokens, top_k, num_experts = sizes.num_tokens, sizes.top_k, sizes.num_experts
    ids, rows = _empty(num_tokens, top_k), _empty(num_tokens * top_k)
    tokens = _empty(num_tokens, sizes.in_features, dtype=dtype)
    moved = _empty(num_tokens * top_k, sizes.in_features, dtype=dtype)
    logits = _empty(num_tokens, num_experts, dtype=dtype)
    weights = _empty(num_tokens, top_k, dtype=torch.float32)
    selection_bias = _empty(num_experts, dtype=torch.float32)
    call = functools.partial
    # One warp sorts the fewest slots, one program those of some more tokens.
    for some in (ids, ids[:8], ids[:64]):
        yield call(routing_indices, some, num_experts)
    yield call(permute.permute, tokens, rows, top_k)
    yield call(unpermute.unpermute, moved, rows, None, top_k)
    yield call(unpermute.unpermute, moved, rows, weights, top_k)
    yield call(
        unpermute.unpermute_backward, tokens, moved, rows, weights, top_k, None, [True, True]
    )
    yield call(topk_routing.topk_routing, logits, top_k)
    for group_score in ("max", "top2_sum"):
        yield call(
            topk_routing.topk_routing,
            logits, top_k, selection_bias, "sigmoid", True, True, 8, 4, group_score, 2.5,
        )  # fmt: skip
    for function, before in (("softmax", True), ("softmax", False), ("sigmoid", True)):
        yield call(
            topk_routing.topk_routing_backward, weights, logits, ids, function, before, True, 1.0
        )


def expert_parallel(
    sizes: Sizes, dtype: torch.dtype, world_size: int = 8, push: bool = False
) -> dict[str, Call]:
    """Return the launches of ep_dispatch and ep_combine, by name; with `push` through a pool."""
    num_tokens, hidden = sizes.num_tokens, sizes.in_features
    of_call = ep.Sizes(sizes.num_experts, world_size, num_tokens, sizes.top_k)
    shape = (of_call.num_rows, of_call.columns)
    tokens, rows = (_empty(n, hidden, dtype=dtype) for n in (num_tokens, of_call.num_rows))
    ids, weights = _empty(num_tokens, sizes.top_k), _empty(num_tokens, sizes.top_k, dtype=dtype)
    local = (_empty(*shape), _empty(*shape, dtype=dtype))
    places, senders = _empty(num_tokens, sizes.top_k), _empty(of_call.num_rows)
    window = ep.Window(
        _empty(world_size, dtype=torch.int64), _empty(1), 1 << 30, (1 << 30) - 256, 1
    )
    layout = ep.Layout.of(rows.nbytes, local[0].nbytes, local[1].nbytes)
    where: dict[str, Any] = {"window": window} if push else {}
    in_turn: tuple[Any, ...] = (world_size, num_tokens)
    call = functools.partial
    calls: dict[str, Call] = {
        "place": call(
            ep.place_slots, ids, weights, of_call,
            tuple(t.view(world_size, -1) for t in local),
            layout=layout if push else None, **where,
        ),
        "invert": call(ep.invert_places, places, of_call),
        "send tokens": call(
            ep.send_rows, tokens, world_size, num_tokens, to=rows, senders=senders, **where
        ),
        "sum": call(ep.sum_over_ranks, rows, places, of_call, **where),
        "take": call(ep.take_values, local[1], places, of_call, **where),
    }  # fmt: skip
    if push:
        calls |= {
            "begin": call(ep.begin_exchange, window, layout.end, num_tokens),
            "send filled rows": call(ep.send_rows, rows, *in_turn, ids=local[0], window=window),
            "send weights": call(
                ep.send_rows, local[1].view(world_size, -1), world_size, 1, window=window,
                offset=layout.weights,
            ),
            "send gradients": call(
                ep.send_rows, tokens, *in_turn, to=rows, senders=senders, window=window,
                flags=layout.ids,
            ),
            "receive": call(ep.receive_rows, rows, of_call, window, layout, local),
            "receive gradients": call(ep.receive_rows, rows, of_call, window, layout),
        }  # fmt: skip
    return calls
