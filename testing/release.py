# SPDX-License-Identifier: Apache-2.0
"""Makes a release: its version, its op schemas, its wheel and its sdist. It uploads nothing.

`make release VERSION=X.Y.Z` runs this after its checks of the pages and the GPU report. It writes
the version, op_schemas/released/X.Y.Z.yaml with every op's signature, and version and date over what
CHANGELOG.md has as unreleased. Each release has a file of signatures of its own, a patch release
too, and no file is written twice: what was released does not change. `since: "0.1"` in an op schema
means 0.1.0. Where a check fails, all files are as before.
"""

import argparse
import contextlib
import datetime
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from moe_ops._core.schema import OpSchema, load_all
from testing import distributions

ROOT = Path(__file__).resolve().parents[1]

# By the name of an op: its signature, "(Tensor input, ...) -> Tensor".
Signatures = Mapping[str, str]

HEADER = """\
# SPDX-License-Identifier: Apache-2.0
# The op schemas of {version}, written by `make release`. This file is never edited.

"""


class ReleaseError(ValueError):
    """The tree cannot be released; the message says why."""


COMMANDS = """\
Nothing was uploaded. To keep the release:
    git add src/moe_ops/_version.py CHANGELOG.md {file}
    git commit -m "Release {version}"
    git tag -a v{version} -m "moe_ops {version}"
To take it back:
    git checkout src/moe_ops/_version.py CHANGELOG.md
    rm -r {file} dist
Once it is out, write the next version into src/moe_ops/_version.py, such as {following}.dev0, and the heading
"{unreleased}" into CHANGELOG.md, above {version}.
"""

# The heading of the changelog that a release replaces.
UNRELEASED = "## Unreleased"


def publish(version: str, root: Path = ROOT) -> None:
    """Write version, schemas and changelog, build both distributions, and check them."""
    check_version(version, root)
    if changed := uncommitted(root):
        raise ReleaseError(f"expected a clean tree, got {changed[0]!r} and so on; commit it first")
    file, changelog = root / "src" / "moe_ops" / "_version.py", root / "CHANGELOG.md"
    with _as_before_on_failure(file, changelog, released_folder(root) / f"{version}.yaml"):
        dated = dated_changelog(changelog.read_text(encoding="utf-8"), version)
        changelog.write_text(dated, encoding="utf-8")
        written = release(version, root)
        text = file.read_text(encoding="utf-8")
        file.write_text(re.sub(r'"\d+\.\d+\.\d+[^"]*"', f'"{version}"', text), encoding="utf-8")
        wheel, sdist = distributions.build(root)
        if found := distributions.problems(wheel, sdist, version):
            raise ReleaseError("\n".join(found))
        distributions.check_texts(wheel, sdist)
        distributions.check_installation(wheel, version)
    major, minor, _ = _numbers(version)
    for made in (file, changelog, written, wheel, sdist):
        print(f"written: {made.relative_to(root)}")
    print(
        COMMANDS.format(
            version=version,
            file=written.relative_to(root),
            following=f"{major}.{minor + 1}.0",
            unreleased=UNRELEASED,
        ),
        end="",
    )


def dated_changelog(text: str, version: str) -> str:
    """Return the changelog with version and today's date in place of its heading "Unreleased".

    Raises:
        ReleaseError: there is no such heading, there are several, or nothing stands below it.
    """
    expected = f"CHANGELOG.md: expected one heading {UNRELEASED!r}, and below it what is new"
    _, *sections = re.split(f"^{UNRELEASED}$", text, flags=re.MULTILINE)
    if len(sections) != 1:
        raise ReleaseError(f"{expected}, got {len(sections) or 'none'}")
    if not sections[0].partition("\n## ")[0].strip():
        raise ReleaseError(f"{expected}, got one with nothing below")
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return re.sub(f"^{UNRELEASED}$", f"## {version} ({today})", text, flags=re.MULTILINE)


def uncommitted(root: Path) -> list[str]:
    """Return what git would tell of the tree, one line for each file; nothing if it is clean."""
    done = subprocess.run(
        ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ReleaseError(f"expected a git repository: {done.stderr.strip()}")
    return done.stdout.splitlines()


@contextlib.contextmanager
def _as_before_on_failure(*files: Path) -> Iterator[None]:
    before = {file: file.read_bytes() if file.exists() else None for file in files}
    try:
        yield
    except BaseException:
        for file, content in before.items():
            if content is not None:
                file.write_bytes(content)
            else:
                file.unlink(missing_ok=True)
        raise


def release(version: str, root: Path = ROOT) -> Path:
    """Write the schemas of the tree as those of `version` and return the file.

    Raises:
        ReleaseError: if `version` is not the pending one or was released before, or if the schemas
            break what an earlier release promised.
    """
    file = check_version(version, root)
    schemas = load_all(root / "op_schemas")
    signatures = {name: schema.schema for name, schema in sorted(schemas.items())}
    if found := problems(schemas, {**releases(root), version: signatures}):
        raise ReleaseError("\n".join(found))
    file.parent.mkdir(exist_ok=True)
    text = yaml.safe_dump(signatures, width=sys.maxsize)
    file.write_text(HEADER.format(version=version) + text, encoding="utf-8")
    return file


def check_version(version: str, root: Path = ROOT) -> Path:
    """Return the file that the release gets, or raise ReleaseError."""
    if re.fullmatch(r"\d+\.\d+\.\d+", version) is None:
        raise ReleaseError(f"expected VERSION=X.Y.Z, three numbers, got {version!r}")
    if version != (pending := pending_version(root)):
        raise ReleaseError(
            f"expected VERSION={pending}, as src/moe_ops/_version.py says, got {version}"
        )
    file = released_folder(root) / f"{version}.yaml"
    if file.exists():
        raise ReleaseError(f"{version} was released: {file.relative_to(root)} exists")
    return file


def pending_version(root: Path = ROOT) -> str:
    """Return the release that the tree becomes: 0.1.0 of 0.1.0.dev0."""
    text = (root / "src" / "moe_ops" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(\d+\.\d+\.\d+)', text, re.MULTILINE)
    if match is None:
        raise ReleaseError('expected __version__ = "X.Y.Z..." in src/moe_ops/_version.py')
    return match[1]


def released_folder(root: Path = ROOT) -> Path:
    """Return the folder with one file a release; it does not exist before the first one."""
    return root / "op_schemas" / "released"


def releases(root: Path = ROOT) -> dict[str, Signatures]:
    """Return what was released, by version."""
    return {
        file.stem: yaml.safe_load(file.read_text(encoding="utf-8"))
        for file in released_folder(root).glob("*.yaml")
    }


def problems(schemas: Mapping[str, OpSchema], released: Mapping[str, Signatures]) -> list[str]:
    """Return how the schemas and the releases contradict each other, one line each."""
    current = {name: schema.schema for name, schema in schemas.items()}
    found = []
    for version, kept in sorted(released.items(), key=lambda item: _numbers(item[0])):
        found += [f"{version}: {line}" for line in broken(kept, current)]
        for name, schema in schemas.items():
            has_it = _numbers(schema.since) <= _numbers(version)
            if has_it and name not in kept:
                found.append(f"{version}: {name}: since {schema.since}, but not in the release")
            elif name in kept and not has_it:
                found.append(f"{version}: {name}: since {schema.since}, but in the release")
    return found


def broken(released: Signatures, current: Signatures) -> list[str]:
    """Return what a caller of the released ops would notice, one line an op."""
    parse: Any = torch._C.parse_schema
    found = []
    for name, old in released.items():
        if name not in current:
            found.append(f"{name}: removed")
            continue
        new = current[name]
        parsed_old = parse(f"moe::{name}{old}")
        parsed_new = parse(f"moe::{name}{new}")
        # To the parser a SymInt is an int, but an op that takes ints compiles anew for every size.
        symbolic = re.findall(r"SymInt \w+", old)
        if not parsed_new.is_backward_compatible_with(parsed_old) or any(
            argument not in new for argument in symbolic
        ):
            found.append(f"{name}: {old} became {new}")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """Return the three numbers of a version, which may leave out trailing zeros."""
    numbers = [int(part) for part in version.split(".")]
    return (*numbers, *[0] * (3 - len(numbers)))


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Release the version that the command line names and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m testing.release", description=__doc__)
    parser.add_argument("version", help="X.Y.Z")
    try:
        publish(parser.parse_args(arguments).version, root)
    except (ReleaseError, RuntimeError) as error:
        print(f"ERROR: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
