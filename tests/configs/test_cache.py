# SPDX-License-Identifier: Apache-2.0
"""Later processes find tuned configurations on disk, and many may write at once."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_ops.configs import cache, choose
from moe_ops.configs.device import Device
from moe_ops.configs.heuristics import heuristic
from moe_ops.configs.kernel_config import (
    KernelConfigBackward_dW,
    KernelConfigForward,
)
from moe_ops.configs.kernel_string import kernel_config
from testing.problem_keys import make_problem

GPU = "NVIDIA H200"
DEVICE = Device(GPU, (9, 0), 232448, 132)
PROBLEM = make_problem("forward", "bfloat16", 8, 512, 256, 64, ("gather",))
CONFIG = KernelConfigForward(BLOCK_M=64, num_stages=5, group_m=3)
DW_KEY = "backward_dW bfloat16 E8 N512 D256 rows64"
DW_CONFIG = KernelConfigBackward_dW(BLOCK_M=32)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_OPS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("MOE_OPS_AUTOTUNE", raising=False)
    cache.forget()
    cache._warn_once.cache_clear()
    yield tmp_path
    cache.forget()


def python(script: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


LOOKUP = f"""
from moe_ops.configs.choose import choose
from moe_ops.configs.device import Device
from moe_ops.configs.heuristics import heuristic
from moe_ops.configs.problem import Problem
device = Device({GPU!r}, (9, 0), 232448, 132)
problem = Problem("forward", "bfloat16", 8, 512, 256, 64, gather=True)
config = choose(problem, device, None).config
print(config.group_m, config == heuristic(problem, device))
"""


@pytest.mark.slow
def test_another_process_finds_it():
    assert output_of(python(LOOKUP)).split()[1] == "True"
    cache.store(GPU, {PROBLEM.key: CONFIG})
    found, turned_off = python(LOOKUP), python(LOOKUP, MOE_OPS_AUTOTUNE="0")
    assert output_of(found).split() == ["3", "False"]
    assert output_of(turned_off).split()[1] == "True"


def test_order_of_choice(monkeypatch):
    given = KernelConfigForward(group_m=11)
    shipped = KernelConfigForward(group_m=12)
    text = kernel_config(forward=given)
    computed = heuristic(PROBLEM, DEVICE)
    monkeypatch.setattr(choose, "shipped", lambda name: {})
    cache.forget()
    assert choose.choose(PROBLEM, DEVICE, None).config == computed
    monkeypatch.setattr(choose, "shipped", lambda name: {PROBLEM.key: shipped})
    cache.forget()
    assert choose.choose(PROBLEM, DEVICE, None).config == shipped
    # Without forget(), what is stored holds from the next launch on.
    cache.store(GPU, {PROBLEM.key: CONFIG})
    assert choose.choose(PROBLEM, DEVICE, None).config == CONFIG
    assert choose.choose(PROBLEM, DEVICE, text).config == given
    cache.clear()
    assert choose.choose(PROBLEM, DEVICE, None).config == shipped


def test_a_second_choice_reads_nothing(monkeypatch):
    cache.store(GPU, {PROBLEM.key: CONFIG})
    choose.choose(PROBLEM, DEVICE, None)
    monkeypatch.setattr(cache, "lookup", None)
    monkeypatch.setattr(cache, "_read", None)
    assert choose.choose(PROBLEM, DEVICE, None).config == CONFIG


def test_round_trip_and_merge():
    cache.store(GPU, {PROBLEM.key: CONFIG})
    cache.store(GPU, {DW_KEY: DW_CONFIG})
    cache.forget()
    assert cache.lookup(GPU, PROBLEM.key) == CONFIG
    assert cache.lookup(GPU, DW_KEY) == DW_CONFIG
    content = json.loads(cache.path_of(GPU).read_text())
    assert content["device"] == GPU
    assert content["versions"] == cache.versions()
    assert content["configs"][PROBLEM.key] == CONFIG.to_dict()


def test_gpus_and_versions_do_not_mix(monkeypatch):
    cache.store(GPU, {PROBLEM.key: CONFIG})
    assert cache.lookup("NVIDIA H100", PROBLEM.key) is None
    for package in ("triton", "torch", "moe_ops"):
        other = {**cache.versions(), package: "99"}
        with monkeypatch.context() as patched:
            patched.setattr(cache, "versions", lambda other=other: other)
            assert cache.lookup(GPU, PROBLEM.key) is None, package
    assert cache.lookup(GPU, PROBLEM.key) == CONFIG


WRITE = f"""
import os
from moe_ops.configs import cache
from moe_ops.configs.kernel_config import KernelConfigForward
writer = int(os.environ["WRITER"])
for i in range(8):
    key = f"forward bfloat16 E8 N512 D{{writer}} rows{{2 ** i}}"
    cache.store({GPU!r}, {{key: KernelConfigForward(group_m=writer * 100 + i + 1)}})
"""


@pytest.mark.slow
def test_many_writers_and_a_reader(folder):
    writers = 4
    processes = [python(WRITE, WRITER=str(writer)) for writer in range(writers)]
    path, reads = cache.path_of(GPU), 0
    while any(process.poll() is None for process in processes):
        if path.exists():
            # It is a whole table at any time.
            cache.parse_table(path.read_text())
            reads += 1
    for process in processes:
        output_of(process)
    assert reads
    cache.forget()
    for writer in range(writers):
        for i in range(8):
            found = cache.lookup(GPU, f"forward bfloat16 E8 N512 D{writer} rows{2**i}")
            assert found is not None
            assert found.group_m == writer * 100 + i + 1
    # No temporary file is left.
    assert {file.name for file in path.parent.iterdir()} == {path.name, ".lock"}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"configs": []}', '{"configs": {"forward x": 3}}',
        '{"configs": {"": {}}}', '{"configs": {"sideways x": {}}}',
        '{"configs": {"forward x": {"BLOCK_M": 17}}}', '{"configs": {"forward x": {"color": 1}}}',
        '{"configs": {"forward x": {"BLOCK_M": "64"}}}', b"\xff\xfe",
        "[" * 100_000,
    ],
    ids=lambda text: repr(text)[:40],
)  # fmt: skip
def test_corrupt_file_is_empty(text, caplog):
    path = cache.path_of(GPU)
    path.parent.mkdir(parents=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with caplog.at_level(logging.WARNING, "moe_ops"):
        for _ in range(3):
            assert cache.lookup(GPU, PROBLEM.key) is None
            cache.forget()
    assert [str(path) in record.message for record in caplog.records] == [True]
    cache.store(GPU, {PROBLEM.key: CONFIG})
    cache.forget()
    assert cache.lookup(GPU, PROBLEM.key) == CONFIG


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON: Expecting value"),
        ("[]", 'expected a JSON object with an object "configs"'),
        ('{"configs": null}', 'expected a JSON object with an object "configs"'),
        ('{"configs": {"": {}}}', "expected keys that begin with one of"),
        ('{"configs": {"forward x": null}}', "'forward x': expected forward to be a JSON object"),
        ('{"configs": {"forward x": {"BLOCK_M": 17}}}', "'forward x': KernelConfigForward: exp"),
        ('{"configs": {"forward x": {"BLOCK_M": "64"}}}', "BLOCK_M of type int, got '64'"),
        ('{"configs": {"forward x": {}, "forward x": {}}}', "the key 'forward x' stands twice"),
        ('{"configs": ' + "[" * 100_000, "expected JSON nested at most 8 deep"),
    ],
    ids=lambda value: value[:40],
)
def test_parse_table_says_what_is_wrong(text, reason):
    with pytest.raises(ValueError, match=reason):
        cache.parse_table(text)


def test_unwritable_folder(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOE_OPS_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "moe_ops"):
        cache.store(GPU, {PROBLEM.key: CONFIG})
        cache.store(GPU, {DW_KEY: DW_CONFIG})
    # They are kept in memory, and the log says so once.
    assert cache.lookup(GPU, PROBLEM.key) == CONFIG
    assert len([r for r in caplog.records if "cannot keep" in r.message]) == 1


def test_clear(folder):
    cache.clear()
    cache.store(GPU, {PROBLEM.key: CONFIG})
    cache.store("NVIDIA H100", {PROBLEM.key: CONFIG})
    (folder / "other.json").write_text("{}")
    cache.clear()
    assert cache.lookup(GPU, PROBLEM.key) is None
    assert not list(cache.directory().glob("*.json"))
    assert (folder / "other.json").exists()


def test_places(monkeypatch, tmp_path):
    assert cache.directory() == tmp_path / "configs"
    monkeypatch.delenv("MOE_OPS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.directory() == Path("/xdg/moe_ops/configs")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert cache.directory() == Path("/home/user/.cache/moe_ops/configs")


def test_no_home(monkeypatch):
    monkeypatch.delenv("MOE_OPS_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert cache.directory().parts[-2:] == ("moe_ops", "configs")
    assert cache.lookup(GPU, PROBLEM.key) is None


def test_table_file_is_readable_line_by_line(tmp_path):
    path = tmp_path / "table.json"
    cache.write_table(path, GPU, {PROBLEM.key: CONFIG, DW_KEY: DW_CONFIG})
    text = path.read_text()
    assert cache.parse_table(text) == {PROBLEM.key: CONFIG, DW_KEY: DW_CONFIG}
    starts = [line.partition(":")[0] for line in text.splitlines()]
    assert starts.index(f'"{DW_KEY}"') + 1 == starts.index(f'"{PROBLEM.key}"')
