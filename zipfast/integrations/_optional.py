# SPDX-License-Identifier: Apache-2.0
"""Optional packages: imported when used, refused by name and version."""

from __future__ import annotations

import importlib
import re
from types import ModuleType

#: package -> (module, oldest version supported, first one that is not)
WINDOWS = {
    "transformers": ("transformers", "4.46", "6"),
    "accelerate": ("accelerate", "1.1", "2"),
    "timm": ("timm", "0.9", "2"),
    "scikit-learn": ("sklearn", "1.6", "2"),
    "huggingface_hub": ("huggingface_hub", "0.23", "3"),
}


def optional(package: str, who: str, also: str = "") -> ModuleType:
    """The module of an optional package.

    Args:
        package: of :data:`WINDOWS`. who: what needs it, for messages. also: packages that pip has to install beside it.

    Raises:
        ImportError: it is not there, or cannot be imported, or is of an unsupported version; with the pip command.

    Example:
        >>> optional("scikit-learn", "doctest").__name__
        'sklearn'
    """
    module, least, below = WINDOWS[package]
    command = f"pip install '{package}>={least},<{below}'" + (f" {also}" if also else "")
    try:
        found = importlib.import_module(module)
    except ImportError as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ImportError(f"{who}: {package} must be installed, got {why}; {command}") from e
    version = str(getattr(found, "__version__", ""))
    numbers = numbers_of(version)
    if numbers and not numbers_of(least) <= numbers < numbers_of(below):
        raise ImportError(
            f"{who}: {package} must be of version {least} or later and below {below}, got {version}; {command}"
        )
    return found


def numbers_of(version: str) -> tuple[int, ...]:
    """The leading numbers of a version; of a development version those of the release it leads to.

    >>> numbers_of("4.57.6"), numbers_of("5.0.0rc1"), numbers_of("6.0.0.dev0"), numbers_of("")
    ((4, 57, 6), (5, 0, 0), (6, 0, 0), ())
    """
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
