# SPDX-License-Identifier: Apache-2.0
"""Imports modules of a public checkout as its own scripts do, and takes them out of ``sys.modules`` again.

ZIPFAST_ZIPIT names a checkout of github.com/gstoica27/ZipIt, ZIPFAST_LOGME one of github.com/thuml/LogME.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

# What the ZipIt checkout imports at the top of files and a merge does not need: module -> names taken from it.
UNUSED = {
    "fvcore": (),
    "fvcore.nn": (),
    "fvcore.nn.flop_count": ("flop_count",),
    "clip": (),
    "einops": (),
    "yaml": (),
    "matplotlib": (),
    "matplotlib.pyplot": (),
}

STUBBED = {name.split(".")[0] for name in UNUSED}


@contextlib.contextmanager
def imported(variable: str, names: list[str]) -> Iterator[dict[str, types.ModuleType]]:
    """The modules `names` of the checkout that the environment variable names; skips where it names none."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"set {variable} to a checkout of the public code to compare with it")
    path, before = str(Path(folder).resolve()), set(sys.modules)
    sys.path.insert(0, path)
    try:
        for name, members in UNUSED.items():
            try:
                importlib.import_module(name)
            except ImportError:
                sys.modules[name] = types.ModuleType(name)
                vars(sys.modules[name]).update(dict.fromkeys(members))
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(path)
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if name not in before and (str(file).startswith(path) or (name.split(".")[0] in STUBBED and not file)):
                del sys.modules[name]
