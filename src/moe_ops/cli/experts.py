# SPDX-License-Identifier: Apache-2.0
"""The experts that a command is about: those of a transformers config, or of sizes."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_ops.tuning import Experts
from moe_ops.tuning.problems import experts_layers

SIZES = ("hidden_size", "intermediate_size", "num_experts", "top_k")


@dataclass(frozen=True)
class Model:
    """The sizes of a model's experts, as its config.json has them.

    Attributes:
        num_layers: the layers that have experts.
        has_bias: whether the experts have biases.
        transposed: whether its checkpoint stores weights as (E, in_features, out_features).
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    has_bias: bool = False
    transposed: bool = False


# What CONFIG may name. Of GLM-4.5-Air's 46 layers the first is dense; its shared expert is none here.
MODELS = {
    "Qwen3-30B-A3B": Model(48, 2048, 768, 128, 8),
    "gpt-oss-20b": Model(24, 2880, 2880, 32, 4, has_bias=True, transposed=True),
    "GLM-4.5-Air": Model(45, 4096, 1408, 128, 8),
}


def add_arguments(parser: argparse.ArgumentParser, num_tokens: str) -> None:
    """Add the arguments that say which experts are meant, and at how many tokens.

    Args:
        parser: of the command.
        num_tokens: at how many the command looks by itself, for its help.
    """
    parser.add_argument(
        "config",
        nargs="?",
        type=Path,
        help=f"a transformers config.json or its folder, or one of {', '.join(MODELS)}",
        metavar="CONFIG",
    )
    for size in SIZES:
        name = f"--{size.replace('_', '-')}"
        parser.add_argument(name, type=int, metavar="N", help="in place of CONFIG, all four")
    parser.add_argument("--bias", action="store_true", help="with sizes: the experts have biases")
    parser.add_argument(
        "--transposed",
        action="store_true",
        help="with sizes: weights are (E, in, out), as gpt-oss's",
    )
    parser.add_argument("--ungated", action="store_true", help="with sizes: up_proj without a gate")
    parser.add_argument(
        "--num-tokens",
        type=int,
        nargs="+",
        metavar="N",
        help=f"tokens of a call, batch times length; default: {num_tokens}",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="default: CONFIG's, else bfloat16",
    )


def add_separate_ops(parser: argparse.ArgumentParser) -> None:
    """Add the argument of the commands that look at single products."""
    parser.add_argument(
        "--separate-ops",
        action="store_true",
        help="also grouped_gemm with its permutations and topk_weights, beside fused_experts",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the argument of the commands that print rows."""
    parser.add_argument(
        "--json", action="store_true", help="print the rows as JSON to stdout; takes no file name"
    )


def check_arguments(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End the program with its usage unless either CONFIG or all sizes are given."""
    given = [size for size in SIZES if getattr(options, size) is not None]
    if options.config is None and len(given) < len(SIZES):
        missing = " ".join(f"--{s.replace('_', '-')}" for s in SIZES if s not in given)
        parser.error(f"{missing} missing" if given else f"expected CONFIG, or {missing}")
    if options.config is not None and given:
        size = f"--{given[0].replace('_', '-')}"
        # tune has no --json.
        is_output = getattr(options, "json", False) and options.config.suffix == ".json"
        hint = "; --json prints to stdout and takes no file name" if is_output else ""
        both = f"{options.config} and {size}"
        parser.error(f"expected CONFIG or explicit sizes, got both: {both}{hint}")
    for name in ("bias", "transposed", "ungated"):
        if options.config is not None and getattr(options, name):
            parser.error(f"--{name} goes with sizes: CONFIG says it itself")


def experts_of(options: argparse.Namespace) -> list[Experts]:
    """Return the different experts layers that the arguments name.

    Raises:
        ValueError: sizes below 1, above 64 bits or that do not fit each other, or a model without experts.
        OSError: CONFIG cannot be read.
        ImportError: CONFIG is given, and transformers is not installed.
    """
    return list(dict.fromkeys(layers_of(options)))


def layers_of(options: argparse.Namespace) -> list[Experts]:
    """Return all experts layers that the arguments name, in their order; of sizes, one.

    Raises:
        ValueError, OSError, ImportError: as experts_of.
    """
    _check_sizes(options)
    if options.config is None:
        return [_of_sizes(options)]
    named = {name.lower(): model for name, model in MODELS.items()}
    # As a hub writes it, Qwen/Qwen3-30B-A3B is the same model.
    model = named.get(options.config.name.lower())
    if model is None or options.config.exists():
        layers = _of_config(options)
        for layer in layers:
            if layer.top_k > layer.num_experts:
                raise ValueError(
                    f"expected the config's experts of a token to be at most its {layer.num_experts} "
                    f"experts, got {layer.top_k}"
                )
        return layers
    return [_of_model(model, options.dtype)] * model.num_layers


def _check_sizes(options: argparse.Namespace) -> None:
    given = [(size, getattr(options, size)) for size in SIZES]
    given += [("num_tokens", tokens) for tokens in options.num_tokens or ()]
    for name, size in given:
        if size is not None and size < 1:
            raise ValueError(f"expected --{name.replace('_', '-')} >= 1, got {size}")
        # The ops have no limit of their own, but a tensor's sizes are int64.
        if size is not None and size >= 2**63:
            raise ValueError(f"expected --{name.replace('_', '-')} < 2**63, got {size}")


def _of_model(model: Model, dtype: str | None) -> Experts:
    return Experts(
        num_experts=model.num_experts,
        top_k=model.top_k,
        up=(2 * model.intermediate_size, model.hidden_size),
        down=(model.hidden_size, model.intermediate_size),
        dtype=getattr(torch, dtype or "bfloat16"),
        has_bias=model.has_bias,
        transposed=model.transposed,
    )


def _of_sizes(options: argparse.Namespace) -> Experts:
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


def _of_config(options: argparse.Namespace) -> list[Experts]:
    """Return the experts of the model that transformers makes of the config, without weights."""
    file = options.config / "config.json" if options.config.is_dir() else options.config
    if options.config.is_dir() and not file.is_file():
        raise FileNotFoundError(f"no config.json in {options.config}")
    if not file.is_file():
        raise FileNotFoundError(
            f"expected CONFIG to be a config.json, its folder, or one of {', '.join(MODELS)}, got {file}"
        )
    _check_object(file)
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "CONFIG is read by transformers, which is not installed: give --hidden-size "
            "--intermediate-size --num-experts --top-k instead"
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(file)
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config)
    except Exception as error:  # a config's fields can be wrong in any way
        raise ValueError(f"transformers cannot use {file}: {_in_one_line(error)}") from error
    dtype = options.dtype or getattr(config.get_text_config(), "dtype", None) or "bfloat16"
    return experts_layers(model, getattr(torch, str(dtype).removeprefix("torch.")))


def _check_object(file: Path) -> None:
    """Raise ValueError where a file holds JSON that is no object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        # It is no JSON, and transformers says what is wrong.
        return
    if not isinstance(content, dict):
        raise ValueError(f"expected {file} to hold an object, got {type(content).__name__}")


def _in_one_line(error: Exception) -> str:
    """Return the first sentence of an error that a library wrote in several lines."""
    first, _, rest = str(error).strip().partition("\n")
    if first.endswith(":"):
        first += " " + rest.strip().partition("\n")[0]
    return first or type(error).__name__
