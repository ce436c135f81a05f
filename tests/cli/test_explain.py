# SPDX-License-Identifier: Apache-2.0
"""`moe_ops explain` has a row for each product: its kernel, its configuration, the reason."""

import json

import pytest

import moe_ops
from moe_ops import cli
from moe_ops.configs.kernel_config import PASSES

pytest.importorskip("triton")

# These are Qwen3-30B-A3B's, for which a table is shipped for the H200.
SIZES = [
    "--hidden-size=2048", "--intermediate-size=768", "--num-experts=128", "--top-k=8",
    "--num-tokens", "16384",
]  # fmt: skip
SPECIALIZED = moe_ops.kernel_config(
    moe_ops.KernelConfigForward(
        BLOCK_N=256, use_tma_load_x=True, use_tma_load_w=True, use_tma_store=True,
        warp_specialize=True,
    )
)  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_tuned(monkeypatch):
    monkeypatch.setenv("MOE_OPS_AUTOTUNE", "0")


def explained(capsys, *arguments):
    assert cli.main(["explain", *SIZES, *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return found["gpu"], found["products"]


def test_a_row_for_each_product_of_a_step(capsys):
    gpu, rows = explained(capsys, "--gpu", "h200")
    assert gpu == "NVIDIA H200"
    assert [(row["projection"], row["kind"]) for row in rows] == [
        ("up", "forward"), ("down", "forward"), ("down", "backward_dX"), ("down", "backward_dX"),
        ("up", "backward_dX"),
        ("down", "backward_dW"), ("up", "backward_dW"),
    ]  # fmt: skip
    assert {row["source"] for row in rows} == {"shipped"}
    assert {row["num_tokens"] for row in rows} == {16384}
    # The down projection's dX comes with the activation's backward on top, and bare.
    assert [row["epilogue"] for row in rows[2:4]] == ["gated_activation_backward", "none"]
    assert [row["computes_epilogue"] for row in rows[2:4]] == [True, False]
    assert rows[2]["kernel"] == "pingpong"
    for row in rows:
        assert row["config"] == PASSES[row["kind"]].from_dict(row["config"]).to_dict()
        assert row["unmet"] == []


def test_another_gpu_gets_what_rules_compute(capsys):
    _, rows = explained(capsys, "--gpu", "NVIDIA A100-SXM4-80GB")
    assert {row["source"] for row in rows} == {"computed"}
    assert {row["kernel"] for row in rows} == {"persistent"}


@pytest.mark.parametrize(
    ("gpu", "more", "reason"),
    [
        ("A100", [], "kernels need Hopper (compute capability 9.x)"),
        ("H100", ["--dtype=float32"], "kernels take bfloat16 and float16"),
        ("H100", [], "an activation on top only in tiles of 128x128"),
    ],
)
def test_a_wish_that_cannot_be_met_has_its_reason(capsys, gpu, more, reason):
    _, rows = explained(capsys, "--gpu", gpu, "--kernel-config", SPECIALIZED, *more)
    up = rows[0]
    assert (up["kernel"], up["source"]) == ("persistent", "given")
    assert reason in up["reason"]
    assert any(wish.startswith("warp_specialize: ") and reason in wish for wish in up["unmet"])


def test_a_wish_that_can_be_met(capsys):
    _, rows = explained(capsys, "--gpu", "H100", "--kernel-config", SPECIALIZED)
    down = rows[1]
    assert (down["kernel"], down["source"], down["unmet"]) == ("cooperative", "given", [])


ODD = ["--hidden-size=1001", "--intermediate-size=344"]


def test_what_padding_would_gain(capsys):
    assert cli.main(["explain", *SIZES, *ODD, "--gpu", "H100"]) == 0
    expected = (
        "padding 1001 to 1008, multiples of 16 bytes, would let TMA load and store everything "
        "without copies in 7 of 7 products, now 4; it costs 0.7% more multiplications"
    )
    assert f"  {expected}\n" in capsys.readouterr().out
    for arguments, notes in (
        (ODD, [expected]), ([], []), (["--hidden-size=1000", "--intermediate-size=344"], []),
        ([*ODD, "--dtype=float32"], []),
    ):  # fmt: skip
        assert cli.main(["explain", *SIZES, *arguments, "--gpu", "H100", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["padding"] == notes
    assert cli.main(["explain", *SIZES, *ODD, "--gpu", "A100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["padding"] == []


def test_what_is_copied_first_is_told(capsys):
    _, rows = explained(capsys, *ODD, "--gpu", "H100")
    told = {(row["projection"], row["kind"]): row["copied"] for row in rows}
    assert told["up", "forward"] == ["left", "right"]
    # What the block computes itself begins at sectors.
    assert told["up", "backward_dX"] == ["right"]
    for product in (("down", "forward"), ("down", "backward_dX"), ("up", "backward_dW")):
        assert told[product] == []
    assert cli.main(["explain", *SIZES, *ODD, "--gpu", "H100"]) == 0
    assert "        first copies its left and its right operand\n" in capsys.readouterr().out


def test_a_neighbour_is_named(capsys):
    """GLM-4.5-Air's sizes are not in the table, and those of a similar model are."""
    sizes = ["--hidden-size=4096", "--intermediate-size=1408"]
    _, rows = explained(capsys, *sizes, "--gpu", "H100")
    down = rows[1]
    assert down["source"] == "neighbour"
    assert down["neighbour"] == "forward bfloat16 E128 N4096 D1024 rows1024"
    assert cli.main(["explain", *SIZES, *sizes, "--gpu", "H100"]) == 0
    assert f"        as for {down['neighbour']}\n" in capsys.readouterr().out


@pytest.mark.parametrize("gpu", ["H100", "H100-PCIe", "GH200"])
def test_gpus_of_one_architecture_share_a_table(capsys, gpu):
    _, expected = explained(capsys, "--gpu", "H200")
    assert explained(capsys, "--gpu", gpu)[1] == expected


def test_the_text_says_the_same(capsys):
    assert cli.main(["explain", *SIZES, "--gpu", "A100", "--kernel-config", SPECIALIZED]) == 0
    text = capsys.readouterr().out
    assert text.startswith("NVIDIA A100-SXM4-80GB: compute capability 8.0, 108 SMs\n")
    assert "16384 tokens, 128 experts, top 8, up 1536x2048, down 2048x768, bfloat16" in text
    assert "not met: warp_specialize: warp-specialised kernels need Hopper" in text


def test_a_transformers_config(capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert (
        cli.main(["explain", str(tmp_path), "--num-tokens", "64", "--gpu", "B200", "--json"]) == 0
    )
    rows = json.loads(capsys.readouterr().out)["products"]
    assert len(rows) == 6
    assert all(" E8 " in row["problem"] for row in rows)


def test_projections_of_equal_sizes_are_told_apart(capsys):
    sizes = ["--hidden-size=1024", "--intermediate-size=1024", "--ungated"]
    _, rows = explained(capsys, *sizes, "--gpu", "H100")
    assert [row["projection"] for row in rows] == ["up", "down", "down", "up", "down", "up"]


def test_what_a_config_says_itself_is_not_given(capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["explain", str(tmp_path), "--bias", "--gpu", "H100"])
    assert "--bias goes with sizes: CONFIG says it itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--gpu", "H300"], "expected a GPU of T4, A100"),
        (["--kernel-config", "{", "--gpu", "H100"], "--kernel-config: not JSON"),
        (["--top-k=200", "--gpu", "H100"], "expected --top-k at most --num-experts"),
    ],
)
def test_bad_arguments_get_one_line(capsys, arguments, reason):
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", *SIZES, *arguments])
    said = str(ended.value) if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert reason in said.splitlines()[-1]
