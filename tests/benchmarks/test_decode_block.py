# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a block's decoding step: its flow on a CPU, and that the ids change."""

import json

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import suite
from benchmarks.cuda import decode_block, experts
from benchmarks.cuda.decode_block import BATCHED_MM, GROUPED_MM, Replay
from benchmarks.cuda.experts import COMPILED, Block
from benchmarks.cuda.timing import OURS, Bench

TINY = suite.TINY_DECODE
CEILINGS = {"dense_tflops": 790.0, "copy_tbs": 4.3, "read_tbs": 4.0}


class Bf16Bench(Bench):
    """torch compiles grouped_mm in bf16 alone."""

    dtype = torch.bfloat16


def bench(kind=Bench):
    return kind(torch.device("cpu"), tiny=True, seconds=0.0, least_turns=2, ceilings=CEILINGS)


@pytest.mark.parametrize("with_transformers", [True, False])
def test_tiny_run(monkeypatch, with_transformers):
    if with_transformers:
        pytest.importorskip("transformers")
    monkeypatch.setattr(experts, "HAS_TRANSFORMERS", with_transformers)
    torch.manual_seed(0)
    (record,) = decode_block.run_decode(bench(), TINY)
    json.dumps(record, allow_nan=False)
    assert "wrong" not in record, record
    peers = {GROUPED_MM, BATCHED_MM} if with_transformers else {GROUPED_MM}
    assert set(record["ratio"]) == peers
    assert set(record["milliseconds"]) == {OURS, *peers}
    assert record["T"] == TINY.num_tokens
    assert record["of_floor"] > 0


def test_compiled_grouped_mm_is_right():
    torch.manual_seed(0)
    (record,) = decode_block.run_decode(bench(Bf16Bench), TINY, "aot_eager")
    assert "wrong" not in record, record
    assert COMPILED in record["ratio"]


def test_each_replay_and_each_layer_has_other_ids():
    draws = [torch.tensor([i]) for i in range(3)]
    met = []

    def forward(ids):
        met.append(ids.item())
        return ids.float()

    replay = Replay(bench(), [forward, forward], draws)
    assert replay.calls == 2
    for _ in range(4):
        bench().timed(replay)
    assert met == [0, 1, 1, 2, 2, 0, 0, 1]
    assert [output.item() for output in replay.outputs] == [0, 1]


def test_a_graph_that_reads_the_first_ids_alone_is_wrong():
    """What a capture of a host's decision would give."""
    torch.manual_seed(0)
    block = Block(bench(), TINY)
    right = experts.ours(block).forward
    draws = [block.route("uniform"), 1 - block.route("uniform") % 2]
    draws[1] = torch.stack((draws[1][:, 0], draws[1][:, 0] + 2), 1).int()
    with torch.no_grad():
        assert Replay(block.bench, [right], draws).error([right]) <= block.bench.tolerance
        stuck = Replay(block.bench, [lambda ids: right(draws[0])], draws)
        assert stuck.error([right]) > block.bench.tolerance


def test_a_graph_of_one_layer_s_weights_alone_is_wrong():
    torch.manual_seed(0)
    first, second = (experts.ours(Block(bench(), TINY)).forward for _ in range(2))
    draws = [Block(bench(), TINY).route("uniform")]
    with torch.no_grad():
        replay = Replay(bench(), [first, first], draws)
        assert replay.error([first, first]) <= bench().tolerance
        assert replay.error([first, second]) > bench().tolerance


def test_a_failure_is_told_and_the_others_are_measured(monkeypatch):
    original = decode_block.forwards_of

    def fail(ids):
        raise RuntimeError("cannot be captured\nand more")

    def forwards_of(block, backend):
        return {**original(block, backend), GROUPED_MM: fail}

    monkeypatch.setattr(decode_block, "forwards_of", forwards_of)
    (record,) = decode_block.run_decode(bench(), TINY)
    json.dumps(record, allow_nan=False)
    assert record["failed"] == {GROUPED_MM: "RuntimeError: cannot be captured"}
    assert OURS in record["milliseconds"]
    assert GROUPED_MM not in record["ratio"]


def test_touched_bytes_are_of_the_experts_that_have_a_token():
    block = Block(bench(), TINY)
    draws = [torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0, 1], [2, 3]])]
    of_expert = 3 * TINY.hidden_size * TINY.intermediate_size * 2
    assert decode_block.touched_bytes(block, draws) == 3 * of_expert


def test_cases_are_the_tokens_of_the_suite():
    tiny = [label for label, _ in decode_block.cases(bench(), [])]
    assert tiny == ["tiny T=1"]
    large = Bench(torch.device("cpu"))
    assert [label for label, _ in decode_block.cases(large, [])] == [
        f"qwen3-30b T={tokens}" for tokens in (1, 8, 16, 32, 64, 128, 256)
    ]
