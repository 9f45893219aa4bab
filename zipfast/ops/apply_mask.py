# SPDX-License-Identifier: Apache-2.0
"""``apply_mask_``: packed masks applied to lists of weights, or to what they are rewound to (Frankle & Carbin 2019)."""

from __future__ import annotations

from torch import Tensor

from . import _check as check
from ._mask import check_list, check_masks, check_written, masked
from ._registry import op

NAME = "apply_mask_"


def _contract(out: list[Tensor], mask: list[Tensor], source: list[Tensor]) -> None:
    check.check_tensors(NAME, "out", out)
    check_written(NAME, "out", out)
    check_masks(NAME, "mask", mask, out, "out")
    check_list(NAME, "source", source, len(out), "out")
    for i, (t, wanted) in enumerate(zip(source, out)):
        check.check_dtype(NAME, f"source[{i}]", t, (wanted.dtype,))
        check.check_device(NAME, f"source[{i}]", t, wanted.device)
        check.check_shape(NAME, f"source[{i}]", t, wanted.shape, "the shape of 'out'")


def _fake(out: list[Tensor], mask: list[Tensor], source: list[Tensor]) -> None:
    return None


@op("apply_mask_(Tensor(a!)[] out, Tensor[] mask, Tensor[] source) -> ()", contract=_contract, fake=_fake)
def apply_mask_(out: list[Tensor], mask: list[Tensor], source: list[Tensor]) -> None:
    r"""Write the surviving entries of ``source`` into ``out``, and +0 into all others, for many tensors in one call.

    .. math:: out_{ji} = source_{ji} \text{ where } mask_{ji}, \quad +0 \text{ elsewhere}

    With an empty ``source`` the weights are masked where they are.  What is dead becomes +0 even where it is NaN, which
    a product with 0 would keep; what is alive keeps its bits.

    Args:
        out: weights to write, contiguous, float32, float64, float16 or bfloat16.
        mask: packed masks, uint8 [64 ceil(n / 512)] for a tensor of n elements, one bit per entry in flat order, lowest
            bit first, 1 = alive; without elements (or an empty list): all alive.
        source: what ``out`` is rewound to, of its shapes and dtypes, strided as it may be; an empty list: ``out`` itself.
            No memory shared with ``out``.

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, device, a tensor in ``out`` that is not contiguous.

    Cost and determinism: bandwidth-bound; a source is read once and ``out`` written once, without being read.  The same
    bits on every backend, run and thread count.

    Reference: Frankle & Carbin 2019 (lottery tickets, arXiv 1803.03635), §2; Frankle et al. 2020 (rewinding, arXiv
    1912.05671), §3.
    """
    for j, target in enumerate(out):
        target.copy_(masked(source[j] if source else target, mask, j))
