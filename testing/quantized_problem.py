# SPDX-License-Identifier: Apache-2.0
"""Makes quantised layers of experts and calls of grouped_gemm, beside the same with plain weights.

T num_tokens, H hidden_size, I intermediate_size, E num_experts, K top_k.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import moe_ops
from moe_ops import QuantizedWeight, quantize_weight
from moe_ops.quantization.formats import FORMATS
from moe_ops.quantization.storage import empty, layout_of
from testing import checks, experts_problem, gemm_problem, reference
from testing.on_device import assert_same_bits
from testing.tolerances import KINK_DISTANCE

# Each format, with each encoding of its scales and each size of its blocks.
KINDS = [
    (format, scale.name, group_size)
    for format, declared in FORMATS.items()
    for scale in declared.scales
    for group_size in declared.group_sizes
]

NUM_TOKENS, HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 9, 70, 40, 4, 2


@dataclass
class Experts:
    """Arguments of fused_experts by name. The floating tensors are leaves that require grad."""

    gate_up_proj: QuantizedWeight
    down_proj: QuantizedWeight
    leaves: dict[str, Tensor]
    others: dict[str, Any] = field(default_factory=dict)

    def __call__(self, plain: bool = False) -> Tensor:
        """Return fused_experts of the weights as they are, or of their values in the rows' dtype."""
        weights: list[Any] = [self.gate_up_proj, self.down_proj]
        if plain:
            dtype = self.leaves["hidden_states"].dtype
            weights = [values_of(weight, dtype) for weight in weights]
        names = ("hidden_states", "gate_up_proj", "down_proj")
        given = dict(zip(names, (self.leaves["hidden_states"], *weights), strict=True))
        return moe_ops.fused_experts(**{**given, **self.leaves, **self.others})

    def gradients(self, plain: bool = False) -> list[Tensor]:
        """Return the output and the gradient of each leaf."""
        output = self(plain)
        tangent = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
        return [output, *torch.autograd.grad(output, list(self.leaves.values()), tangent)]


def values_of(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight as the ops dequantise it for rows of this dtype."""
    return weight.dequantize(dtype)


def make_weights(
    format: str, down_format: str | None = None, seed: int = 0
) -> tuple[QuantizedWeight, QuantizedWeight]:
    """Return gate_up_proj (E, 2I, H) and down_proj (E, H, I)."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator) / 8
    down = torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) / 8
    return quantize_weight(up, format), quantize_weight(down, down_format or format)


def make_experts(
    format: str,
    dtype: torch.dtype = torch.float32,
    down_format: str | None = None,
    bias: bool = True,
    num_tokens: int = NUM_TOKENS,
    **others: Any,
) -> Experts:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    topk_ids = torch.randint(0, NUM_EXPERTS, (num_tokens, TOP_K), generator=generator)
    leaves = {
        "hidden_states": randn(num_tokens, HIDDEN),
        "topk_weights": torch.rand(num_tokens, TOP_K, generator=generator).requires_grad_(),
    }
    if bias:
        leaves["gate_up_bias"] = randn(NUM_EXPERTS, 2 * INTERMEDIATE)
        leaves["down_bias"] = randn(NUM_EXPERTS, HIDDEN)
    return Experts(
        *make_weights(format, down_format), leaves=leaves, others={"topk_ids": topk_ids, **others}
    )


class Layer(nn.Module):
    """A layer of quantised experts, with a grouped_gemm of the first weight beside it."""

    def __init__(self, format: str, seed: int = 0) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = make_weights(format, seed=seed)

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        counts, gather, _ = moe_ops.routing_indices(topk_ids, NUM_EXPERTS)
        rows = moe_ops.grouped_gemm(
            hidden_states, self.gate_up_proj, counts, gather, top_k=TOP_K, permute_x=True
        )
        output = moe_ops.fused_experts(
            hidden_states, self.gate_up_proj, self.down_proj, topk_ids, topk_weights
        )
        return output + rows.square().mean()


def stored(
    format: str, encoding: str, group_size: int, shape: tuple[int, int, int], seed: int = 0
) -> list[Any]:
    """Return the arguments of a weight of random bytes, whose scales are any but NaN."""
    generator = torch.Generator().manual_seed(seed)
    layout = layout_of("test", format, shape, group_size, encoding)
    tensors = {}
    for name, tensor in empty(layout).tensors.items():
        bits = torch.randint(0, 256, tensor.shape, generator=generator, dtype=torch.uint8)
        width = {"float32": 4, "bfloat16": 2}.get(encoding, 1) if name == "scale" else 4
        if name != "codes" and width > 1:
            # An exponent in the last byte: numbers from 2**-15 to 2**17, of either sign.
            bits[..., width - 1 :: width] = bits[..., width - 1 :: width] % 16 + 56
            bits[..., 1::4] |= 128 * (name == "nested_scale")
        elif encoding == "e8m0" and name == "scale":
            bits[bits == 255] = 0
        tensors[name] = bits
    names = ("codes", "scale", "nested_scale", "nested_offset")
    return [*(tensors.get(name) for name in names), format, group_size, encoding, shape[2]]


def assert_equal(got: Tensor, want: Tensor) -> None:
    """Hold values bit for bit, but for the bits of a NaN, which differ among processors."""
    assert torch.equal(got.isnan(), want.isnan())
    numbers = ~want.isnan()
    assert_same_bits(got[numbers], want[numbers])


class QuantizedExperts(experts_problem.Problem):
    """A call of fused_experts whose weights are quantised. Its arguments hold their values.

    With is_exact these are in fp32, as the Triton kernel that sums products takes them: on which side
    of a kink a pre-activation lies is decided by values that were not rounded.
    """

    def __init__(
        self, given: experts_problem.Problem, format: str, is_exact: bool = False, **options: Any
    ) -> None:
        names = ("gate_up_proj", "down_proj")
        dtype = given.arguments["hidden_states"].dtype
        self.weights = {n: quantize_weight(given.arguments[n], format, **options) for n in names}
        values_in = torch.float32 if is_exact else dtype
        values = {name: values_of(weight, values_in) for name, weight in self.weights.items()}
        arguments = {**given.arguments, **values}
        # The weights are others than those by which the tokens at kinks were found before.
        at_kinks = reference.tokens_at_kinks(**arguments, rounds_to=dtype, distance=KINK_DISTANCE)
        grad_output = given.grad_output.masked_fill(at_kinks[:, None], 0)
        assert grad_output.any() or not given.grad_output.any()
        differentiable = [name for name in given.differentiable if name not in names]
        super().__init__(arguments, differentiable, grad_output)

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: self.arguments[name].requires_grad_() for name in self.differentiable}
        with checks.poisoned_memory():
            output = moe_ops.fused_experts(**{**self.arguments, **leaves, **self.weights})
            found = torch.autograd.grad(output, list(leaves.values()), self.grad_output)
        return output.detach(), dict(zip(leaves, found, strict=True))

    def inference(self) -> Tensor:
        with torch.no_grad(), checks.poisoned_memory():
            return moe_ops.fused_experts(**{**self.arguments, **self.weights})


class QuantizedGemm(gemm_problem.Problem):
    """A call of grouped_gemm whose weight is quantised. Its arguments hold the weight's values."""

    def __init__(self, given: gemm_problem.Problem, format: str, **options: Any) -> None:
        self.weight = quantize_weight(given.arguments["weight"], format, **options)
        values = values_of(self.weight, given.arguments["input"].dtype)
        differentiable = [name for name in given.differentiable if name != "weight"]
        super().__init__({**given.arguments, "weight": values}, differentiable, given.grad_output)

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = self.leaves()
        with checks.poisoned_memory():
            output = moe_ops.grouped_gemm(**{**self.arguments, **leaves, "weight": self.weight})
            found = torch.autograd.grad(output, list(leaves.values()), self.grad_output)
        return output.detach(), dict(zip(leaves, found, strict=True))
