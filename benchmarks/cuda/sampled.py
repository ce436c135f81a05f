# SPDX-License-Identifier: Apache-2.0
"""Judge a block's results by a sample, where a whole reference would take too much memory or time.

T num_tokens, H hidden_size, I intermediate_size, E num_experts, K top_k.

Some tokens through all of the experts give the output and the gradients of hidden_states and
topk_weights there, in fp64. Some columns of the intermediate size are a narrower layer of experts:
with all tokens they give the gradients of these parts of the weights. What the sample leaves out
is compared with the peer's, by products with random vectors.

transformers adds the gradients of the biases row by row, and rounds each sum to bf16: Inductor makes
atomic additions of them. Such a peer is right but less exact. Its gradients of the biases have a
tolerance of their own, which grows with the rows of an expert. Ours have the tolerance of the rest.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.experts import BOTH, PASSES, Block, Comparison, Implementation, first_line
from benchmarks.cuda.timing import (
    OURS,
    Bench,
    Record,
    poisoned_memory,
    relative_error,
    rounded,
    worst,
)
from testing import reference

logger = logging.getLogger("moe_ops.benchmarks")

NUM_TOKENS, NUM_COLUMNS = 64, 8
# The results of a step in their order: the output, and the gradients of the leaves.
OUTPUT = "output"
BIASES = ("gate_up_bias", "down_bias")
RESULTS = (OUTPUT, "hidden_states", "gate_up_proj", "down_proj", "topk_weights", *BIASES)
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
        """The worst of `errors`."""
        return worst(self.errors(results).values())

    def errors(self, results: Sequence[Tensor]) -> dict[str, float]:
        """By name, the relative error of an output, or of an output and the leaves' gradients."""
        output, *gradients = results
        given = {OUTPUT: output}
        if gradients:
            given |= {"hidden_states": gradients[0], "topk_weights": gradients[3]}
        errors = {
            name: relative_error(result[self.tokens], expected)
            for (name, result), expected in zip(given.items(), self.of_tokens, strict=False)
        }
        if gradients:
            found = self.sliced(self.block.parameters(gradients))
            errors |= {
                name: relative_error(found[name], want) for name, want in self.gradients.items()
            }
        return errors


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


def peer_tolerances(bench: Bench, topk_ids: Tensor) -> dict[str, float]:
    """By name, how far a peer's result may be from the reference.

    A sum of n random numbers that is rounded after each addition is off by about 0.3 u sqrt(n),
    where u is half of the dtype's eps. 0.5 u sqrt(n) is allowed, n being the most rows of an expert.
    """
    num_rows = int(topk_ids.flatten().bincount().max())
    of_sum = 0.25 * torch.finfo(bench.dtype).eps * math.sqrt(num_rows)
    strict = dict.fromkeys(RESULTS, bench.tolerance)
    return {**strict, **dict.fromkeys(BIASES, max(bench.tolerance, of_sum))}


@dataclass(frozen=True)
class _Judged:
    """By name, the errors of an implementation's results, and their sketches; biases are whole."""

    errors: dict[str, float]
    sketch: dict[str, Tensor]

    def is_within(self, tolerances: Mapping[str, float]) -> bool:
        # A NaN is not.
        return all(error <= tolerances[name] for name, error in self.errors.items())


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
        # By pass: who is right, and by peer its results that only its own tolerance lets through.
        self.right: dict[str, set[str]] = {}
        self.less_exact: dict[str, Record] = {}
        self.tolerances = peer_tolerances(self.bench, topk_ids)
        sample = Sample(block, topk_ids)
        # The larger pass first: what does not fit fails at once.
        for name in (BOTH, *(name for name in PASSES if name != BOTH)):
            self._decide(name, {who: self._judge(sample, who, name) for who in implementations})

    def is_right(self, who: str, name: str) -> bool:
        return who in self.right[name]

    def measure(self, name: str, *args: Any, **kwargs: Any) -> Record:
        """The record of a pass, and in it what of a peer is less exact."""
        record = super().measure(name, *args, **kwargs)
        if less_exact := self.less_exact[name]:
            record["less_exact"] = less_exact
        return record

    def _judge(self, sample: Sample, who: str, name: str) -> _Judged | None:
        poison = poisoned_memory() if who == OURS else nullcontext()
        try:
            with poison:
                call = self.implementations[who].call(name, self.topk_ids, self.block.grad_output)
                results = call()
            results = results if isinstance(results, tuple) else (results,)
            named = dict(zip(RESULTS, results, strict=False))
            sketches = dict(zip(named, sketch(results), strict=True))
            # They are small. A product would blur how far a less exact one is off.
            sketches |= {which: named[which].detach() for which in BIASES if which in named}
            return _Judged(sample.errors(results), sketches)
        except Exception as error:
            # The other is worth its numbers; this one is told as wrong, and why.
            logger.exception("%s failed", who)
            self.failed[who] = first_line(error)
            return None

    def _decide(self, name: str, judged: Mapping[str, _Judged | None]) -> None:
        """Who is right in a pass; the error of ours is also its distance from a right peer."""
        strict, own = self.bench.tolerance, judged[OURS]
        for who, each in judged.items():
            self.errors[name][who] = worst(each.errors.values()) if each else math.nan
        right = {
            who
            for who, each in judged.items()
            if who != OURS and each and each.is_within(self.tolerances)
        }
        for peer in (judged[who] for who in right):
            if own and peer:
                distances = _distances(own, peer, strict, self.tolerances)
                self.errors[name][OURS] = worst([self.errors[name][OURS], *distances])
        self.right[name] = right | ({OURS} if self.errors[name][OURS] <= strict else set())
        self.less_exact[name] = {
            who: less_exact
            for who, each in judged.items()
            if who in right and each and (less_exact := self._less_exact(each))
        }

    def _less_exact(self, peer: _Judged) -> Record:
        return {
            name: {"error": rounded(error), "tolerance": rounded(self.tolerances[name])}
            for name, error in peer.errors.items()
            if error > self.bench.tolerance
        }


def _distances(
    own: _Judged, peer: _Judged, strict: float, tolerances: Mapping[str, float]
) -> Iterator[float]:
    """How far our results are from a peer's.

    From a result that is less exact, a distance counts where both tolerances do not explain it.
    """
    for name, of_peer in peer.sketch.items():
        distance = relative_error(own.sketch[name], of_peer)
        is_exact = peer.errors[name] <= strict
        if is_exact or not distance <= strict + tolerances[name]:
            yield distance
