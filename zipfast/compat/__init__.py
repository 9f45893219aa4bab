# SPDX-License-Identifier: Apache-2.0
"""The names and results that other tools already call; one module per tool."""

from . import prune, zipit

__all__ = ["prune", "zipit"]
