# SPDX-License-Identifier: Apache-2.0
"""Compile with Inductor, or without it where it has no C++ compiler, and count the moe ops."""

from __future__ import annotations

import functools
import os
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager, boxed_nop
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._ops import OpOverload
from torch.fx import GraphModule


class Compiler:
    """Be a torch.compile backend that counts the moe ops in the graphs that it compiles.

    These are AOTAutograd's graphs, forward and backward. Inductor compiles them. Where it cannot
    build its kernels, aot_eager runs them as they are.
    """

    def __init__(self) -> None:
        self.problem = inductor_problem()
        self.name = "aot_eager" if self.problem else "inductor"
        self.moe_ops: dict[str, list[Counter[str]]] = {"forward": [], "backward": []}

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Any:
        # A hit in AOTAutograd's cache on disk would leave no graph to read.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            if self.name == "inductor":
                return compile_fx(graph, inputs, inner_compile=self._inductor)
            return aot_eager(
                graph,
                inputs,
                fw_compiler=functools.partial(self._aot_eager, direction="forward"),
                bw_compiler=functools.partial(self._aot_eager, direction="backward"),
            )

    def _inductor(self, graph: GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        self._count("backward" if options.get("is_backward") else "forward", graph)
        return compile_fx_inner(graph, inputs, **options)

    def _aot_eager(self, graph: GraphModule, inputs: list[Tensor], direction: str) -> Any:
        self._count(direction, graph)
        return boxed_nop(graph, inputs)

    def _count(self, direction: str, graph: GraphModule) -> None:
        ops = (node.target for node in graph.graph.nodes if node.op == "call_function")
        names = (str(op) for op in ops if isinstance(op, OpOverload) and op.namespace == "moe")
        self.moe_ops[direction].append(Counter(names))


def inductor_problem() -> str | None:
    """Say why Inductor cannot build its kernels on this machine; return None if it can."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return f"Inductor has no C++ compiler: {os.environ.get('CXX', 'g++')} does not run"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"Inductor needs {header}, which is not there"
