# SPDX-License-Identifier: Apache-2.0
"""The operators.  One file per op: schema, contract, reference, fake kernel; docs/ops.md has a row for each."""

from ._registry import OPS, available, backend, why_not
from .evidence import evidence
from .moments import moments_
from .regroup import regroup
from .zip_match import zip_match

__all__ = ["OPS", "available", "backend", "evidence", "moments_", "regroup", "why_not", "zip_match"]
