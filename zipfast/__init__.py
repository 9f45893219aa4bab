# SPDX-License-Identifier: Apache-2.0
"""zipfast: the fast, exact backend for merging, ranking, souping and pruning trained networks."""

from . import ops
from .ops import _loader
from .ops import available, backend

_loader.load_all()

__version__ = "0.1.0"
__all__ = ["__version__", "available", "backend", "ops"]
