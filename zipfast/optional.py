# SPDX-License-Identifier: Apache-2.0
"""Optional packages: imported when used, refused by name and version."""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any

#: package -> (module, oldest version supported, first one that is not)
WINDOWS = {
    "transformers": ("transformers", "4.40", "6"),
    "timm": ("timm", "0.9", "2"),
    "scikit-learn": ("sklearn", "1.6", "2"),
}


class UnsupportedVersion(ImportError):
    """The package is there, but older or newer than what is supported."""


def optional(package: str, who: str, also: str = "", least: str = "") -> ModuleType:
    """The module of an optional package.

    Args:
        package: of :data:`WINDOWS`. who: what needs it, for messages. also: packages that pip has to install beside it.
        least: the oldest version that serves here, if it is later than that of the table.

    Raises:
        ImportError: it is not there, or cannot be imported, or is of an unsupported version; with the pip command.

    Example:
        >>> optional("scikit-learn", "doctest").__name__
        'sklearn'
    """
    try:
        found = importlib.import_module(WINDOWS[package][0])
    except ImportError as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ImportError(f"{who}: {package} must be installed, got {why}; {_command(package, also, least)}") from e
    check_version(found, package, who, also, least)
    return found


def check_version(module: Any, package: str, who: str, also: str = "", least: str = "") -> None:
    """Refuse a module of an unsupported version; arguments and errors as of :func:`optional`."""
    _, oldest, below = WINDOWS[package]
    oldest, version = least or oldest, str(getattr(module, "__version__", ""))
    numbers = numbers_of(version)
    if numbers and not numbers_of(oldest) <= numbers < numbers_of(below):
        wanted = f"of version {oldest} or later and below {below}"
        raise UnsupportedVersion(f"{who}: {package} must be {wanted}, got {version}; {_command(package, also, least)}")


def _command(package: str, also: str, least: str) -> str:
    _, oldest, below = WINDOWS[package]
    return f"pip install '{package}>={least or oldest},<{below}'" + (f" {also}" if also else "")


def numbers_of(version: str) -> tuple[int, ...]:
    """The leading numbers of a version; of a development version those of the release it leads to.

    >>> numbers_of("4.57.6"), numbers_of("5.0.0rc1"), numbers_of("6.0.0.dev0"), numbers_of("")
    ((4, 57, 6), (5, 0, 0), (6, 0, 0), ())
    """
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
