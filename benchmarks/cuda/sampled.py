# SPDX-License-Identifier: Apache-2.0
"""Judge a block's results by a sample, where a whole reference would take too much memory or time.

T num_tokens, H hidden_size, I intermediate_size, E num_experts, K top_k.

Some tokens through all of the experts give the output and the gradients of hidden_states and
topk_weights there, in fp64. Some columns of the intermediate size are a narrower layer of experts:
with all tokens they give the gradients of these parts of the weights. What the sample leaves out
is compared with the peer's, by products with random vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.experts import BOTH, PASSES, Block, Comparison, Implementation, first_line
from benchmarks.cuda.timing import OURS, poisoned_memory, relative_error, worst
from testing import reference

logger = logging.getLogger("moe_ops.benchmarks")

NUM_TOKENS, NUM_COLUMNS = 64, 8
# Elements of hidden states that the reference has in fp64 at once.
_CHUNK = 1 << 26

Parameters = dict[str, Tensor]


class Sample:
    """What the fp64 reference gives for some tokens, and for some columns of the weights."""

    def __init__(self, block: Block, topk_ids: Tensor) -> None:
        self.block = block
        shape, device = block.shape, block.bench.device
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(shape.num_tokens, generator=generator)
        self.tokens = order[:NUM_TOKENS].to(device)
        columns = torch.randperm(shape.intermediate_size, generator=generator)[:NUM_COLUMNS]
        self.columns = columns.to(device)
        parameters = block.parameters([leaf.detach() for leaf in block.leaves])
        self.of_tokens = _step(block, topk_ids, self.tokens, parameters, None)
        narrow = self.sliced(parameters)
        self.gradients = {
            name: torch.zeros_like(parameter, dtype=torch.float64)
            for name, parameter in narrow.items()
        }
        every = torch.arange(shape.num_tokens, device=device)
        for tokens in every.split(max(1, _CHUNK // shape.hidden_size)):
            _step(block, topk_ids, tokens, narrow, self.gradients)

    def sliced(self, parameters: Parameters) -> Parameters:
        """The parameters, or their gradients, of the sampled columns alone."""
        columns, width = self.columns, self.block.shape.intermediate_size
        if self.block.options.get("interleaved"):
            rows = torch.stack((2 * columns, 2 * columns + 1), 1).flatten()
        else:
            rows = torch.cat((columns, width + columns))
        axes = {"gate_up_proj": (1, rows), "down_proj": (2, columns), "gate_up_bias": (1, rows)}
        return {
            name: parameter.index_select(*axes[name]) if name in axes else parameter
            for name, parameter in parameters.items()
        }

    def error(self, results: Sequence[Tensor]) -> float:
        """The worst relative error of an output, or of an output and the leaves' gradients."""
        output, *gradients = results
        given = [output]
        if gradients:
            given += [gradients[0], gradients[3]]
        errors = [
            relative_error(result[self.tokens], expected)
            for result, expected in zip(given, self.of_tokens, strict=False)
        ]
        if gradients:
            found = self.sliced(self.block.parameters(gradients))
            errors += [relative_error(found[name], want) for name, want in self.gradients.items()]
        return worst(errors)


def _step(
    block: Block,
    topk_ids: Tensor,
    tokens: Tensor,
    parameters: Parameters,
    gradients: Parameters | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of hidden_states and topk_weights for some tokens, an expert at a time.

    The gradients of the parameters are added to `gradients`, unless it is None.
    """
    ids = topk_ids[tokens]
    num_experts, top_k = block.shape.num_experts, ids.shape[1]
    hidden_states = block.hidden_states.detach()[tokens]
    weights = block.topk_weights.detach()[tokens].flatten()
    output = torch.zeros_like(hidden_states, dtype=torch.float64)
    grad_hidden = torch.zeros_like(output)
    grad_weights = torch.zeros_like(weights, dtype=torch.float64)
    counts, gather, _ = reference.routing_indices(ids, num_experts)
    for e, slots in enumerate(gather[: int(counts.sum())].long().split(counts.tolist())):
        if not len(slots):
            continue
        of_slots = slots // top_k
        own = [parameter[e].double() for parameter in parameters.values()]
        leaves = [hidden_states[of_slots].double(), weights[slots, None].double()]
        leaves += own if gradients is not None else []
        for leaf in leaves:
            leaf.requires_grad_()
        arguments: dict[str, Any] = {
            **{name: mine[None] for name, mine in zip(parameters, own, strict=True)},
            **block.options,
            # On which side of a limit an element is.
            "rounds_to": block.bench.dtype if block.options else torch.float64,
        }
        only_expert = slots.new_zeros(len(slots), 1)
        rows = reference.fused_experts(
            leaves[0], topk_ids=only_expert, topk_weights=leaves[1], **arguments
        )
        grad_output = block.grad_output[tokens[of_slots]].double()
        grads = torch.autograd.grad(rows, leaves, grad_output)
        output.index_add_(0, of_slots, rows.detach())
        grad_hidden.index_add_(0, of_slots, grads[0])
        grad_weights[slots] = grads[1][:, 0]
        if gradients is not None:
            for name, grad in zip(parameters, grads[2:], strict=True):
                gradients[name][e] += grad
    return output, grad_hidden, grad_weights.view(-1, top_k)


def sketch(results: Sequence[Tensor]) -> list[Tensor]:
    """Each result's product with a random vector along its last dimension: every element counts."""
    found = []
    for result in results:
        generator = torch.Generator(result.device).manual_seed(0)
        vector = torch.randn(result.shape[-1], generator=generator, device=result.device)
        rows = result.detach().flatten(0, -2)
        step = max(1, (1 << 26) // result.shape[-1])
        found.append(torch.cat([part.float() @ vector for part in rows.split(step)]))
    return found


@dataclass(frozen=True)
class _Judged:
    error: float
    sketch: list[Tensor]


class SampledComparison(Comparison):
    """A comparison of ours with one peer, whose results are judged by a sample.

    One result is held at a time: the gradients of a large model twice would not fit.
    """

    def __init__(
        self, block: Block, topk_ids: Tensor, implementations: Mapping[str, Implementation]
    ) -> None:
        self.block, self.bench = block, block.bench
        self.topk_ids, self.implementations = topk_ids, dict(implementations)
        self.errors = {name: dict.fromkeys(implementations, float("nan")) for name in PASSES}
        self.failed: dict[str, str] = {}
        sample = Sample(block, topk_ids)
        # The larger pass first: what does not fit fails at once.
        for name in (BOTH, *(name for name in PASSES if name != BOTH)):
            judged = {who: self._judge(sample, who, name) for who in self.implementations}
            self.errors[name] = _errors(judged, self.bench.tolerance)

    def _judge(self, sample: Sample, who: str, name: str) -> _Judged | None:
        poison = poisoned_memory() if who == OURS else nullcontext()
        try:
            with poison:
                call = self.implementations[who].call(name, self.topk_ids, self.block.grad_output)
                results = call()
            results = results if isinstance(results, tuple) else (results,)
            return _Judged(sample.error(results), sketch(results))
        except Exception as error:
            # The other is worth its numbers; this one is told as wrong, and why.
            logger.exception("%s failed", who)
            self.failed[who] = first_line(error)
            return None


def _errors(judged: Mapping[str, _Judged | None], tolerance: float) -> dict[str, float]:
    """By implementation; that of ours is also its distance from a peer that is right."""
    errors = {who: each.error if each else float("nan") for who, each in judged.items()}
    own = judged[OURS]
    for who, peer in judged.items():
        if who != OURS and own and peer and peer.error <= tolerance:
            distances = map(relative_error, own.sketch, peer.sketch)
            errors[OURS] = worst([errors[OURS], *distances])
    return errors
