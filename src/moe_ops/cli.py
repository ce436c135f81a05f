# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m moe_ops env`, `show`, `tune`."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import moe_ops
from moe_ops._core import library, reference
from moe_ops.configs import cache, choose
from moe_ops.configs.device import device_of

if TYPE_CHECKING:
    from moe_ops.tuning import Experts


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m moe_ops", description=moe_ops.__doc__)
    parser.add_argument("--version", action="version", version=f"moe_ops {moe_ops.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    env = commands.add_parser(
        "env", help="versions, devices, and which implementation serves which op and why"
    )
    env.set_defaults(run=lambda _: _env())
    show = commands.add_parser(
        "show", help="what an op's schema says, and the code generated from it"
    )
    show.add_argument("op", choices=sorted(library.OPS), metavar="OP", help="such as grouped_gemm")
    show.add_argument("--no-code", action="store_true", help="the definition and reference alone")
    show.set_defaults(run=lambda options: _fitted(_show(options.op, not options.no_code)))
    _add_tune(commands)
    options = parser.parse_args(arguments)
    lines: Iterable[str] = options.run(options)
    print("\n".join(lines))
    return 0


def _show(name: str, with_code: bool) -> Iterable[str]:
    op = library.OPS[name]
    yield f"=== Definition (op_schemas/{op.schema.file}, since {op.schema.since})"
    yield f"torch.ops.moe.{name}{op.schema.schema}"
    yield ""
    yield "=== Reference"
    yield from reference.docstring(op.schema).splitlines()
    if with_code:
        flops = "" if op.generated.flops is None else "; flops for torch.utils.flop_counter"
        yield ""
        yield f"=== Code (kernel for each call, which checks it first; fake for FakeTensors and meta tensors{flops})"
        yield from op.generated.source.rstrip().splitlines()


def _fitted(lines: Iterable[str]) -> Iterable[str]:
    """Lines broken at the width of the terminal; as they are where something else reads them."""
    if not sys.stdout.isatty():
        yield from lines
        return
    width = shutil.get_terminal_size().columns
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())]
        yield from textwrap.wrap(
            line,
            width,
            subsequent_indent=indent + 4 * " ",
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]


_TUNED_SIZES = ("hidden_size", "intermediate_size", "num_experts", "top_k")


def _add_tune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    tune = commands.add_parser(
        "tune",
        help="find the fastest kernel configurations of a model's experts on this GPU",
        description="Tunes the GEMMs of a model's experts, forward and backward, and keeps what it "
        "finds where later processes look. An interrupted run goes on where it stopped.",
    )
    tune.add_argument(
        "config",
        nargs="?",
        type=Path,
        help="a transformers config.json or its folder",
        metavar="CONFIG",
    )
    for size in _TUNED_SIZES:
        name = f"--{size.replace('_', '-')}"
        tune.add_argument(name, type=int, metavar="N", help="in place of CONFIG, all four")
    tune.add_argument("--bias", action="store_true", help="with sizes: the experts have biases")
    tune.add_argument(
        "--transposed",
        action="store_true",
        help="with sizes: weights are (E, in, out), as gpt-oss's",
    )
    tune.add_argument("--ungated", action="store_true", help="with sizes: up_proj without a gate")
    tune.add_argument(
        "--num-tokens",
        type=int,
        nargs="+",
        metavar="N",
        help="tokens of a call, batch times length",
    )
    tune.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="default: CONFIG's, else bfloat16",
    )
    tune.add_argument(
        "--separate-ops",
        action="store_true",
        help="also grouped_gemm with its permutations and topk_weights, beside fused_experts",
    )
    tune.add_argument(
        "--output", type=Path, metavar="TABLE.json", help="also write, or add to, this table"
    )
    tune.set_defaults(run=lambda options: _tune(options, tune))


def _tune(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Iterable[str]:
    from moe_ops import tuning

    given = [size for size in _TUNED_SIZES if getattr(options, size) is not None]
    if options.config is None and len(given) < len(_TUNED_SIZES):
        missing = [f"--{s.replace('_', '-')}" for s in _TUNED_SIZES if s not in given]
        parser.error(
            f"{' '.join(missing)} missing" if given else f"expected CONFIG, or {' '.join(missing)}"
        )
    if options.config is not None and given:
        parser.error("expected CONFIG or explicit sizes, got both")
    if options.output is not None and not options.output.absolute().parent.is_dir():
        parser.error(f"expected --output in an existing folder, got {options.output}")
    try:
        if not cache.is_enabled():
            raise RuntimeError("MOE_OPS_AUTOTUNE=0 turns tuning off")
        layers = [_layer_of_sizes(options)] if given else _layers_of_config(options)
        num_tokens = options.num_tokens or tuning.NUM_TOKENS
        device = tuning.current_device()
        facts = device_of(device)
        tasks = tuning.tasks_of(layers, num_tokens, options.separate_ops, facts)
        configs = tuning.tune_tasks(tasks, device, report=tuning.Report(progress=True))
        name = facts.name
        if options.output is not None:
            cache.write_table(options.output, name, configs)
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        reason = str(error).partition("\n")[0].removeprefix("moe_ops.tune: ")
        raise SystemExit(f"{parser.prog}: {reason}") from error
    return [f"{len(configs)} configurations for {name} in {options.output or cache.path_of(name)}"]


def _layer_of_sizes(options: argparse.Namespace) -> Experts:
    from moe_ops.tuning import Experts

    hidden_size, intermediate_size = options.hidden_size, options.intermediate_size
    if options.top_k > options.num_experts:
        at_most = f"at most --num-experts ({options.num_experts})"
        raise ValueError(f"expected --top-k {at_most}, got {options.top_k}")
    return Experts(
        num_experts=options.num_experts,
        top_k=options.top_k,
        up=(intermediate_size if options.ungated else 2 * intermediate_size, hidden_size),
        down=(hidden_size, intermediate_size),
        dtype=getattr(torch, options.dtype or "bfloat16"),
        has_bias=options.bias,
        transposed=options.transposed,
    )


def _layers_of_config(options: argparse.Namespace) -> list[Experts]:
    """The experts of the model that transformers makes of the config, without its weights."""
    from moe_ops.tuning import find_experts

    file = options.config / "config.json" if options.config.is_dir() else options.config
    if not file.is_file():
        raise FileNotFoundError(f"expected CONFIG to be a config.json or its folder, got {file}")
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "CONFIG is read by transformers, which is not installed: give --hidden-size "
            "--intermediate-size --num-experts --top-k instead"
        ) from error
    config = transformers.AutoConfig.from_pretrained(file)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    dtype = options.dtype or getattr(config.get_text_config(), "dtype", None) or "bfloat16"
    return find_experts(model, getattr(torch, str(dtype).removeprefix("torch.")))


def _env() -> Iterable[str]:
    yield f"moe_ops       {moe_ops.__version__}  ({Path(moe_ops.__file__).parent})"
    yield f"python        {platform.python_version()}  ({platform.platform()})"
    yield f"torch         {torch.__version__}"
    for package in ("triton", "transformers", "peft"):
        yield f"{package:<13} {_version(package)}"
    yield ""
    yield "devices"
    yield f"  cpu         {_cpu()}"
    yield from (f"  {line}" for line in _cuda())
    yield ""
    yield "kernel configurations"
    yield from (f"  {line}" for line in _configurations())
    yield ""
    forced = os.environ.get(library.ENVIRONMENT_VARIABLE)
    yield f"{library.ENVIRONMENT_VARIABLE}={forced or ''}" + ("" if forced else "  (not set)")
    yield ""
    yield from _table()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability}, {torch.get_num_threads()} threads"


def _cuda() -> Iterable[str]:
    if not torch.cuda.is_available():
        yield "cuda        none that this torch sees"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}      {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"
        )


def _configurations() -> Iterable[str]:
    """How many are shipped and tuned for each kind of GPU; what is neither is computed."""
    for name in sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}):
        yield f"{name}: {len(choose.shipped(name))} shipped, {_tuned(cache.path_of(name))}"
    read = "" if cache.is_enabled() else "  (not read: MOE_OPS_AUTOTUNE=0)"
    yield f"tuned in    {cache.directory()}{read}"


def _tuned(file: Path) -> str:
    try:
        return f"{len(cache.parse_table(file.read_text(encoding='utf-8')))} tuned"
    except FileNotFoundError:
        return "0 tuned"
    except (OSError, ValueError) as error:
        return f"none tuned, since {file} cannot be read: {error}"


def _table() -> Iterable[str]:
    """A line for each op: which implementation serves each type of device, and why."""
    rows = [("op", *library.IMPLEMENTATIONS)]
    for name, op in sorted(library.OPS.items()):
        rows.append((name, *(_choice(op, device_type) for device_type in library.IMPLEMENTATIONS)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _choice(op: library.Op, device_type: str) -> str:
    try:
        choice = op.choose(device_type)
    except RuntimeError as error:
        return str(error).partition(": ")[2]
    return f"{choice.name} ({choice.reason})"
