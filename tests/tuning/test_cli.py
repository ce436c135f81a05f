# SPDX-License-Identifier: Apache-2.0
"""`python -m moe_ops tune` tunes, `show` prints the code of an op, and `env` what was tuned."""

import json
import sys

import pytest
import torch

from moe_ops import cli, tuning
from moe_ops._core import library
from moe_ops.cli.env import configurations
from moe_ops.cli.show import show
from moe_ops.configs import cache
from moe_ops.tuning import Experts

SIZES = ["--hidden-size=16", "--intermediate-size=24", "--num-experts=3", "--top-k=2"]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def write_config(folder, **fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def qwen3(folder, **fields):
    return write_config(
        folder, model_type="qwen3_moe", hidden_size=32, intermediate_size=40,
        moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=48, **fields,
    )  # fmt: skip


def failure(capsys, *arguments, status=1):
    """Return the one line that a failing command says."""
    with pytest.raises(SystemExit) as raised:
        cli.main(["tune", *map(str, arguments)])
    if status == 1:
        return raised.value.code
    assert raised.value.code == status
    return capsys.readouterr().err.splitlines()[-1]


def test_sizes(fake_gpu, capsys, tmp_path):
    table = tmp_path / "table.json"
    arguments = ["tune", *SIZES, "--num-tokens", "6", "--dtype=float32", f"--output={table}"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == f"6 configurations for NVIDIA H100 in {table}\n"
    assert "[6/6] " in err
    content = json.loads(table.read_text())
    assert content["device"] == "NVIDIA H100"
    assert content["versions"] == cache.versions()
    layer = Experts(3, 2, (48, 16), (16, 24), torch.float32)
    keys = {task.problem.key for task in tuning.tasks_of([layer], [6])}
    assert content["configs"].keys() == keys
    # The table has the package's format, and the disk cache has the same.
    for key, config in cache.parse_table(table.read_text()).items():
        assert cache.lookup("NVIDIA H100", key) == config


def test_output_is_added_to(fake_gpu, tmp_path):
    table = tmp_path / "table.json"
    for tokens in ("1", "64"):
        options = ["--num-tokens", tokens, "--dtype=float32", f"--output={table}"]
        assert cli.main(["tune", *SIZES, *options]) == 0
    assert len(cache.parse_table(table.read_text())) == 12


@pytest.fixture
def layers(fake_gpu, monkeypatch):
    """Return the list of layers that would be tuned."""
    found: list[Experts] = []

    def tasks_of(layers, *_):
        found.extend(layers)
        return []

    monkeypatch.setattr(tuning, "tasks_of", tasks_of)
    return found


def test_flags_of_sizes(layers):
    cli.main(["tune", *SIZES, "--bias", "--transposed", "--ungated"])
    assert layers == [Experts(3, 2, (24, 16), (16, 24), torch.bfloat16, True, True)]


@pytest.mark.parametrize("as_file", [True, False])
def test_config(as_file, layers, tmp_path):
    pytest.importorskip("transformers")
    folder = qwen3(tmp_path, dtype="float16")
    cli.main(["tune", str(folder / "config.json" if as_file else folder)])
    assert layers == [Experts(4, 2, (48, 32), (32, 24), torch.float16)]
    layers.clear()
    cli.main(["tune", str(folder), "--dtype=float32"])
    assert layers == [Experts(4, 2, (48, 32), (32, 24), torch.float32)]


def test_dense_config(fake_gpu, capsys, tmp_path):
    pytest.importorskip("transformers")
    folder = write_config(tmp_path, model_type="qwen3", hidden_size=32, num_hidden_layers=1,
                          num_attention_heads=4, intermediate_size=40, vocab_size=48)  # fmt: skip
    assert "expected a model with experts" in failure(capsys, folder)


@needs_no_gpu
def test_without_a_gpu(capsys):
    message = "python -m moe_ops tune: expected a CUDA GPU, got none that this torch sees"
    assert failure(capsys, *SIZES) == message


def test_turned_off(capsys, monkeypatch):
    monkeypatch.setenv("MOE_OPS_AUTOTUNE", "0")
    message = "python -m moe_ops tune: MOE_OPS_AUTOTUNE=0 turns tuning off"
    assert failure(capsys, *SIZES) == message


def test_rejects_missing_sizes(capsys):
    message = failure(capsys, *SIZES[:2], status=2)
    assert message.endswith("error: --num-experts --top-k missing")
    message = failure(capsys, status=2)
    sizes = "--hidden-size --intermediate-size --num-experts --top-k"
    assert message.endswith(f"error: expected CONFIG, or {sizes}")


def test_rejects_both(capsys, tmp_path):
    message = failure(capsys, tmp_path, *SIZES, status=2)
    both = f"{tmp_path} and --hidden-size"
    assert message.endswith(f"expected CONFIG or explicit sizes, got both: {both}")


def test_rejects_an_output_without_folder(capsys, tmp_path):
    message = failure(capsys, *SIZES, f"--output={tmp_path}/none/table.json", status=2)
    assert "expected --output in an existing folder" in message


def test_rejects_a_missing_config(capsys, tmp_path):
    assert failure(capsys, tmp_path).endswith(f": no config.json in {tmp_path}")


@pytest.mark.parametrize("text", ["{", '{"model_type": "no such model"}', "{}"])
def test_rejects_a_bad_config(text, fake_gpu, capsys, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(text)
    message = failure(capsys, tmp_path)
    assert message.startswith("python -m moe_ops tune: ")
    assert "\n" not in message


def test_without_transformers(fake_gpu, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "give --hidden-size" in failure(capsys, qwen3(tmp_path))


def test_rejects_more_experts_a_token_than_there_are(capsys):
    message = failure(capsys, *SIZES, "--top-k=4")
    assert message.endswith("expected --top-k at most --num-experts (3), got 4")


@pytest.mark.parametrize("option", ["--top-k=0", "--num-tokens=0"])
def test_rejects_sizes_below_one(option, capsys):
    name = option.removesuffix("=0")
    assert failure(capsys, *SIZES, option).endswith(f"expected {name} >= 1, got 0")


@pytest.mark.parametrize("command", ["explain", "tune", "bench"])
@pytest.mark.parametrize("name", ["--hidden-size", "--num-tokens"])
def test_rejects_sizes_that_no_tensor_has(command, name):
    with pytest.raises(SystemExit, match=rf"expected {name} < 2\*\*63, got {2**63}$"):
        cli.main([command, *SIZES, name, str(2**63)])


@pytest.mark.parametrize("op", sorted(library.OPS))
def test_show_begins_with_the_definition_and_the_reference(op, capsys):
    assert cli.main(["show", op]) == 0
    lines = capsys.readouterr().out.splitlines()
    schema = library.OPS[op].schema
    assert lines[:2] == [
        f"=== Definition (op_schemas/{op}.yaml, since {schema.since})",
        f"torch.ops.moe.{op}{schema.schema}",
    ]
    code = next(n for n, line in enumerate(lines) if line.startswith("=== Code"))
    between = lines[lines.index("=== Reference") + 1 : code]
    assert [argument.name for argument in schema.arguments] == [
        line.split()[0]
        for line in between[between.index("Args:") : between.index("Returns:")]
        if line.startswith("    ") and not line.startswith("        ")
    ]
    assert lines[code + 1 :] == library.OPS[op].generated.source.rstrip().splitlines()
    assert cli.main(["show", op, "--no-code"]) == 0
    assert capsys.readouterr().out.splitlines() == lines[: code - 1]


@pytest.mark.parametrize("op", sorted(library.OPS))
def test_show_fits_a_terminal(op, capsys, monkeypatch):
    """Nothing is wider than the terminal, and nothing but spaces is added or lost."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["show", op]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert shown.split() == "\n".join(show(op, with_code=True)).split()


def test_env_says_once_why_nothing_serves_the_ops(capsys, monkeypatch):
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "xx")
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in library.OPS:
        (row,) = [line.split() for line in lines if line.split()[:1] == [name]]
        assert row == [name, "none", "(1)", "none", "(2)"]
    no_such = "tensors have no such implementation; expected"
    assert lines[-2:] == [
        f"(1) MOE_OPS_IMPLEMENTATION=xx: cpu {no_such} pytorch or triton",
        f"(2) MOE_OPS_IMPLEMENTATION=xx: cuda {no_such} triton or pytorch",
    ]


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_env_says_that_a_table_cannot_be_read(text, monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_OPS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 7))
    assert next(iter(configurations())) == "Some GPU: 0 shipped, 0 tuned"
    file = cache.path_of("Some GPU")
    file.parent.mkdir()
    file.write_text(text)
    found = next(iter(configurations()))
    assert found.startswith(f"Some GPU: 0 shipped, none tuned, since {file} cannot be read: ")
