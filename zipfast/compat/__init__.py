# SPDX-License-Identifier: Apache-2.0
"""The names and results that other tools already call; one module per tool."""

from . import logme, open_lth, prune, swa, zipit

__all__ = ["logme", "open_lth", "prune", "swa", "zipit"]
