# SPDX-License-Identifier: Apache-2.0
"""`moe_ops explain`: which kernel computes each product of a model's experts, and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moe_ops import tuning
from moe_ops.cli import experts
from moe_ops.configs.device import KNOWN_GPUS, Device, device_of, known_gpu
from moe_ops.configs.kernel_config import KernelConfig
from moe_ops.configs.kernel_string import why_not_kernel_config
from moe_ops.configs.problem import dense_operands, fused_operands


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    experts.add_arguments(parser)
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
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


@dataclass(frozen=True)
class Row:
    """One product: what it is, which kernel computes it, and why.

    Attributes:
        projection: "up" or "down".
        kind: "forward", "backward_dX" or "backward_dW".
        epilogue: what stands on top of the product.
        num_tokens: tokens of the call.
        problem: the key of the product's configuration.
        kernel: "persistent", "cooperative" or "pingpong".
        computes_epilogue: whether the kernel computes what stands on top of the product.
        config: the configuration's fields.
        source: where the configuration came from: "given", "tuned", "shipped", "neighbour" or
            "computed".
        neighbour: the key of the neighbour, whose configuration it is.
        reason: why this kernel.
        copied: operands that are first copied to where TMA can load them, "left" or "right".
        unmet: wishes of the configuration that cannot be met, with reasons.
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
    neighbour: str | None
    reason: str
    copied: tuple[str, ...]
    unmet: tuple[str, ...]


def explain(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Iterable[str]:
    """Return the rows of the model that the arguments name, as text or as JSON."""
    experts.check_arguments(options, parser)
    text = options.kernel_config
    if text is not None and (reason := why_not_kernel_config(text)) is not None:
        parser.error(f"--kernel-config: {reason}")
    try:
        device = _device(options.gpu)
        layers = experts.experts_of(options)
        num_tokens = options.num_tokens or tuning.NUM_TOKENS
        rows = [
            (layer, [*_rows(layer, tokens, device, text, options.separate_ops)])
            for layer in layers
            for tokens in num_tokens
        ]
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        reason = str(error).partition("\n")[0].removeprefix("moe_ops.tune: ")
        raise SystemExit(f"{parser.prog}: {reason}") from error
    if options.json:
        found = [asdict(row) for _, of_layer in rows for row in of_layer]
        notes = [note for layer in layers if (note := _padding(layer, device))]
        content = {"gpu": device.name, "products": found, "padding": notes}
        return [json.dumps(content, indent=2)]
    return _lines(device, rows)


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
) -> Iterator[Row]:
    from moe_ops._triton.plan import plan as plan_of

    num_fused = sum(1 for _ in tuning.products_of(layer, num_tokens, device=device))
    products = tuning.products_of(layer, num_tokens, separate_ops, device)
    for i, (projection, problem) in enumerate(products):
        is_fused = i < num_fused
        operands = fused_operands(projection, problem) if is_fused else dense_operands(problem)
        plan = plan_of(problem, operands, device, kernel_config)
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
            neighbour=plan.neighbour,
            reason=plan.reason,
            copied=tuple(
                name
                for name, is_copied in zip(("left", "right"), plan.copied, strict=False)
                if is_copied
            ),
            unmet=plan.unmet,
        )


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


def _lines(device: Device, rows: list[tuple[tuning.Experts, list[Row]]]) -> Iterator[str]:
    major, minor = device.capability
    yield f"{device.name}: compute capability {major}.{minor}, {device.num_sms} SMs"
    for layer, of_layer in rows:
        yield ""
        yield (
            f"{of_layer[0].num_tokens} tokens, {layer.num_experts} experts, top {layer.top_k}, "
            f"up {layer.up[0]}x{layer.up[1]}, down {layer.down[0]}x{layer.down[1]}, "
            f"{str(layer.dtype).removeprefix('torch.')}"
        )
        if note := _padding(layer, device):
            yield f"  {note}"
        for last, row in zip((None, *of_layer), of_layer, strict=False):
            on_top = "" if row.epilogue == "none" else f", {row.epilogue.replace('_', ' ')}"
            if last is not None and (last.projection, last.kind) == (row.projection, row.kind):
                # Of the two one runs. Sizes alone do not tell which.
                on_top = ", in place of the last for gelu or interleaved gate and up"
            yield f"  {row.projection:<5} {row.kind:<12} {row.kernel:<12} {row.source}{on_top}"
            yield f"        {tuning.describe(_config_of(row))}"
            if row.neighbour is not None:
                yield f"        as for {row.neighbour}"
            yield f"        {row.reason}"
            if row.copied:
                yield f"        first copies its {' and its '.join(row.copied)} operand"
            yield from (f"        not met: {wish}" for wish in row.unmet)


def _config_of(row: Row) -> KernelConfig:
    from moe_ops.configs.kernel_config import PASSES

    return PASSES[row.kind].from_dict(row.config)
