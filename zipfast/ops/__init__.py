# SPDX-License-Identifier: Apache-2.0
"""The operators.  One file per op: schema, contract, reference, fake kernel; docs/ops.md has a row for each."""

from ._registry import OPS, available, backend, why_not
from .apply_mask import apply_mask_
from .blend import blend_
from .correlate import correlate
from .evidence import evidence
from .gram import gram
from .masked_step import masked_step_
from .mlp_steps import mlp_steps_
from .moments import moments_
from .multidot import multidot
from .regroup import regroup
from .sparse_linear import sparse_linear, sparse_linear_input, sparse_linear_weight
from .threshold import threshold
from .zip_match import zip_match

__all__ = [
    "OPS",
    "apply_mask_",
    "available",
    "backend",
    "blend_",
    "correlate",
    "evidence",
    "gram",
    "masked_step_",
    "mlp_steps_",
    "moments_",
    "multidot",
    "regroup",
    "sparse_linear",
    "sparse_linear_input",
    "sparse_linear_weight",
    "threshold",
    "why_not",
    "zip_match",
]
