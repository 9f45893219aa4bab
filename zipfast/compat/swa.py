# SPDX-License-Identifier: Apache-2.0
"""Drop-in for ``torch.optim.swa_utils``: running averages of weights during training (SWA and EMA), on ``blend_``.

``from zipfast.compat.swa import AveragedModel, SWALR, update_bn`` in place of ``from torch.optim.swa_utils import ...``. The
averaged model is a subclass of torch's, with its attributes and its state dict, so either reads the checkpoints of the
other. One :func:`zipfast.ops.blend_` a dtype and update: each weight read once, each average written once.

Where it differs, on purpose: float16 and bfloat16 weights are averaged in float32 copies and rounded once, not at each
update; whole numbers (``num_batches_tracked``) are those of the latest model, not truncated means; a model of another
architecture is refused.

Reference: Izmailov et al. 2018 (SWA, arXiv 1803.05407), §3; Polyak & Juditsky 1992.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.optim.swa_utils import SWALR, get_ema_avg_fn, get_swa_avg_fn

from ..merging.repair import reestimate
from ..ops import blend_
from ..ops.blend import FINITE

__all__ = [
    "SWALR", "AveragedModel", "get_ema_avg_fn", "get_ema_multi_avg_fn", "get_swa_avg_fn", "get_swa_multi_avg_fn",
    "update_bn",
]  # fmt: skip
Tensors: TypeAlias = "tuple[Tensor, ...] | list[Tensor]"
HALF = (torch.float16, torch.bfloat16)


class _Average:
    """The rule of an update over lists of tensors; of a class, so that it pickles."""

    def __init__(self, decay: float | None = None) -> None:
        self.decay = decay

    @torch.no_grad()
    def __call__(self, averaged: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        averaged, current = list(averaged), list(current)
        if not averaged:
            return
        if not (averaged[0].is_floating_point() or averaged[0].is_complex()):
            for a, c in zip(averaged, current):
                a.copy_(c)
            return
        device = averaged[0].device
        if self.decay is None:
            count = torch.as_tensor(num_averaged, device=device).double()  # on its device: no host waits for it
            pair = torch.stack([count / (count + 1), 1 / (count + 1)])
        else:
            pair = torch.tensor([self.decay, 1 - self.decay], dtype=torch.float64, device=device)
        _blend_into(averaged, current, pair)


def get_swa_multi_avg_fn() -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """The equal average over many tensors: a ← a·n/(n + 1) + c/(n + 1), in place, where n were averaged before.

    Works in torch's own `AveragedModel`, too.
    """
    return _Average()


def get_ema_multi_avg_fn(decay: float = 0.999) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """The exponential average over many tensors: a ← decay·a + (1 - decay)·c, in place.

    Raises:
        ValueError: a decay outside [0, 1].
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"get_ema_multi_avg_fn: 'decay' must be in [0, 1], got {decay}")
    return _Average(float(decay))


class AveragedModel(swa_utils.AveragedModel):
    """A copy of a model that holds the average of the models it was updated with.

    Args:
        model: copied; `module` is the copy.
        device: where the copy lies; None: where the model lies.
        avg_fn: (average, current, number averaged) -> new average, for one tensor.
        multi_avg_fn: the same in place over lists of tensors of one dtype and device; None, without `avg_fn`: the equal
            average. Functions of one's own get float32 lists where weights are float16 or bfloat16.
        use_buffers: average floating-point buffers too (others are those of the latest model); False: all buffers are
            those of the latest model, see :func:`update_bn`.

    Attributes:
        module: the averaged model. n_averaged: int64, how many went in.

    Raises:
        AssertionError: both functions.

    In float32, after n updates, it differs from torch's by at most 4·n·2⁻²⁴·max|θ|: each rounds a running mean n times.
    Copies in float32 are not in the state dict, which is torch's: a 16-bit average that is loaded goes on from its rounded
    values.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> mean = AveragedModel(net)
        >>> for value in (1.0, 2.0, 6.0):
        ...     _ = nn.init.constant_(net.weight, value)
        ...     mean.update_parameters(net)
        >>> mean.module.weight.tolist(), int(mean.n_averaged)
        ([[3.0, 3.0]], 3)
    """

    def __init__(
        self,
        model: nn.Module,
        device: int | torch.device | None = None,
        avg_fn: Callable[[Tensor, Tensor, Tensor | int], Tensor] | None = None,
        multi_avg_fn: Callable[[Tensors, Tensors, Tensor | int], None] | None = None,
        use_buffers: bool = False,
    ) -> None:
        if avg_fn is not None and multi_avg_fn is not None:
            raise AssertionError("AveragedModel: one of 'avg_fn' and 'multi_avg_fn' must be None, got two functions")
        super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)
        self._wide: dict[int, tuple[Tensor, tuple[int, int]]] = {}  # place -> float32 average, what was written from it

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take a model into the average; the first is copied.

        Raises:
            ValueError: another number of parameters or buffers, or other shapes; nothing is changed.

        Cost: reads the average and the model, writes the average; without waiting for a GPU but for `n_averaged`.
        """
        _check_same(self.module, model)
        own: list[Tensor] = list(self.module.parameters())
        new: list[Tensor] = list(model.parameters())
        own_buffers, new_buffers = list(self.module.buffers()), list(model.buffers())
        if self.use_buffers:
            own, new = own + own_buffers, new + new_buffers
        else:
            for a, c in zip(own_buffers, new_buffers):
                a.copy_(c)
        if bool(self.n_averaged == 0):
            for a, c in zip(own, new):
                a.copy_(c)
            self._wide.clear()
        else:
            self._average(own, [c.detach().to(a.device) for a, c in zip(own, new)])
        self.n_averaged += 1

    def _average(self, own: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        wide: dict[int, Tensor] = {}
        for place, (a, c) in enumerate(zip(own, new)):
            if not (a.is_floating_point() or a.is_complex()):
                a.copy_(c)
                continue
            if a.dtype in HALF:
                wide[place] = self._wide_of(place, a)
            target = wide.get(place, a.detach())
            averaged, current = groups.setdefault((target.device, target.dtype), ([], []))
            averaged.append(target)
            current.append(c)
        rule = self.multi_avg_fn if self.avg_fn is None else None
        if self.avg_fn is None and rule is None:
            rule = get_swa_multi_avg_fn()
        for (device, dtype), (averaged, current) in groups.items():
            count = self.n_averaged.to(device)
            if isinstance(rule, _Average):
                rule(averaged, current, count)  # reads mixed dtypes
                continue
            current = [c.to(dtype) for c in current]
            if rule is not None:
                rule(averaged, current, count)
            else:
                assert self.avg_fn is not None
                for a, c in zip(averaged, current):
                    a.copy_(self.avg_fn(a, c, count))
        for place, t in wide.items():
            own[place].copy_(t)
            self._wide[place] = (t, _mark(own[place]))

    def _wide_of(self, place: int, a: Tensor) -> Tensor:
        """The float32 average behind a 16-bit one; from its values where somebody else has written them."""
        if place in self._wide:
            t, mark = self._wide[place]
            t = t.to(a.device)
            if mark == _mark(a) or (t.shape == a.shape and torch.equal(t.to(a.dtype), a)):
                return t
        return a.detach().float()


@torch.no_grad()
def update_bn(loader: Iterable[Any], model: nn.Module, device: int | torch.device | None = None) -> None:
    """Batch-norm statistics of a model, as the average over the batches of one pass; the model is else unchanged.

    Args:
        loader: what the model takes as its one argument, or tuples and lists that begin with it. A mapping whose keys are
            all parameters of the model's `forward` is passed by keyword.
        model: changed in place: the statistics of its norm layers.
        device: where inputs go; None: tensors, and those within mappings, to that of the model's first parameter.

    Raises:
        ValueError: norm layers but no batch. Whatever stops the pass leaves the statistics as they were.

    Cost: one forward pass a batch; see :func:`zipfast.merging.reestimate_batchnorm`, which does it.
    """

    def inputs(batch: Any, own: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        first = batch[0] if isinstance(batch, (list, tuple)) else batch
        if isinstance(first, Mapping):
            to = own if device is None else device
            moved = {k: v.to(to) if isinstance(v, Tensor) else v for k, v in first.items()}
            return ((), moved) if _by_keyword(model, moved) else ((moved,), {})
        if device is not None or isinstance(first, Tensor):
            first = first.to(own if device is None else device)
        return (first,), {}

    reestimate(model, loader, inputs)


def _by_keyword(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether a model takes these as keywords, as those of Hugging Face do, rather than as one dictionary."""
    wrappers = (swa_utils.AveragedModel, nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or "_orig_mod" in model._modules:  # the latter of torch.compile
        model = model.get_submodule("module" if isinstance(model, wrappers) else "_orig_mod")
    taken = inspect.signature(model.forward).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in taken) or set(batch) <= {p.name for p in taken}


def _mark(t: Tensor) -> tuple[int, int]:
    return (0 if t.is_inference() else t._version), t.data_ptr()


def _blend_into(averaged: Sequence[Tensor], current: Sequence[Tensor], pair: Tensor) -> None:
    """averaged ← pair[0]·averaged + pair[1]·current, of one device, in one call."""
    out, ours, theirs, copies = [], [], [], []
    for a, c in zip(averaged, current):
        a, c = a.detach(), c.detach()
        if a.is_complex():
            a, c = torch.view_as_real(a), torch.view_as_real(c.to(a.dtype))
        if not a.is_contiguous():  # channels last and the like are contiguous in an order of their own
            order = sorted(range(a.dim()), key=a.stride().__getitem__, reverse=True)
            a, c = a.permute(order), c.permute(order)
        target = a if a.is_contiguous() else torch.empty_like(a, memory_format=torch.contiguous_format)
        if target is not a:
            copies.append((a, target))
        out.append(target)
        ours.append(a)
        theirs.append(c)
    weight = pair[:, None].expand(2, len(out)).contiguous()
    bad = torch.full((3, len(out)), FINITE, dtype=torch.int64, device=pair.device)
    blend_(out, bad, [*ours, *theirs], weight)
    for a, target in copies:
        a.copy_(target)


def _check_same(own: nn.Module, model: nn.Module) -> None:
    """Names may differ (nn.DataParallel puts one before them); number, order and shapes may not."""
    for what in ("parameters", "buffers"):
        mine, theirs = list(getattr(own, f"named_{what}")()), list(getattr(model, f"named_{what}")())
        if len(mine) != len(theirs):
            raise ValueError(
                f"update_parameters: 'model' must have the {len(mine)} {what} of the averaged one, got {len(theirs)}"
            )
        for (name, a), (_, c) in zip(mine, theirs):
            if a.shape != c.shape:
                raise ValueError(
                    f"update_parameters: {name!r} of 'model' must have the shape {list(a.shape)} of the averaged one, got "
                    f"{list(c.shape)}"
                )
