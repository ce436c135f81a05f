# SPDX-License-Identifier: Apache-2.0
"""`moe_ops explain`: which kernel computes each product of a model's experts, and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from moe_ops import tuning
from moe_ops.cli import experts, memory
from moe_ops.cli.text import number_of
from moe_ops.configs.device import KNOWN_GPUS, Device, device_of, known_gpu
from moe_ops.configs.kernel_config import KernelConfig
from moe_ops.configs.kernel_string import why_not_kernel_config
from moe_ops.configs.problem import Problem, dense_operands, fused_operands
from moe_ops.quantization.formats import FORMATS

if TYPE_CHECKING:
    from moe_ops._triton.weight_plan import WeightPlan

# What only one of the two forms reads.
WITH_MEMORY = ("table", "rank", "num_layers")
WITHOUT_MEMORY = ("gpu", "kernel_config", "quantized", "separate_ops")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    default = " ".join(map(str, tuning.NUM_TOKENS))
    experts.add_arguments(parser, f"{default}; {memory.NUM_TOKENS} with --memory")
    experts.add_separate_ops(parser)
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help=f"in place of this machine's GPU, one of {', '.join(KNOWN_GPUS)}",
    )
    parser.add_argument(
        "--kernel-config",
        metavar="JSON",
        help="what moe_ops.kernel_config returns, as a call would give it",
    )
    parser.add_argument(
        "--quantized",
        choices=tuple(FORMATS),
        metavar="FORMAT",
        help=f"the weights are quantised: {', '.join(FORMATS)}",
    )
    memory.add_arguments(parser)
    experts.add_json(parser)


@dataclass(frozen=True)
class Row:
    """One product: what it is, which kernel computes it, and why.

    Attributes:
        projection: "up" or "down".
        kind: "forward", "backward_dX" or "backward_dW".
        epilogue: what stands on top of the product.
        num_tokens: tokens of the call.
        problem: the key of the product's configuration.
        kernel: "persistent", "cooperative", "tall" or "pingpong"; "decoding" for a quantised weight that is
            decoded in the product.
        computes_epilogue: whether the kernel computes what stands on top of the product.
        config: the configuration's fields.
        source: where the configuration came from: "given", "tuned", "shipped" or "computed".
        reason: why this kernel and this configuration.
        copied: operands that are first copied to where TMA can load them, "left" or "right".
        unmet: wishes of the configuration that cannot be met, with reasons.
        weight: how a quantised weight is read, and why; None for a plain one.
        scratch_bytes: what it is dequantised to at a time.
        is_alternative: whether it runs in place of the row before. Sizes alone do not tell which.
    """

    projection: str
    kind: str
    epilogue: str
    num_tokens: int
    problem: str
    kernel: str
    computes_epilogue: bool
    config: dict[str, Any]
    source: str
    reason: str
    copied: tuple[str, ...]
    unmet: tuple[str, ...]
    weight: str | None = None
    scratch_bytes: int = 0
    is_alternative: bool = False


def explain(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Iterable[str]:
    """Return the rows of the model that the arguments name, as text or as JSON."""
    experts.check_arguments(options, parser)
    _check_form(options, parser)
    if options.memory:
        return _memory(options, parser)
    text = options.kernel_config
    if text is not None and (reason := why_not_kernel_config(text)) is not None:
        parser.error(f"--kernel-config: {reason}")
    try:
        layers = experts.experts_of(options)
        device = _device(options.gpu)
        num_tokens = options.num_tokens or tuning.NUM_TOKENS
        _check_dtype(layers, device)
        rows = [
            (layer, [*_rows(layer, tokens, device, text, options.separate_ops, options.quantized)])
            for layer in layers
            for tokens in num_tokens
        ]
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        raise _ended(error, parser) from error
    if options.json:
        found = [asdict(row) for _, of_layer in rows for row in of_layer]
        plain = layers if options.quantized is None else []
        notes = [note for layer in plain if (note := _padding(layer, device))]
        content = {"gpu": device.name, "products": found, "padding": notes}
        return [json.dumps(content, indent=2)]
    return _lines(device, rows, is_plain=options.quantized is None)


def _check_form(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End the program with its usage where an option is given that the form does not read."""
    unread, word = (WITHOUT_MEMORY, "without") if options.memory else (WITH_MEMORY, "with")
    for name in unread:
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} goes {word} --memory")
    if options.table and options.json:
        parser.error("--table goes without --json")


def _check_dtype(layers: Iterable[tuning.Experts], device: Device) -> None:
    """Refuse what no kernel computes, as a call would."""
    if device.capability < (8, 0) and any(layer.dtype == torch.bfloat16 for layer in layers):
        raise RuntimeError(
            f"bf16 products need compute capability 8.0 or newer, and {device.name} has "
            f"{'.'.join(map(str, device.capability))}; use --dtype float16"
        )


def _ended(error: Exception, parser: argparse.ArgumentParser) -> SystemExit:
    """Return what ends the program with an error's first line."""
    reason = str(error).partition("\n")[0].removeprefix("moe_ops.tune: ")
    return SystemExit(f"{parser.prog}: {reason}")


def _memory(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Iterable[str]:
    """Return the lines of --memory, or their JSON."""
    if options.rank < 1 or options.num_layers < 1:
        parser.error("expected --rank and --num-layers to be at least 1")
    if options.config is not None and options.num_layers != 1:
        parser.error("--num-layers goes with sizes: CONFIG says it itself")
    try:
        layers = experts.layers_of(options) * options.num_layers
    except (ValueError, OSError, ImportError) as error:
        raise _ended(error, parser) from error
    num_tokens = options.num_tokens or [memory.NUM_TOKENS]
    found = [memory.memory_of(layers, options.rank, tokens) for tokens in num_tokens]
    if options.json:
        return [json.dumps([asdict(each) for each in found], indent=2)]
    if options.table:
        name = "sizes" if options.config is None else options.config.name
        return [memory.table_row(name, each) for each in found]
    return [line for each in found for line in memory.lines(each)]


def _device(name: str | None) -> Device:
    if name is not None:
        return known_gpu(name)
    if not torch.cuda.is_available():
        raise RuntimeError("expected a CUDA GPU, got none that this torch sees; use --gpu NAME")
    return device_of(torch.device("cuda", torch.cuda.current_device()))


def _rows(
    layer: tuning.Experts,
    num_tokens: int,
    device: Device,
    kernel_config: str | None,
    separate_ops: bool,
    quantized: str | None = None,
) -> Iterator[Row]:
    from moe_ops._triton.plan import plan as plan_of

    if quantized is not None:
        # They are stored (E, out_features, in_features) whatever the checkpoint's order.
        layer = replace(layer, transposed=False)
    num_fused = sum(1 for _ in tuning.products_of(layer, num_tokens, device=device))
    products = tuning.products_of(layer, num_tokens, separate_ops, device)
    before = None
    for i, (projection, problem) in enumerate(products):
        is_fused = i < num_fused
        is_alternative = before == (projection, problem.kind)
        before = projection, problem.kind
        if quantized is not None and problem.kind == "backward_dW":
            # A quantised weight has no gradient.
            continue
        operands = fused_operands(projection, problem) if is_fused else dense_operands(problem)
        weight = None
        if quantized is not None:
            weight = _weight_plan(quantized, problem, layer.dtype, device, kernel_config)
            # Rows of a scratch begin where TMA can load them.
            operands = operands._replace(b=True)
        if weight is not None and weight.in_product:
            yield Row(
                projection, problem.kind, problem.epilogue, num_tokens, problem.key, "decoding",
                problem.has_activation, weight.options, "computed", weight.reason, (), (),
                weight.reason,
            )  # fmt: skip
            continue
        in_parts = weight is not None and weight.parts > 1
        plan = plan_of(problem, operands, device, kernel_config, in_parts)
        yield Row(
            projection=projection,
            kind=problem.kind,
            epilogue=problem.epilogue,
            num_tokens=num_tokens,
            problem=problem.key,
            kernel=plan.kernel,
            computes_epilogue=plan.computes_epilogue,
            config=plan.config.to_dict(),
            source=plan.source,
            reason=plan.reason,
            copied=tuple(
                name
                for name, is_copied in zip(("left", "right"), plan.copied, strict=False)
                if is_copied
            ),
            unmet=plan.unmet,
            weight=None if weight is None else weight.reason,
            scratch_bytes=0 if weight is None else weight.scratch_bytes,
            is_alternative=is_alternative,
        )


def _weight_plan(
    format: str,
    problem: Problem,
    dtype: torch.dtype,
    device: Device,
    kernel_config: str | None,
) -> WeightPlan:
    from moe_ops._triton.weight_plan import plan_weight

    return plan_weight(
        problem.kind, dtype, format, FORMATS[format].group_sizes[0], problem.num_experts,
        problem.out_features, problem.in_features, problem.rows, device, kernel_config,
    )  # fmt: skip


def _padding(layer: tuning.Experts, device: Device) -> str | None:
    """Say what padding the layer's widths would gain, or return None if it would gain nothing."""
    if not device.has_tma or layer.dtype.itemsize != 2:
        return None
    padded = _padded(layer)
    if padded == layer:
        return None
    before, after = (_num_described(given, device) for given in (layer, padded))
    of_all = sum(1 for _ in tuning.products_of(padded, 1, device=device))
    more = padded.down[0] * padded.down[1] / (layer.down[0] * layer.down[1]) - 1
    widths = " and ".join(
        f"{width} to {wider}"
        for width, wider in zip(layer.down, padded.down, strict=True)
        if width != wider
    )
    return (
        f"padding {widths}, multiples of 16 bytes, would let TMA load and store everything "
        f"without copies in {after} of {of_all} products, now {before}; it costs {more:.1%} more "
        "multiplications"
    )


def _padded(layer: tuning.Experts) -> tuning.Experts:
    """Return the layer with hidden size and intermediate size as multiples of 8 elements."""
    hidden_size, width = layer.down
    parts = layer.up[0] // width
    hidden_size, width = (-(-size // 8) * 8 for size in (hidden_size, width))
    return replace(layer, up=(parts * width, hidden_size), down=(hidden_size, width))


def _num_described(layer: tuning.Experts, device: Device) -> int:
    """Return in how many products TMA can describe all operands."""
    products = tuning.products_of(layer, 1, device=device)
    return sum(all(fused_operands(*product)) for product in products)


def _lines(
    device: Device, rows: list[tuple[tuning.Experts, list[Row]]], is_plain: bool
) -> Iterator[str]:
    major, minor = device.capability
    yield f"{device.name}: compute capability {major}.{minor}, {device.num_sms} SMs"
    yield "A configuration begins with BLOCK_M x BLOCK_N x BLOCK_K, as kernel_config takes them."
    for layer, of_layer in rows:
        yield ""
        yield (
            f"{number_of(of_layer[0].num_tokens, 'token')}, {number_of(layer.num_experts, 'expert')}, "
            f"top {layer.top_k}, "
            f"up {layer.up[0]}x{layer.up[1]}, down {layer.down[0]}x{layer.down[1]}, "
            f"{str(layer.dtype).removeprefix('torch.')}"
        )
        # Dequantised weights lie where TMA can load them, whatever their width.
        if is_plain and (note := _padding(layer, device)):
            yield f"  {note}"
        for row in of_layer:
            on_top = "" if row.epilogue == "none" else f", {row.epilogue.replace('_', ' ')}"
            if row.is_alternative:
                on_top = ", in place of the last for gelu or interleaved gate and up"
            yield f"  {row.projection:<5} {row.kind:<12} {row.kernel:<12} {row.source}{on_top}"
            if row.kernel == "decoding":
                yield "        " + ", ".join(
                    f"{name}={value}" for name, value in row.config.items()
                )
                yield f"        its weight is {row.weight}"
                continue
            yield f"        {tuning.describe(_config_of(row))}"
            if not any(row.reason in wish for wish in row.unmet):
                yield f"        {row.reason}"
            if row.weight is not None:
                yield f"        its weight is {row.weight}"
            if row.copied:
                yield f"        first copies its {' and its '.join(row.copied)} operand"
            yield from (f"        not met: {wish}" for wish in row.unmet)


def _config_of(row: Row) -> KernelConfig:
    from moe_ops.configs.kernel_config import PASSES

    return PASSES[row.kind].from_dict(row.config)
