# SPDX-License-Identifier: Apache-2.0
"""``masked_step_``: one step of SGD, Adam or AdamW and the mask of weights and state, in one pass over lists of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from ._mask import check_list, check_masks, check_written, masked
from ._registry import op

NAME = "masked_step_"
RULES = ("sgd", "adam", "adamw")


def _contract(
    param: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    grad: list[Tensor],
    mask: list[Tensor],
    rule: str,
    step: int,
    lr: float,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
) -> None:
    if rule not in RULES:
        raise ValueError(f"{NAME}: 'rule' must be one of {', '.join(RULES)}, got {rule!r}")
    if step < 1:
        raise ValueError(f"{NAME}: 'step' must be 1 for the first step, or more, got {step}")
    least_zero = {"lr": lr, "weight_decay": weight_decay}
    if rule == "sgd":
        least_zero["momentum"] = momentum
        if nesterov and not (momentum > 0 and dampening == 0):
            seen = f"momentum {momentum} and dampening {dampening}"
            raise ValueError(f"{NAME}: 'nesterov' must be False without momentum or with dampening, got {seen}")
    else:
        least_zero["eps"] = eps
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"{NAME}: '{name}' must be at least 0 and below 1, got {value}")
    for name, value in least_zero.items():
        if not value >= 0:
            raise ValueError(f"{NAME}: '{name}' must be at least 0, got {value}")

    check.check_tensors(NAME, "param", param)
    check_written(NAME, "param", param)
    check_masks(NAME, "mask", mask, param, "param")
    check.check_tensors(NAME, "grad", grad)
    wanted = {"first": rule != "sgd" or momentum != 0, "second": rule != "sgd"}
    for name, tensors in (("grad", grad), ("first", first), ("second", second)):
        check_list(NAME, name, tensors, len(param), "param")
        if name in wanted and (len(tensors) > 0) != wanted[name]:
            words = f"hold one tensor for each of {len(param)} in 'param'" if wanted[name] else "be an empty list"
            raise ValueError(f"{NAME}: '{name}' must {words} for this rule and momentum, got {len(tensors)}")
        for i, (t, p) in enumerate(zip(tensors, param)):
            check.check_device(NAME, f"{name}[{i}]", t, p.device)
            check.check_shape(NAME, f"{name}[{i}]", t, p.shape, "the shape of 'param'")
            if name == "grad":
                dtypes: tuple[torch.dtype, ...] = (p.dtype,)
            elif name == "first":
                dtypes = (p.dtype, torch.float32) if p.dtype in (torch.float16, torch.bfloat16) else (p.dtype,)
            else:
                dtypes = (first[i].dtype,)
            check.check_dtype(NAME, f"{name}[{i}]", t, dtypes)
            if name != "grad" and not t.is_contiguous():
                raise ValueError(f"{NAME}: '{name}[{i}]' must be contiguous, got strides {list(t.stride())}")


def _fake(
    param: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    grad: list[Tensor],
    mask: list[Tensor],
    rule: str,
    step: int,
    lr: float,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
) -> None:
    return None


@op(
    "masked_step_(Tensor(a!)[] param, Tensor(b!)[] first, Tensor(c!)[] second, Tensor[] grad, Tensor[] mask, str rule, "
    "int step, float lr, float weight_decay, float momentum, float dampening, bool nesterov, float beta1, float beta2, "
    "float eps, bool maximize) -> ()",
    contract=_contract,
    fake=_fake,
)
def masked_step_(
    param: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    grad: list[Tensor],
    mask: list[Tensor],
    rule: str,
    step: int,
    lr: float,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
) -> None:
    r"""Take one optimiser step and apply the masks to weights and state, for many tensors in one call.

    .. math:: (w_j, m_j, v_j) \leftarrow mask_j \odot step(w_j, g_j, m_j, v_j)

    The step is that of ``torch.optim.SGD``, ``Adam`` or ``AdamW`` (without amsgrad), operation after operation as in
    their ``foreach=False`` form, with the same fused multiply-adds.  In float32 and float64, SGD and the state of Adam
    therefore get the bits of ``torch.optim`` on a CPU with AVX2; Adam's weights get those of a correctly rounded square
    root, which torch's is not.  Dead entries of weights and state become +0, also where the gradient is NaN: the step of
    a survivor never depends on them.  16-bit tensors are stepped in float32 and rounded once.

    Args:
        param: weights, contiguous, float32, float64, float16 or bfloat16.
        first: momentum buffers of SGD (an empty list where ``momentum`` is 0; what they hold at step 1 is not used) or
            first moments of Adam; contiguous, of the weights' dtype, or float32 for 16-bit weights.
        second: second moments of Adam, of the dtype of ``first``; an empty list for SGD.
        grad: gradients, of the weights' dtype, strided as they may be; not written.
        mask: packed masks as ``apply_mask_`` takes them; without elements (biases, norms) or an empty list: all alive.
        rule: "sgd", "adam" (weight decay added to the gradient) or "adamw" (decoupled).
        step: number of this step, 1 for the first one.
        lr: learning rate; as all numbers here it is the host's, so that a CUDA graph repeats the value it was captured
            with.
        weight_decay: weight decay of surviving weights.
        momentum: of SGD; ignored by the others, as are the next two.
        dampening: of SGD, from step 2 on.
        nesterov: SGD with Nesterov's momentum.
        beta1: decay of the first moments of Adam; ignored by SGD, as are the next two.
        beta2: decay of the second moments.
        eps: added to the root of the second moments.
        maximize: step along the gradient, not against it.

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, device, range, missing state.

    Cost and determinism: weights, state and gradients read once, weights and state written once, whatever is dead.  Equal
    bits for every run and thread count, and on all compiled backends.

    Reference: Frankle & Carbin 2019 (lottery tickets, arXiv 1803.03635), §2: training of masked networks; Kingma & Ba
    2015 (Adam), algorithm 1; Loshchilov & Hutter 2019 (AdamW), algorithm 2.
    """
    for j, target in enumerate(param):
        wide = torch.float64 if target.dtype == torch.float64 else torch.float32
        w, g = target.to(wide), grad[j].to(wide)
        if maximize:
            g = -g
        if rule == "adamw" and weight_decay:
            w = w * (1 - lr * weight_decay)
        elif weight_decay:
            g = g.add(w, alpha=weight_decay)
        if rule == "sgd":
            if momentum:
                m = g if step == 1 else (first[j].to(wide) * momentum).add(g, alpha=1 - dampening)
                g = g.add(m, alpha=momentum) if nesterov else m
                first[j].copy_(masked(m, mask, j))
            w = w.add(g, alpha=-lr)
        else:
            m = first[j].to(wide).lerp(g, 1 - beta1)
            v = (second[j].to(wide) * beta2).addcmul(g, g, value=1 - beta2)
            root = (v.sqrt() / (1 - beta2**step) ** 0.5).add(eps)
            w = w.addcdiv(m, root, value=-lr / (1 - beta1**step))
            first[j].copy_(masked(m, mask, j))
            second[j].copy_(masked(v, mask, j))
        target.copy_(masked(w, mask, j))
