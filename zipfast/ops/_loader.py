# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled libraries beside the package; says which there are and, where one is missing, why."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
LOADED: dict[str, bool] = {}
ERRORS: dict[str, str] = {}


def load(name: str) -> bool:
    """Load ``_<name>.so`` once; False, with a reason in ``ERRORS``, if it cannot be had."""
    if name in LOADED:
        return LOADED[name]
    path = HERE / f"_{name}.so"
    LOADED[name] = False
    if not path.exists():
        ERRORS[name] = f"{path.name} was not built"
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError as e:
        ERRORS[name] = f"{path.name} was built but does not load: {e}"
        return False
    LOADED[name] = True
    return True


def load_all() -> None:
    """Load what this torch can use; one plain warning where the compiled CPU kernels are missing."""
    if os.environ.get("ZIPFAST_BACKEND") == "torch":
        ERRORS.update(dict.fromkeys(("cpu", "cuda"), "not loaded, as ZIPFAST_BACKEND=torch"))
        return
    load("cpu")
    # _cuda.so loads under a CPU-only torch too (the checks use that); by default it is not even tried there.
    if torch.version.cuda is not None or os.environ.get("ZIPFAST_LOAD_CUDA") == "1":
        load("cuda")
    else:
        ERRORS["cuda"] = f"torch {torch.__version__} is a CPU build"
    if not LOADED["cpu"]:
        warnings.warn(
            f"zipfast: the compiled CPU kernels are missing ({ERRORS['cpu']}); the slower pure-torch ones serve instead. "
            "Install a C++ compiler, then: pip install --force-reinstall --no-deps --no-cache-dir zipfast",
            RuntimeWarning,
            stacklevel=3,
        )
