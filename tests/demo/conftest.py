# SPDX-License-Identifier: Apache-2.0
"""Hold what the tests of the demo programs share. They import modules as the programs do."""

import socket
import sys
from pathlib import Path

import pytest
import torch

# Python does this when it is given the path of a program in that folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))


@pytest.fixture
def no_network(monkeypatch):
    def connect(self, address):
        raise AssertionError(f"the demo connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture
def no_compiler(monkeypatch):
    """Do what CXX=/nonexistent does in a fresh process, and save Inductor's seconds."""
    monkeypatch.setenv("CXX", "/nonexistent")
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent")}):
        yield
