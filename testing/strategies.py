# SPDX-License-Identifier: Apache-2.0
"""Draws arguments for any op from its schema in op_schemas/ alone.

`build` draws one valid set of arguments: optional tensors present or absent, scalars in range,
sizes, dtypes, routings, layouts. It asks a `choose` function for every decision, so hypothesis
(`samples`) and a seeded random generator (`seeded_sample`) walk the same code.
"""

import contextlib
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from moe_ops._core.library import SCHEMAS
from moe_ops._core.schema import DTYPES, REQUIRED, VALUES, Argument, Expr, OpSchema
from testing import oracle, stored_weights
from testing.layouts import INDEX_LAYOUTS, LAYOUTS, lay_out

Choose = Callable[[Sequence[Any]], Any]

# Sizes of a dimension, by its name in the schema; the smallest first, hypothesis shrinks to it.
SIZES: Mapping[str, tuple[int, ...]] = {
    "num_tokens": (1, 0, 2, 3, 5, 9),
    "num_experts": (1, 2, 3, 4, 8),
    "experts_per_group": (1, 2, 3, 4),
    "top_k": (1, 2, 3, 4),
    "hidden_size": (1, 2, 3, 8, 17),
    "intermediate_size": (1, 2, 3, 8, 17),
    "in_features": (1, 2, 3, 8, 17),
    "out_features": (1, 2, 3, 8, 17),
    "gate_up_rank": (0, 1, 2, 3, 8),
    "down_rank": (0, 1, 2, 3, 8),
}
UNBOUNDED_INTS = (1, 2, 3, 4, 8)
# A process that is alone has one rank. tests/distributed has several.
WORLD_SIZES = (1,)
FLOATS = (1.0, 2.5, 0.3)
PRESENT = object()


class DeadEndError(Exception):
    """Says that the decisions so far leave no valid value for the next one."""


@dataclass
class Sample:
    """One valid call of an op: `arguments` holds every argument, in schema order."""

    schema: OpSchema
    arguments: dict[str, Any]
    layouts: dict[str, str] = field(default_factory=dict)
    routing: str = ""

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.moe, self.schema.name).default

    def __call__(self, **replaced: Any) -> Any:
        return self.overload(*{**self.arguments, **replaced}.values())

    def differentiable(self) -> list[str]:
        """Return the names of the given arguments that have a gradient."""
        return [
            a.name for a in self.schema.tensors if a.grad and self.arguments[a.name] is not None
        ]

    def requiring_grad(self) -> dict[str, Any]:
        """Return the arguments, the differentiable ones as leaves that require grad."""
        names = self.differentiable()
        return {
            name: value.detach().requires_grad_() if name in names else value
            for name, value in self.arguments.items()
        }

    def __repr__(self) -> str:
        shown = []
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                dtype = str(value.dtype).removeprefix("torch.")
                layout = self.layouts[name]
                shown.append(f"{name}={dtype}{list(value.shape)} {layout}")
            else:
                shown.append(f"{name}={value}")
        return f"{self.schema.name}({', '.join(shown)}) routing={self.routing}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print the call for hypothesis, which would otherwise print every field of the schema."""
        printer.text(repr(self))


def build(schema: OpSchema, choose: Choose, fixed: Mapping[str, Any] | None = None) -> Sample:
    """Draws one valid call of the op.

    `fixed` settles decisions in advance: a scalar or a dimension letter by its name, PRESENT or
    None for an optional tensor, and "dtype", "index_dtype", "layout" and "routing" for all
    tensors. A decision that contradicts the schema raises DeadEndError.
    """
    return _Builder(schema, choose, dict(fixed or {})).build()


@st.composite
def samples(draw: st.DrawFn, /, schema: OpSchema, **fixed: Any) -> Sample:
    """Draw a valid call of the op: a hypothesis strategy."""
    sample = _first_alive(schema, lambda options: draw(st.sampled_from(options)), fixed, 10)
    hypothesis.assume(sample is not None)
    assert sample is not None
    return sample


def seeded_sample(schema: OpSchema, seed: int, **fixed: Any) -> Sample:
    """Return the valid call that belongs to `seed`."""
    generator = random.Random(f"{schema.name} {seed}")
    sample = _first_alive(schema, generator.choice, fixed, 200)
    if sample is None:
        raise ValueError(f"{schema.name}: no valid call with {fixed}")
    return sample


def _first_alive(
    schema: OpSchema, choose: Choose, fixed: Mapping[str, Any], attempts: int
) -> Sample | None:
    for _ in range(attempts):
        with contextlib.suppress(DeadEndError):
            return build(schema, choose, fixed)
    return None


def all_flags(count: int) -> list[list[bool]]:
    """Return every list of so many flags, with all of them set first."""
    return [list(flags) for flags in itertools.product((True, False), repeat=count)]


# More combinations than this are not gone through one by one, nor are more valid ones than that.
MANY_COMBINATIONS, MANY_VARIANTS = 300, 100


def variants(schema: OpSchema) -> Iterator[dict[str, Any]]:
    """Yield valid combinations of flags, choices and present optional tensors, as `fixed`.

    These are all of them. Where they are many, they are some in which any two options meet.
    """
    options = _options(schema)
    if math.prod(map(len, options.values())) <= MANY_COMBINATIONS:
        chosen = (dict(zip(options, v, strict=True)) for v in itertools.product(*options.values()))
        found = [each for each in chosen if _allowed(schema, each)]
        if len(found) <= MANY_VARIANTS:
            yield from found
            return
    yield from _covering(schema.name)


def _options(schema: OpSchema) -> dict[str, Sequence[Any]]:
    """Return what a variant settles, and to which values."""
    options: dict[str, Sequence[Any]] = {}
    for argument in schema.arguments:
        if argument.type == "bool":
            options[argument.name] = (False, True)
        elif argument.num_flags:
            options[argument.name] = all_flags(argument.num_flags)
        elif argument.type == "float?":
            options[argument.name] = (None, FLOATS[0])
        elif argument.type == "ScalarType":
            options[argument.name] = [getattr(torch, dtype) for dtype in argument.choices]
        elif argument.choices:
            options[argument.name] = argument.choices
        elif argument.is_tensor and argument.is_optional:
            options[argument.name] = (None, PRESENT)
    return options


@functools.cache
def _covering(name: str) -> tuple[dict[str, Any], ...]:
    """Return random valid variants, each with two options that no variant before it has together."""
    schema = SCHEMAS[name]
    options = _options(schema)
    generator = random.Random(name)
    found: list[dict[str, Any]] = []
    seen: set[tuple[Any, Any]] = set()
    in_vain = 0
    while in_vain < 500:
        chosen = {key: generator.choice(values) for key, values in options.items()}
        if not _allowed(schema, chosen):
            continue
        pairs = set(itertools.combinations(_single_options(chosen), 2))
        in_vain = 0 if pairs - seen else in_vain + 1
        if pairs - seen:
            found.append(chosen)
        seen |= pairs
    return tuple(found)


def _single_options(chosen: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return (name, value) of each option, with the flags of a list one by one."""
    single: list[tuple[str, Any]] = []
    for key, value in chosen.items():
        if isinstance(value, list):
            single += [(f"{key}[{i}]", flag) for i, flag in enumerate(value)]
        else:
            single.append((key, value))
    return single


def _allowed(schema: OpSchema, known: Mapping[str, Any]) -> bool:
    """Return whether every `where` that can be decided by now holds."""
    decidable = (w.expect for w in schema.where if w.expect.names <= set(known))
    return all(expect.evaluate(known) for expect in decidable)


class _Builder:
    def __init__(self, schema: OpSchema, choose: Choose, fixed: dict[str, Any]) -> None:
        self.schema = schema
        self.choose = choose
        self.fixed = fixed
        self.known: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self.layouts: dict[str, str] = {}
        self.routing = ""
        self.generator = torch.Generator()

    def build(self) -> Sample:
        self.generator.manual_seed(self.choose(range(1000)))
        for argument in self.schema.tensors:
            if argument.is_optional:
                self.decide(argument.name, (None, PRESENT))
        for letter, meaning in self.schema.dims.items():
            self.decide(letter, SIZES[meaning])
        # The more bounds a scalar has, the later: else it would narrow down what bounds it.
        waiting = sorted(self.schema.scalars, key=lambda a: len(self.bounds(a)))
        while waiting:
            argument = next(a for a in waiting if self.bounds(a) <= set(self.known))
            waiting.remove(argument)
            self.decide(argument.name, self.options(argument))
        self.route()
        for argument in self.schema.tensors:
            if not argument.is_optional or self.known[argument.name] is not None:
                self.tensors[argument.name] = self.tensor(argument)
        arguments = {
            a.name: self.tensors.get(a.name) if a.is_tensor else self.known[a.name]
            for a in self.schema.arguments
        }
        return Sample(self.schema, arguments, self.layouts, self.routing)

    def decide(self, name: str, options: Sequence[Any]) -> None:
        if name in self.fixed:
            options = [self.fixed[name]]
        valid = [v for v in options if _allowed(self.schema, {**self.known, name: v})]
        if not valid:
            raise DeadEndError(name)
        self.known[name] = self.choose(valid)

    def bounds(self, argument: Argument) -> frozenset[str]:
        bounds = (argument.minimum, argument.maximum)
        return frozenset().union(*(bound.names for bound in bounds if bound is not None))

    def options(self, argument: Argument) -> Sequence[Any]:
        if argument.type == "ScalarType":
            return [getattr(torch, dtype) for dtype in argument.choices]
        if argument.choices:
            return (None, *argument.choices) if argument.is_optional else argument.choices
        if argument.type == "bool":
            return (False, True)
        if argument.num_flags:
            return all_flags(argument.num_flags)
        if argument.type == "float":
            return FLOATS
        if argument.type == "float?":
            return (None, *FLOATS)
        if argument.is_optional:
            return (None,)
        if argument.name == "world_size":
            return WORLD_SIZES
        if argument.type == "SymInt":
            low = 0 if argument.minimum is None else self.size(argument.minimum)
            if argument.maximum is None:
                # A width may be none, or several blocks of a quantised weight.
                widths = (70, 0) if argument.minimum is not None and low == 0 else ()
                return [i for i in UNBOUNDED_INTS if i >= low] + [*widths]
            return range(low, self.size(argument.maximum) + 1)
        return (argument.default,) if argument.default is not REQUIRED else ("",)

    def size(self, expr: Expr) -> int:
        return int(expr.evaluate(self.known))

    def shape(self, argument: Argument) -> tuple[int, ...]:
        return tuple(self.size(expr) for expr in argument.shape)

    def top_k(self) -> int:
        """Return the slots of a token, from an argument or from a dimension that means top_k."""
        letters = [d for d, meaning in self.schema.dims.items() if meaning == "top_k"]
        return self.known.get(next(iter(letters), "top_k"), 1)

    def route(self) -> None:
        """Draws the routing that all index arguments of one call come from."""
        num_experts, num_tokens, top_k = 4, 1, 1
        distinct = False
        for argument in self.schema.tensors:
            match = VALUES.fullmatch(argument.values)
            if match is None:
                continue
            shape = self.shape(argument)
            if match["counts"]:
                num_experts = shape[0]
            elif match["ids"]:
                num_experts = self.known[match["ids"]]
                num_tokens, top_k = shape
                distinct = "distinct" in argument.values
            elif argument.values == "sent slots":
                num_experts = self.known["num_experts"]
                num_tokens, top_k = shape
            elif argument.values == "permutation":
                top_k = self.top_k()
                num_tokens = shape[0] // top_k
        if distinct:
            kinds = ["uniform"] if top_k < num_experts else ["every_expert"]
            if top_k > num_experts:
                raise DeadEndError("distinct ids")
        else:
            kinds = [k for k in oracle.ROUTINGS if k != "every_expert" or top_k == num_experts]
        if "routing" in self.fixed:
            kinds = [k for k in kinds if k == self.fixed["routing"]]
            if not kinds:
                raise DeadEndError("routing")
        self.routing = self.choose(kinds)
        self.topk_ids = oracle.random_topk_ids(
            self.routing, num_tokens, num_experts, top_k, self.generator
        )
        counts, gather, _ = oracle.routing_indices(self.topk_ids, num_experts)
        self.token_counts, self.gather_indices = counts, gather
        if self.choose((False, False, True)):
            # Any permutation is valid, not only the stable one that routing_indices makes.
            order = torch.randperm(gather.numel(), generator=self.generator)
            self.gather_indices = gather[order]

    def tensor(self, argument: Argument) -> Tensor:
        name, shape, dtype = argument.name, self.shape(argument), self.dtype(argument)
        if argument.values:
            content = self.indices(argument, shape).to(dtype)
            layouts: Sequence[str] = INDEX_LAYOUTS
        else:
            # Adapters are small, as in use: at a width of 70 their products would leave fp16's range.
            size = 0.125 if "_lora_" in name else 1.0
            content = (self.numbers(shape) * size).to(dtype)
            layouts = LAYOUTS
        if self.fixed.get("layout") in layouts:
            layouts = [self.fixed["layout"]]
        self.layouts[name] = self.choose(layouts)
        return lay_out(content, self.layouts[name])

    def dtype(self, argument: Argument) -> torch.dtype:
        if argument.dtype not in DTYPES:
            return self.tensors[argument.dtype].dtype
        options = [getattr(torch, dtype) for dtype in DTYPES[argument.dtype]]
        preset = self.fixed.get("index_dtype" if argument.dtype == "index" else "dtype")
        if preset in options:
            options = [preset]
        chosen: torch.dtype = self.choose(options)
        return chosen

    def numbers(self, shape: tuple[int, ...]) -> Tensor:
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if self.choose((False, False, True)):
            # Few different values, so that ties are common.
            levels = torch.randn(3, generator=self.generator, dtype=torch.float64)
            numbers = levels[torch.randint(0, 3, shape, generator=self.generator)]
        return numbers

    def indices(self, argument: Argument, shape: tuple[int, ...]) -> Tensor:
        match = VALUES.fullmatch(argument.values)
        if match is None:
            raise ValueError(f"no rule draws values {argument.values!r}")
        if argument.dtype == "uint8":
            return stored_weights.finite_bytes(match, self.known, shape, self.generator)
        if match["counts"]:
            return self.token_counts
        if match["ids"]:
            return self.topk_ids
        if argument.values in ("sent slots", "local ids"):
            sizes = (self.known[name] for name in ("num_experts", "world_size", "capacity"))
            made = oracle.sent_slots if argument.values == "sent slots" else oracle.local_ids
            return made(self.topk_ids, *sizes)
        if match["inverse"]:
            return torch.argsort(self.tensors[match["inverse"]].long())
        return self.gather_indices
