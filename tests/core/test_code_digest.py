# SPDX-License-Identifier: Apache-2.0
"""A change of code changes the digest, a comment does not, and every Python finds the same."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from testing.code_digest import code_sha256
from testing.gpu_report import module_digests

ROOT = Path(__file__).resolve().parents[2]

# For this code ast.dump shows another syntax tree on each version of Python.
SOURCE = '''
from __future__ import annotations
import a.b as c
from . import d
class Shape(Base, metaclass=Meta):
    """A docstring."""
    size: int = 1
    """A docstring of size."""
@decorated(1, *some, key=u"text", **more)
async def run(first, /, second: int | None = None, *rest: str, third, fourth=4.0, **others) -> str:
    """A docstring."""
    global counter
    await first[1:2, ...]
    numbers = {**others, "x": 1j, 2: b"\\x00\\xff", True: None, -3: 1e400}
    text = "implicit " f"{first!r:>{second}} and {third = } {{}}" " concatenation" f"" f"{fourth:}"
    other = "é \\u0378 \\U0001f600 \\ud800"
    with open(first) as x, something():
        pass
    async with first as (x, y):
        return [z async for z in numbers if (n := z)]
    try:
        raise Error from None
    except (OSError, ValueError) as error:
        del error
    else:
        lambda x, *, y=None: x
    finally:
        assert first is not second, "text"
    match first:
        case {"x": [1, *_], **rest} | Shape(size=None) if second:
            pass
        case _:
            nonlocal_ = (yield first)
'''
# The digest of SOURCE as Python 3.10, 3.11, 3.12 and 3.13 find it.
PINNED = "1119db87423c56bc199cb57a5e44b2344605264dcfdf318aa5b664913de9f000"


def test_digest_is_that_of_other_versions():
    assert code_sha256(SOURCE) == PINNED


def other_pythons() -> list[Path]:
    """Return the interpreters of other versions that are installed beside this one."""
    here = Path(sys.base_prefix)
    found = [folder / "bin" / "python3" for folder in sorted(here.parent.glob("3.*"))]
    old = re.compile(r"3\.[0-9]\.")
    return [
        p for p in found if p.exists() and p.parents[1] != here and not old.match(p.parents[1].name)
    ]


def test_every_python_here_finds_the_same():
    """They have neither torch nor PyYAML."""
    script = """
import json, sys
from testing.code_digest import code_sha256
from testing.gpu_report import module_digests
print(json.dumps([code_sha256(sys.stdin.read()), module_digests()]))
"""
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no other Python is installed beside this one; the pinned digest was compared")
    for python in pythons:
        done = subprocess.run(
            [python, "-S", "-c", script], input=SOURCE, cwd=ROOT, encoding="utf-8",
            capture_output=True, check=False, timeout=120, env={"PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        assert done.returncode == 0, f"{python}: {done.stderr}"
        assert json.loads(done.stdout) == [code_sha256(SOURCE), module_digests()], python


BEFORE = '''
"""Docstring."""
__version__ = "1"
def scale(x, factor=2):
    """Docstring."""
    return x * factor  # comment
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# comment", "# another"),
        ("\n    return", "\n\n    # a comment\n    return"),
        ('"""Docstring."""', "'''Another.'''"),
        ('    """Docstring."""\n', ""),
        ("x * factor", "(x\n        * factor)"),
        ('"1"', '"2"'),
        ("\n", "\r\n"),
    ],
    ids=["comment", "new comment", "docstring", "no docstring", "layout", "version", "line ends"],
)
def test_what_changes_nothing(old, new):
    after = BEFORE.replace(old, new)
    assert after != BEFORE
    assert code_sha256(after) == code_sha256(BEFORE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("factor=2", "factor=3"),
        ("factor=2", "factor=2.0"),
        ("factor=2", "factor=None"),
        ("factor=2", "factor='2'"),
        ("factor=2", "factor=b'2'"),
        ("factor=2", "factor"),
        ("factor=2", "factor: int = 2"),
        ("factor=2", "*, factor=2"),
        ("x * factor", "x + factor"),
        ("x * factor", "factor * x"),
        ("return x * factor", "x * factor"),
        ("return x * factor", "return 'x * factor'"),
        ("return x * factor", "return f'{x * factor}'"),
        ("__version__", "VERSION"),
        ('__version__ = "1"', "__version__ = version()"),
        ("def ", "@decorated\ndef "),
        ("scale", "scaled"),
    ],
)
def test_what_changes_the_digest(old, new):
    after = BEFORE.replace(old, new)
    assert after != BEFORE
    assert code_sha256(after) != code_sha256(BEFORE)


def test_all_of_these_differ_from_each_other():
    codes = [
        "x = None", "x = 0", "x = False", "x = ''", "x = []", "x = ()", "x = {}", "x = [None]",
        "x = {None: 1}", "x = {**None}", "x: None", "x: None = None", "x = y", "x = 'y'", "x = f'y'",
        "x = f'{y}'", "x = f'{y!r}'", "x = f'{y:r}'", "x = 'é'", "x = b'\\xe9'", "x = '\\\\xe9'",
        "def x(): return", "def x(): return None", "async def x(): return", "class x: pass",
    ]  # fmt: skip
    digests = {code_sha256(code) for code in codes}
    assert len(digests) == len(codes)
