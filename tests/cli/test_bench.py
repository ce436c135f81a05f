# SPDX-License-Identifier: Apache-2.0
"""`python -m moe_ops bench` times blocks that are right, and says why others are not timed."""

import functools
import io
import itertools
import json
import re
import sys

import pytest
import torch

from moe_ops import cli
from moe_ops.cli import bench, blocks
from moe_ops.tuning import Experts
from testing import checks

# The widths are multiples of 16 bytes, which torch's grouped_mm asks for.
SIZES = ["--hidden-size=16", "--intermediate-size=8", "--num-experts=4", "--top-k=2"]
QUICK = [*SIZES, "--num-tokens=12", "--seconds=0.01", "--quiet"]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("has_bias", "transposed", "gated"), list(itertools.product((False, True), repeat=3))
)
def test_all_ways_compute_the_same(has_bias, transposed, gated):
    experts = Experts(
        num_experts=4, top_k=2, up=(16 if gated else 8, 16), down=(16, 8), dtype=torch.float32,
        has_bias=has_bias, transposed=transposed,
    )  # fmt: skip
    torch.manual_seed(0)
    block = blocks.make_block(experts, 12, CPU)
    assert len(block.leaves) == 6 if has_bias else 4
    expected = bench._call(blocks.with_loop, block, True)()
    for compute in (blocks.with_moe_ops, blocks.with_grouped_mm):
        for found, right in zip(bench._call(compute, block, True)(), expected, strict=True):
            checks.assert_close(found, right)


def run(capsys, *arguments):
    assert cli.main(["bench", *arguments]) == 0
    return capsys.readouterr().out


def test_the_table(capsys):
    out = run(capsys, *QUICK, "--dtype=float32", "--against", "grouped_mm", "loop")
    lines = out.splitlines()
    assert lines[0].startswith("CPU ")
    # It may differ from the quotient of the two medians beside it.
    assert lines[1].endswith("(its time over ours, the median of the turns' ratios)")
    assert "hidden 16, intermediate 8, 2 of 4 experts, float32; 12 tokens" in lines
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("  ")}
    assert set(rows) == {"forward", "moe_ops", "grouped_mm", "loop"}
    assert len(rows["moe_ops"]) == 2
    assert all(cell.endswith("x)") for cell in rows["loop"][1::2])


def test_json_of_two_numbers_of_tokens(capsys):
    arguments = [*QUICK, "--dtype=bfloat16", "--bias", "--against", "loop", "--json"]
    found = json.loads(run(capsys, *arguments, "--num-tokens", "3", "12"))
    assert [(row["num_tokens"], row["passes"], row["name"]) for row in found["rows"]] == [
        (tokens, passes, name)
        for tokens in (3, 12)
        for passes in bench.PASSES
        for name in ("moe_ops", "loop")
    ]
    for row in found["rows"]:
        low, middle, high = row["milliseconds"]
        assert 0 < low <= middle <= high
        assert row["error"] is None
        assert row["ratio"] > 0
        assert row["mib"] is None


def test_the_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "block.png"
    run(capsys, *QUICK, "--dtype=float32", "--against", "loop", "--plot", str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_is_not_timed(capsys, monkeypatch):
    def off(block):
        return blocks.with_loop(block) * 1.1

    monkeypatch.setitem(blocks.CONTENDERS, "loop", off)
    found = json.loads(run(capsys, *QUICK, "--dtype=float32", "--against", "loop", "--json"))
    wrong = [row for row in found["rows"] if row["name"] == "loop"]
    assert {row["error"] for row in wrong} == {"wrong: off by 0.1 of its norm, more than 0.0001"}
    assert {row["milliseconds"] for row in wrong} == {None}


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_the_status_says_that_ours_cannot_run(more, capsys, monkeypatch):
    def refuse(block):
        raise RuntimeError("no such implementation")

    arguments = ["bench", *QUICK, "--dtype=float32", "--against", "loop", *more]
    monkeypatch.setitem(blocks.CONTENDERS, blocks.OURS, refuse)
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert "no such implementation" in out
    assert err == ""


def test_what_cannot_run_says_why_in_one_line(capsys):
    """The rows of torch's grouped_mm must be multiples of 16 bytes, compiled and eager."""
    arguments = [*QUICK, "--hidden-size=9", "--dtype=bfloat16"]
    for name in ("compiled", "grouped_mm"):
        assert cli.main(["bench", *arguments, "--against", name]) == 0
        out, err = capsys.readouterr()
        assert re.search(rf"\n  {name}, forward: .*multiple of 16 bytes", out)
        assert err == ""


def test_compiled(capsys, monkeypatch):
    # Inductor's code for grouped_mm is torch's business, and takes a minute.
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend="aot_eager"))
    arguments = ["--against", "compiled", "--passes", "forward", "--json"]
    found = json.loads(run(capsys, *QUICK, *arguments))
    assert [(row["name"], row["error"]) for row in found["rows"]] == [
        ("moe_ops", None),
        ("compiled", None),
    ]


def test_of_a_config(capsys, tmp_path):
    pytest.importorskip("transformers")
    config = {
        "model_type": "mixtral", "hidden_size": 16, "intermediate_size": 8, "num_local_experts": 4,
        "num_experts_per_tok": 2, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 32, "dtype": "float32",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = run(capsys, str(tmp_path), *QUICK[len(SIZES) :], "--against", "loop")
    assert "\nhidden 16, intermediate 8, 2 of 4 experts, float32; 12 tokens\n" in out
    for field, value, reason in (
        ("num_experts_per_tok", 5, "to be at most its 4 experts, got 5"),
        (
            "dtype",
            "float64",
            "expected a dtype of bfloat16, float16, float32 (--dtype), got float64",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(SystemExit) as raised:
            cli.main(["bench", str(tmp_path), *QUICK[len(SIZES) :], "--against", "loop"])
        assert str(raised.value.code).endswith(reason)


def test_the_name_of_a_model_as_a_hub_writes_it(capsys):
    cli.main(["explain", "Qwen/Qwen3-30B-A3B", "--gpu", "H200", "--num-tokens", "8"])
    assert "8 tokens, 128 experts, top 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--plot=a.foo", "expected --plot to be a file that ends in .png, got a.foo"),
        ("--plot=.", "expected --plot to be a file that ends in .png, got ."),
        ("--seconds=nan", "expected --seconds above 0 and finite, got nan"),
    ],
)
def test_options_are_checked_before_anything_is_timed(option, reason, capsys):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit):
        cli.main(["bench", *QUICK, option])
    assert capsys.readouterr().err.splitlines()[-1].endswith(reason)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["--device=meta"],
            "python -m moe_ops bench: expected --device to be cpu or cuda, got meta",
        ),
        (["--top-k=9"], "expected --top-k at most --num-experts (4), got 9"),
    ],
)
def test_errors_are_one_line(arguments, reason):
    with pytest.raises(SystemExit) as raised:
        cli.main(["bench", *QUICK, *arguments])
    assert reason in str(raised.value.code)
    assert "\n" not in str(raised.value.code)


def test_a_gpu_that_is_not_there():
    text = (
        r"^python -m moe_ops bench: expected a --device that this torch can use, got cuda:99 "
        r"\(.+\); leave it out, or pass --device cpu$"
    )
    with pytest.raises(SystemExit, match=text):
        cli.main(["bench", *QUICK, "--device=cuda:99"])


def test_without_matplotlib(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        cli.main(["bench", *QUICK, "--plot=x.png"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("--plot needs matplotlib, which is not installed: pip install matplotlib")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_the_progress_bar(has_tqdm, capsys, monkeypatch):
    if has_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(capsys, *[a for a in QUICK if a != "--quiet"], "--dtype=float32", "--against", "loop")
    told = terminal.getvalue()
    if has_tqdm:
        assert "2/2" in told
        assert "12 tokens, forward+backward" in told
    else:
        assert told == "no progress bar: tqdm is not installed (pip install tqdm)\n"
