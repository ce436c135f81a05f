# SPDX-License-Identifier: Apache-2.0
"""`python -m moe_ops` helps without a command, ends quietly after `| head`, and errs in one line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from moe_ops import cli

SIZES = ["--hidden-size=64", "--intermediate-size=32", "--num-experts=8", "--top-k=2"]
FULL = Path("/dev/full")


def failure(capsys, *arguments):
    """Return the exit status and all that stderr gets of a failing command."""
    with pytest.raises(SystemExit) as raised:
        cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert out == ""
    if isinstance(raised.value.code, str):
        assert err == ""
        return 1, raised.value.code
    return raised.value.code, err.removesuffix("\n")


def test_without_a_command_it_helps(capsys):
    assert cli.main([]) == 0
    bare, err = capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["--help"])
    assert capsys.readouterr().out == bare
    assert err == ""
    for command in ("env", "show", "explain", "tune", "bench"):
        assert f"\n    {command} " in bare


def run_into(
    stdout: int | IO[str], command: list[str], buffering: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, with PYTHONUNBUFFERED set to `buffering`."""
    return subprocess.run(
        [sys.executable, "-m", "moe_ops", *command],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": buffering},
    )


@pytest.mark.parametrize(
    ("command", "buffering"),
    [(["show", "grouped_gemm"], ""), (["show", "grouped_gemm"], "1"), (["env"], ""), ([], "1")],
)
def test_no_traceback_where_nobody_reads_on(command, buffering):
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = run_into(write_end, command, buffering)
    os.close(write_end)
    assert process.stderr == ""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("command", "buffering"), [(["show", "permute", "--no-code"], ""), (["env"], "1")]
)
def test_a_full_disk_is_one_line(command, buffering):
    with FULL.open("w") as full:
        process = run_into(full, command, buffering)
    assert process.stderr == "python -m moe_ops: [Errno 28] No space left on device\n"
    assert process.returncode == 1


def test_ctrl_c(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "show", interrupted)
    assert cli.main(["show", "permute"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "python -m moe_ops: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nope"], "argument COMMAND: invalid choice: 'nope'"),
        (["env", "--x"], "unrecognized arguments: --x"),
        (["show"], "the following arguments are required: OP"),
        (["show", "nope"], "argument OP: invalid choice: 'nope'"),
        (["explain"], "expected CONFIG, or --hidden-size"),
        (["explain", *SIZES[:3]], "--top-k missing"),
        (["explain", "--hidden-size=x"], "argument --hidden-size: invalid int value: 'x'"),
        (["explain", *SIZES, "--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
        (["explain", *SIZES, "--kernel-config={"], "--kernel-config: not JSON: "),
        (["bench", *SIZES, "--seconds=0"], "expected --seconds above 0"),
        (
            ["bench", *SIZES, "--plot=/no/such/folder/x.png"],
            "expected --plot in an existing folder",
        ),
        (["bench", *SIZES, "--separate-ops"], "unrecognized arguments: --separate-ops"),
        (["bench", *SIZES, "--against=cutlass"], "argument --against: invalid choice: 'cutlass'"),
        (["tune", *SIZES, "--output=/no/such/folder/x.json"], "expected --output in an existing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line(arguments, reason, capsys):
    status, line = failure(capsys, *arguments)
    assert status == 2
    assert line.startswith("python -m moe_ops")
    assert f": error: {reason}" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("command", "is_listed"), [("explain", True), ("tune", True), ("bench", False)]
)
def test_help_lists_separate_ops_where_they_are_taken(command, is_listed, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([command, "--help"])
    assert ("--separate-ops" in capsys.readouterr().out) == is_listed


@pytest.mark.parametrize("command", ["explain", "bench"])
def test_json_takes_no_file_name(command, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([command, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "print the rows as JSON to stdout; takes no file name" in told
    both = "expected CONFIG or explicit sizes, got both: x.json and --hidden-size"
    hint = "; --json prints to stdout and takes no file name"
    for arguments, reason in ((["--json", "x.json"], both + hint), (["x.json"], both)):
        status, line = failure(capsys, command, *SIZES, *arguments)
        assert status == 2
        assert line.endswith(f": error: {reason}")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "cannot use"),
        ({"model_type": "nope"}, "model type `nope`"),
        ({"model_type": "llama", "hidden_size": "x"}, "field 'hidden_size'"),
        ({"model_type": "qwen3_moe", "num_attention_heads": 0}, "cannot use"),
        ("{", "is not a valid JSON file"),
    ],
    ids=str,
)
def test_a_bad_config_is_one_line(fields, reason, capsys, tmp_path):
    pytest.importorskip("transformers")
    text = fields if isinstance(fields, str) else json.dumps(fields)
    (tmp_path / "config.json").write_text(text)
    status, line = failure(capsys, "explain", tmp_path, "--gpu=H100")
    assert status == 1
    assert line.startswith("python -m moe_ops explain: transformers cannot use ")
    assert reason in line
    assert "\n" not in line


@pytest.mark.parametrize("command", ["explain", "tune", "bench"])
def test_a_config_that_is_none_is_told_from_a_bad_one(command, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_OPS_AUTOTUNE", "1")
    monkeypatch.setenv("MOE_OPS_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "config.json"

    def told(config):
        status, line = failure(capsys, command, config)
        assert status == 1
        return line.removeprefix(f"python -m moe_ops {command}: ")

    names = "Qwen3-30B-A3B, gpt-oss-20b, GLM-4.5-Air"
    expected = f"expected CONFIG to be a config.json, its folder, or one of {names}, got "
    assert told("Qwen3-30B") == expected + "Qwen3-30B"
    assert told(file) == expected + str(file)
    assert told(tmp_path) == f"no config.json in {tmp_path}"
    for content, kind in (("[]", "list"), ("3", "int")):
        file.write_text(content)
        assert told(tmp_path) == f"expected {file} to hold an object, got {kind}"
