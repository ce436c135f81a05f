# SPDX-License-Identifier: Apache-2.0
"""`moe_ops explain` has a row for each product: its kernel, its configuration, the reason."""

import json
from pathlib import Path

import pytest

import moe_ops
from moe_ops import cli
from moe_ops.cli.experts import MODELS
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
        (
            ["--gpu", "T4"],
            "bf16 products need compute capability 8.0 or newer, and Tesla T4 has 7.5",
        ),
        (["--kernel-config", "{", "--gpu", "H100"], "--kernel-config: not JSON"),
        (["--top-k=200", "--gpu", "H100"], "expected --top-k at most --num-experts"),
        (["--hidden-size=0", "--gpu", "H100"], "expected --hidden-size >= 1, got 0"),
        (["--num-tokens", "8", "-3", "--gpu", "H100"], "expected --num-tokens >= 1, got -3"),
        (["--num-tokens=0", "--memory"], "expected --num-tokens >= 1, got 0"),
        # Sizes come before the GPU, which this machine may not have.
        (["--top-k=200"], "expected --top-k at most --num-experts"),
    ],
)
def test_bad_arguments_get_one_line(capsys, arguments, reason):
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", *SIZES, *arguments])
    said = str(ended.value) if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert reason in said.splitlines()[-1]


@pytest.mark.parametrize(("num_tokens", "told"), [(1, "\n1 token, "), (2, "\n2 tokens, ")])
def test_one_of_a_kind_has_no_plural(capsys, num_tokens, told):
    assert cli.main(["explain", *SIZES, "--gpu", "H100", "--num-tokens", str(num_tokens)]) == 0
    assert told in capsys.readouterr().out


def test_quantised_weights_are_decoded_or_dequantised_with_a_reason(capsys):
    _, rows = explained(capsys, "--gpu", "h200", "--quantized", "nf4", "--num-tokens", "8", "16384")
    few, many = ([row for row in rows if row["num_tokens"] == n] for n in (8, 16384))
    assert {row["kind"] for row in rows} == {"forward", "backward_dX"}
    assert [row["kernel"] for row in few[:2]] == ["decoding", "decoding"]
    for row in few[:2]:
        assert row["weight"] == (
            "decoded by the product itself, once for each tile of rows (1.0 an expert): a number costs 1.5 "
            "bytes of reading that way, and 4.5 by way of a scratch (estimates)"
        )
        assert row["scratch_bytes"] == 0
    up, down = many[:2]
    assert (up["kernel"], down["kernel"]) == ("pingpong", "pingpong")
    # Half of the up projection in bf16, and all of the down projection.
    assert up["scratch_bytes"] == down["scratch_bytes"] == 64 * 1536 * 2048 * 2
    assert up["weight"] == (
        "dequantised first, 64 experts at a time into 384 MiB (at most 512 MiB, or one expert): a number "
        "costs 4.5 bytes of reading that way; the product itself would decode it once for each tile of "
        "rows (16.5 an expert), at 24.8 (estimates)"
    )
    assert down["weight"].startswith("dequantised first, all experts at once into 384 MiB: ")
    for row in [*few, *many]:
        if row["kind"] == "backward_dX":
            assert row["weight"].endswith(
                ": dX reads the weight along out_features, and no kernel decodes along these"
            )


def test_a_given_configuration_takes_the_kernels_of_plain_weights(capsys):
    arguments = ["--gpu", "h200", "--quantized", "nf4", "--num-tokens", "8"]
    _, rows = explained(capsys, *arguments, "--kernel-config", SPECIALIZED)
    assert rows[0]["kernel"] != "decoding"
    assert rows[0]["weight"].endswith(
        ": kernel_config was given, which is for kernels of plain weights"
    )


def test_gpus_without_the_tensor_cores_dequantise(capsys):
    arguments = ["--gpu", "T4", "--quantized", "nf4", "--num-tokens", "8", "--dtype", "float16"]
    _, rows = explained(capsys, *arguments)
    assert {row["kernel"] for row in rows} == {"persistent"}
    assert rows[0]["weight"].endswith("compute capability 8.0, and this GPU has 7.5")


def test_the_reasons_are_printed(capsys):
    """Of small weights the scratch is told in KiB."""
    sizes = ["--hidden-size=64", "--intermediate-size=32", "--num-experts=2", "--top-k=2"]
    arguments = ["--gpu", "h200", "--quantized", "int4", "--num-tokens", "1"]
    assert cli.main(["explain", *sizes, *arguments]) == 0
    out = capsys.readouterr().out
    assert (
        "\n        its weight is decoded by the product itself, once for each tile of rows " in out
    )
    assert "its weight is dequantised first, all experts at once into 8 KiB: dX" in out


def memory(capsys, *arguments):
    assert cli.main(["explain", *arguments, "--memory", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_memory_of_a_named_model(capsys):
    (found,) = memory(capsys, "Qwen3-30B-A3B")
    weights = 48 * 128 * 3 * 2048 * 768
    assert found["num_layers"] == 48
    assert found["bfloat16"] == 2 * weights
    assert found["formats"] == {
        # A byte of code, and 4 bytes of scale for 128 x 128 of them.
        "fp8_block": weights + weights // 4096,
        # Half a byte; a byte for 64; 4 bytes for 256 of those; 4 for each expert.
        "nf4": weights // 2 + weights // 64 + weights // 4096 + 48 * 128 * 2 * 4,
        "mxfp4": weights // 2 + weights // 32,
        "int4": weights // 2 + weights // 16,
    }
    assert found["adapters"] == 48 * 128 * 16 * (2048 + 1536 + 768 + 2048) * 4
    assert found["optimizer"] == 2 * found["adapters"]
    rows = 4096 * 8
    kept = (4096 * 2048 + rows * 1536) * 2 + (128 + 2 * rows) * 4 + rows * 4
    assert found["activations_of_a_layer"] == kept
    assert found["activations"] == 48 * kept
    assert found["scratch"] == 64 * 1536 * 2048 * 2


def test_memory_of_sizes_and_of_several_numbers_of_tokens(capsys):
    sizes = [*SIZES[:4], "--num-layers", "48", "--rank", "8", "--num-tokens", "4096", "8"]
    (named,) = memory(capsys, "qwen3-30b-a3b", "--rank", "8")
    first, second = memory(capsys, *sizes)
    assert first == named
    assert second["adapters"] == first["adapters"]
    assert second["activations"] < first["activations"]


def test_biases_and_transposed_checkpoints_have_the_same_weights(capsys):
    (found,) = memory(capsys, "gpt-oss-20b")
    assert found["biases"] == 24 * 32 * (5760 + 2880) * 2
    # Quantised along in_features, whatever the checkpoint's order.
    assert found["formats"]["mxfp4"] == 24 * 32 * (5760 + 2880) * (2880 // 2 + 2880 // 32)


def test_memory_of_a_config(capsys, tmp_path):
    pytest.importorskip("transformers")
    config = {
        "model_type": "qwen3_moe", "num_hidden_layers": 3, "mlp_only_layers": [1],
        "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "vocab_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "decoder_sparse_step": 1,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (found,) = memory(capsys, str(tmp_path))
    assert found["num_layers"] == 2
    assert found["bfloat16"] == 2 * 4 * 3 * 64 * 32 * 2


def test_memory_as_text(capsys):
    assert cli.main(["explain", "GLM-4.5-Air", "--memory"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("45 layers of experts, GB (1e9 bytes)\n")
    assert "weights in nf4           51.41   25.8%" in text


@pytest.mark.parametrize(
    "arguments", [["Qwen3-30B-A3B", "--num-layers", "2"], [*SIZES[:4], "--rank", "0"]]
)
def test_refuses_what_memory_cannot_count(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", *arguments, "--memory"])
    assert ended.value.code == 2
    assert "--num-layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--gpu", "H100", "--table"], "--table goes with --memory"),
        (["--gpu", "H100", "--rank=8"], "--rank goes with --memory"),
        (["--gpu", "H100", "--num-layers=2"], "--num-layers goes with --memory"),
        (["--memory", "--gpu", "H100"], "--gpu goes without --memory"),
        (["--memory", "--kernel-config", SPECIALIZED], "--kernel-config goes without --memory"),
        (["--memory", "--quantized=nf4"], "--quantized goes without --memory"),
        (["--memory", "--separate-ops"], "--separate-ops goes without --memory"),
        (["--memory", "--table", "--json"], "--table goes without --json"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_refuses_what_the_form_does_not_read(arguments, reason, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", *SIZES, *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f": error: {reason}\n")


def test_defaults_of_the_other_form_are_taken(capsys):
    arguments = ["--gpu", "H100", "--rank=16", "--num-layers=1"]
    assert explained(capsys, *arguments) == explained(capsys, "--gpu", "H100")


def test_the_table_of_the_docs_is_what_the_command_prints(capsys):
    page = (Path(__file__).parents[2] / "docs" / "quantised.md").read_text(encoding="utf-8")
    assert "explain $model --memory --table" in page
    for model in MODELS:
        assert cli.main(["explain", model, "--memory", "--table"]) == 0
        assert capsys.readouterr().out in page
