# SPDX-License-Identifier: Apache-2.0
"""The shapes that the GPU benchmarks measure, and what a routing of their tokens is.

T num_tokens, H hidden_size, I intermediate_size, E num_experts, K top_k, R = T * K routed rows;
N and D, the out_features and in_features of a projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from testing import reference

PROJECTIONS = ("up", "down")
ROUTINGS = ("uniform", "zipf", "hot_and_empty")


@dataclass(frozen=True)
class Shape:
    """The experts of a model at a number of tokens.

    Attributes:
        is_gpt_oss: with gpt-oss's biases, clamp and interleaved gate, in its weights' layout; else
            gated with silu.
    """

    name: str
    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    is_gpt_oss: bool = False

    @property
    def num_rows(self) -> int:
        return self.num_tokens * self.top_k

    @property
    def num_weights(self) -> int:
        """Elements of both projections."""
        return 3 * self.num_experts * self.hidden_size * self.intermediate_size

    def features(self, projection: str) -> tuple[int, int]:
        """N and D: up makes gate and up of hidden states, down hidden states of the activation."""
        if projection == "up":
            return 2 * self.intermediate_size, self.hidden_size
        return self.hidden_size, self.intermediate_size


SUITE = (
    Shape("qwen3-30b", 16384, 2048, 768, 128, 8),
    Shape("olmoe", 16384, 2048, 1024, 64, 8),
    Shape("mixtral", 8192, 4096, 14336, 8, 2),
    Shape("dsv3", 8192, 7168, 2048, 256, 8),
    Shape("gptoss20b", 16384, 2880, 2880, 32, 4),
    Shape("fine-grained", 24576, 1536, 256, 128, 8),
    Shape("large", 32768, 4096, 1024, 128, 8),
)
# Measured by `python -m benchmarks.cuda.sweep --named`: models that no table was tuned for.
NAMED = (
    Shape("gpt-oss-120b", 16384, 2880, 2880, 128, 4),
    Shape("gpt-oss-120b biases", 16384, 2880, 2880, 128, 4, is_gpt_oss=True),
    Shape("llama4-scout", 8192, 5120, 8192, 16, 1),
    Shape("deepseek-v2-lite", 16384, 2048, 1408, 64, 6),
    Shape("glm-4.5-air", 16384, 4096, 1408, 128, 8),
    Shape("qwen3-next", 16384, 2048, 512, 512, 10),
    Shape("kimi-k2", 8192, 7168, 2048, 384, 8),
    Shape("granite", 32768, 1536, 512, 40, 8),
    Shape("odd", 10007, 1000, 344, 24, 3),
)
# What a call costs the host: a shape whose kernels are done at once, and a step of fine-tuning.
HOST = (
    Shape("small", 64, 256, 128, 8, 2),
    Shape("qwen3-30b T=2048", 2048, 2048, 768, 128, 8),
)
# Widths of which one at least is no multiple of 8 elements, at a few numbers of tokens.
WIDTHS = tuple(
    Shape(f"{hidden}x{intermediate} T={tokens}", tokens, hidden, intermediate, num_experts, top_k)
    for hidden, intermediate, num_experts, top_k in (
        (1001, 1001, 16, 4),
        (1001, 344, 16, 4),
        (2001, 768, 128, 8),
        (2048, 761, 128, 8),
    )
    for tokens in (512, 2048, 8192, 16384)
)
# Measured with every routing: one of many experts, one of few.
EVERY_ROUTING = ("qwen3-30b", "mixtral")
DECODE, DECODE_TOKENS = SUITE[0], (1, 8, 64, 256)
# Tokens of a whole block's decoding step, where those above are of single products.
DECODE_BLOCK_TOKENS = (1, 8, 16, 32, 64, 128, 256)

BLOCK_ROUTINGS = ("uniform", "zipf")
# With LoRA on frozen experts.
LORA = ("qwen3-30b",)
# Measured with their router, as blocks of a model.
BLOCKS = ("qwen3-30b", "olmoe", "fine-grained")

# What Triton's interpreter can run.
TINY_SUITE = (Shape("tiny", 12, 32, 16, 4, 2),)
TINY_WIDTHS = (Shape("31x17 T=12", 12, 31, 17, 4, 2),)
TINY_DECODE, TINY_DECODE_TOKENS = TINY_SUITE[0], (1,)


@dataclass(frozen=True)
class Routing:
    """Where the rows go, for our ops and for torch's.

    Attributes:
        counts (E,): rows of each expert. ends (E,): their running sum.
        gather (R,): slot of each row. scatter (R,): row of each slot. tokens (R,): token of each row.
    """

    counts: Tensor
    ends: Tensor
    gather: Tensor
    scatter: Tensor
    tokens: Tensor

    @staticmethod
    def draw(
        shape: Shape, routing: str, device: torch.device, seed: int = 0, num_tokens: int = 0
    ) -> Routing:
        """Distinct experts for each token: `routing` is one of ROUTINGS."""
        num_tokens = num_tokens or shape.num_tokens
        ids = reference.route(routing, num_tokens, shape.num_experts, shape.top_k, device, seed)
        counts, gather, scatter = reference.routing_indices(ids, shape.num_experts)
        ends = counts.cumsum(0, dtype=torch.int32)
        return Routing(counts, ends, gather, scatter, gather // shape.top_k)
