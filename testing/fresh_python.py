# SPDX-License-Identifier: Apache-2.0
"""Makes an environment that sees this one's packages, but not moe_ops, and runs programs in it.

Nothing is fetched.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program without the settings of Python and pip of this process, and without an index."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    environment |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def checked(*command: str | Path, cwd: Path) -> str:
    """Run a program that must succeed, and return what it printed."""
    done = run(*command, cwd=cwd)
    if done.returncode != 0:
        raise RuntimeError(f"{command}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def site_packages(python: Path) -> Path:
    """Return the folder that an environment's pip installs into."""
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(checked(python, "-I", "-c", query, cwd=Path(sys.prefix)).strip())


def fresh_python(folder: Path) -> Path:
    """Return the Python of a new environment in the folder.

    --system-site-packages would show the packages of the interpreter that this environment was
    made from, and this environment's own moe_ops must not answer for one that failed to install.
    """
    packages = folder / "packages"
    packages.mkdir()
    for directory in map(Path, sys.path):
        if directory.name in {"site-packages", "dist-packages"} and directory.is_dir():
            for entry in directory.iterdir():
                link = packages / entry.name
                if "moe_ops" not in entry.name.lower() and not link.exists():
                    link.symlink_to(entry)
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    (site_packages(python) / "packages.pth").write_text(f"{packages}\n", encoding="utf-8")
    absent = run(python, "-I", "-c", "import moe_ops", cwd=folder)
    assert "No module named 'moe_ops'" in absent.stderr
    return python


def pip_install(python: Path, *arguments: str | Path, cwd: Path) -> None:
    """Install with what is there: no dependency, no environment for the build."""
    checked(
        *(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", *arguments),
        cwd=cwd,
    )
