# SPDX-License-Identifier: Apache-2.0
"""torch.export keeps the ops of a block in the program, and leaves the token count free."""

import io

import pytest
import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from testing import checks
from testing.moe_block import BLOCKS, Weights, make_tokens, make_weights


class Block(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        weights = make_weights()
        self.router, self.gate_up_proj, self.down_proj = map(torch.nn.Parameter, weights.tensors())
        self.name = name

    def forward(self, hidden):
        weights = Weights(self.router, self.gate_up_proj, self.down_proj)
        return BLOCKS[self.name](hidden, weights)


def exported(name: str, strict: bool) -> tuple[Block, torch.export.ExportedProgram]:
    block = Block(name)
    num_tokens = torch.export.Dim("num_tokens", min=2, max=4096)
    program = torch.export.export(
        block, (make_tokens(5).detach(),), dynamic_shapes=({0: num_tokens},), strict=strict
    )
    return block, program


def moe_ops_of(program: torch.export.ExportedProgram) -> list[str]:
    targets = [str(node.target) for node in program.graph.nodes]
    return [target for target in targets if target.startswith("moe.")]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_exported_program_holds_the_ops_and_any_token_count(name, strict):
    block, program = exported(name, strict)
    assert moe_ops_of(program).count("moe.grouped_gemm.default") == 2
    for num_tokens in (2, 5, 19):
        hidden = make_tokens(num_tokens).detach()
        checks.assert_close(program.module()(hidden), block(hidden))


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_decomposed_and_saved_program(name):
    block, program = exported(name, strict=False)
    buffer = io.BytesIO()
    torch.export.save(program.run_decompositions(), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    assert moe_ops_of(loaded) == moe_ops_of(program)
    hidden = make_tokens(11).detach()
    checks.assert_close(loaded.module()(hidden), block(hidden))


@pytest.mark.slow
def test_ahead_of_time_compiled_by_inductor(tmp_path):
    """AOTInductor calls the ops through the dispatcher, for any token count."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("Inductor finds no C++ compiler")
    block, program = exported("fused", strict=False)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "block.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    for num_tokens in (2, 11):
        hidden = make_tokens(num_tokens).detach()
        with torch.no_grad():
            checks.assert_close(loaded(hidden), block(hidden))
