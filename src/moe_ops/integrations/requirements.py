# SPDX-License-Identifier: Apache-2.0
"""Say which library a module needs, where it is missing or too old."""

from __future__ import annotations

from types import ModuleType

from torch.torch_version import TorchVersion


def missing(module: str, library: str, minimum: str, error: ImportError) -> ImportError:
    """Return what a module raises that cannot import its library."""
    return ImportError(
        f"{module}: expected {library} >= {minimum}, got none that can be imported ({error}); "
        f"pip install '{library}>={minimum}'"
    )


def check_version(module: str, library: ModuleType, minimum: str) -> None:
    """Refuse a library that is too old.

    Raises:
        ImportError: it is.
    """
    name, version = library.__name__, library.__version__
    if TorchVersion(version) < minimum:
        raise ImportError(
            f"{module}: expected {name} >= {minimum}, got {version}; pip install -U {name}"
        )
