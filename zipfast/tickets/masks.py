# SPDX-License-Identifier: Apache-2.0
"""Masks: which weights of a network are alive, one bit each, apart from the network.

The network itself stays plain: its state dict, its deepcopy and its pickle are those of a network that was never pruned.
What is pruned is exactly 0 in it (:meth:`Masks.apply_`), and stays 0 under :class:`zipfast.tickets.MaskedOptimizer`.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias

import torch
from torch import Tensor, nn

from .. import checkpoint, distributed
from ..ops import apply_mask_, threshold
from ..ops._mask import mask_bytes, pack, popcount, unpack
from ..ops.threshold import FINITE
from .networks import prunable, rates_of

Weights: TypeAlias = Mapping[str, Tensor]
Rates: TypeAlias = "float | Mapping[str, float]"
FORMAT = 1  # of mask files
SCOPES = ("layer", "global")
RANDOM = ("layer", "global", "even")


@dataclass(frozen=True)
class Masks:
    """One packed mask for each prunable tensor of a network.

    Attributes:
        bits: name -> uint8 [64 ceil(n / 512)]: bit ``i & 7`` of byte ``i >> 3`` is 1 where weight i (flat, row-major) is
            alive; the rest is 0.
        shapes: name -> shape of the weight.
        facts: where they come from (rule, level, parent, seed ...); kept in the file, not compared.

    Example:
        >>> net = nn.Linear(4, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0, -8.0, 3.0, 4.0], [5.0, 6.0, 7.0, -2.0]]))
        >>> masks = Masks.ones(net).prune(net, 0.5)
        >>> masks.density, masks.dense()["weight"].tolist()
        (0.5, [[False, True, False, False], [True, True, True, False]])
    """

    bits: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    facts: dict[str, Any] = field(default_factory=dict, compare=False)

    # ------------------------------------------------------------------------------------------------------- making

    @classmethod
    def ones(cls, model: nn.Module | Weights, *, only: str | None = None, ignore: str | None = None) -> Masks:
        """Nothing pruned.

        Args:
            model: a module (the weights of its linear and convolutional layers, see :func:`zipfast.tickets.prunable`), or
                tensors by name.
            only, ignore: regular expressions over the names: with a match of the first, without one of the second. `only`
                may name any parameter of a module with two dimensions or more: of recurrent cells and attention, too.

        Raises:
            ValueError: no weight is left, or a pattern matches none: the names there are.
        """
        weights = _weights(model)
        if isinstance(model, nn.Module) and only is not None:
            weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
        for what, pattern in (("only", only), ("ignore", ignore)):
            try:
                matches = pattern is None or any(re.search(pattern, name) for name in weights)
            except re.error as e:
                raise ValueError(f"Masks.ones: '{what}' must be a regular expression, got {pattern!r}: {e}") from None
            if not matches:
                raise ValueError(f"Masks.ones: '{what}' must match a layer ({_some(weights)}), got {pattern!r}")
        names = [
            name
            for name in weights
            if (only is None or re.search(only, name)) and (ignore is None or not re.search(ignore, name))
        ]
        if not names:
            raise ValueError("Masks.ones: there must be a weight to prune, got none (linear and convolutional weights)")
        shapes = {name: tuple(weights[name].shape) for name in names}
        bits = {name: pack(torch.ones(prod(shapes[name]), dtype=torch.bool)) for name in names}
        return cls(bits, shapes, {"rule": "ones", "level": 0})

    @classmethod
    def from_dense(cls, masks: Weights) -> Masks:
        """From tensors of 0 and 1 (or False and True) by name."""
        bits, shapes = {}, {}
        for name, mask in masks.items():
            alive = mask != 0
            if not bool((alive == mask).all()):
                raise ValueError(f"Masks.from_dense: '{name}' must hold 0 and 1 only")
            bits[name], shapes[name] = pack(alive.cpu().reshape(-1)), tuple(mask.shape)
        return cls(bits, shapes, {"rule": "dense"})

    @classmethod
    def from_zeros(cls, model: nn.Module | Weights) -> Masks:
        """Alive where a weight is not 0."""
        found = cls.from_dense({name: w.detach() != 0 for name, w in _weights(model).items()})
        return replace(found, facts={"rule": "zeros"})

    # ------------------------------------------------------------------------------------------------------ counting

    def __len__(self) -> int:
        return len(self.bits)

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self.shapes == other.shapes and all(torch.equal(self.bits[n], other.bits[n]) for n in self.bits)

    __hash__ = None  # type: ignore[assignment]

    @property
    def sizes(self) -> dict[str, int]:
        """Weights per tensor, dead or alive."""
        return {name: prod(shape) for name, shape in self.shapes.items()}

    @property
    def alive(self) -> dict[str, int]:
        """Survivors per tensor."""
        return {name: popcount(bits) for name, bits in self.bits.items()}

    @property
    def densities(self) -> dict[str, float]:
        """Fraction alive, per tensor; 0 for one without elements."""
        return {name: alive / max(1, self.sizes[name]) for name, alive in self.alive.items()}

    @property
    def density(self) -> float:
        """P_m: the fraction of all prunable weights that is alive."""
        return sum(self.alive.values()) / max(1, sum(self.sizes.values()))

    @property
    def nbytes(self) -> int:
        """Memory of the bits."""
        return sum(bits.numel() for bits in self.bits.values())

    def dense(self) -> dict[str, Tensor]:
        """Booleans in the shapes of the weights."""
        return {name: unpack(bits, self.shapes[name]) for name, bits in self.bits.items()}

    def hash(self) -> str:
        """SHA-256 over names, shapes and bits: equal for equal masks, on any machine."""
        digest = hashlib.sha256()
        for name in sorted(self.bits):
            digest.update(f"{name}|{self.shapes[name]}|".encode())
            digest.update(self.bits[name].cpu().numpy().tobytes())
        return digest.hexdigest()

    def agree(self) -> None:
        """Check that all processes of a torch.distributed group hold the same masks.

        Raises:
            RuntimeError: they differ; the ranks are named.
        """
        hashes = distributed.gather(self.hash())
        other = [rank for rank, found in enumerate(hashes) if found != hashes[0]]
        if other:
            raise RuntimeError(
                f"Masks.agree: all processes must hold the same masks, got others on ranks {other} than on 0"
            )

    # --------------------------------------------------------------------------------------------------------- sets

    def within(self, other: Masks) -> bool:
        """Whether everything alive here is alive there: each level of iterative pruning is within the one before."""
        self._same(other, "within")
        return all(not bool((self.bits[n] & ~other.bits[n]).any()) for n in self.bits)

    def __and__(self, other: Masks) -> Masks:
        self._same(other, "and")
        return Masks({n: self.bits[n] & other.bits[n] for n in self.bits}, self.shapes, {"rule": "and"})

    def __or__(self, other: Masks) -> Masks:
        self._same(other, "or")
        return Masks({n: self.bits[n] | other.bits[n] for n in self.bits}, self.shapes, {"rule": "or"})

    def overlap(self, other: Masks) -> float:
        """Intersection over union of the survivors; 1 for two empty masks."""
        both, any_ = sum((self & other).alive.values()), sum((self | other).alive.values())
        return both / any_ if any_ else 1.0

    def _same(self, other: Masks, what: str) -> None:
        if self.shapes != other.shapes:
            raise ValueError(f"Masks.{what}: both must be of one network, got {_difference(self.shapes, other.shapes)}")

    # ------------------------------------------------------------------------------------------------------ pruning

    def prune(
        self,
        scores: nn.Module | Weights,
        amount: Rates | int,
        *,
        scope: str = "global",
        facts: Mapping[str, Any] | None = None,
    ) -> Masks:
        """Drop survivors of smallest |score|.

        Args:
            scores: a module (its weights that are masked: magnitude pruning), or a tensor for each mask by name; see
                :mod:`zipfast.tickets.scores`.
            amount: a fraction of the survivors in [0, 1], or a whole number of weights (`int`); or fractions by name or by
                regular expression over whole names, the first match counting (tensors without one are left as they are, and
                do not count in n).
            scope: ``"global"``: all tensors of one fraction are ranked together; ``"layer"``: each for itself. A whole
                number needs ``"global"``.
            facts: kept with the masks.

        Returns:
            New masks, within these: exactly round(p · survivors) (half to even) fewer per layer or pool. Ties: the tensor
            that comes first, its lowest index, goes first.

        Raises:
            ValueError: a fraction outside [0, 1]; more than there are; NaN among surviving scores (tensor and index); a
            pattern or tensor that does not exist; scores of another shape; no weight in the scope.

        Cost: :func:`zipfast.ops.threshold`: every score read once.

        Reference: Frankle & Carbin 2019 (lottery tickets, arXiv 1803.03635), §1 and §4.
        """
        weights = self.check(scores, "Masks.prune")
        if scope not in SCOPES:
            raise ValueError(f"Masks.prune: 'scope' must be {' or '.join(SCOPES)}, got {scope!r}")
        pools, drop = self.pools(amount, scope)
        names = [name for pool in pools for name in pool]
        group = [g for g, pool in enumerate(pools) for _ in pool]
        tensors = [weights[name].detach() for name in names]
        masks = [self.bits[name].to(t.device) for name, t in zip(names, tensors)]
        kept, status = threshold(tensors, masks, drop, group)
        for name, place in zip(names, status[: len(names)].tolist()):
            if place != FINITE:
                raise ValueError(f"Masks.prune: scores must be numbers, got NaN in {name!r} at flat index {place}")
        bits = {**self.bits, **{name: k.cpu() for name, k in zip(names, kept)}}
        level = int(self.facts.get("level", 0)) + 1
        own = {"rule": "magnitude", "scope": scope, "level": level, "parent": self.hash(), **(facts or {})}
        return Masks(bits, self.shapes, own)

    def pools(self, amount: Rates | int, scope: str) -> tuple[list[list[str]], list[int]]:
        """Names that are ranked together, in the order of the masks (ties), and how many go from each pool."""
        alive = self.alive
        if isinstance(amount, (bool, str)) or not isinstance(amount, (Mapping, SupportsIndex, SupportsFloat)):
            kind = type(amount).__name__
            raise TypeError(f"Masks.prune: 'amount' must be a number, or numbers by name, got {kind}")
        if isinstance(amount, SupportsIndex):
            amount = operator.index(amount)
            total = sum(alive.values())
            if scope != "global":
                raise ValueError("Masks.prune: a whole number needs scope 'global'; give a fraction for 'layer'")
            if not 0 <= amount <= total:
                wanted = "0 or more" if amount < 0 else f"at most the {total} survivors"
                raise ValueError(f"Masks.prune: 'amount' must be {wanted}, got {amount}")
            return [list(self.bits)], [amount]
        rates = self.rates(amount)
        if scope == "layer":
            pools = [[name] for name in rates]
        else:
            pools = [[n for n in rates if rates[n] == rate] for rate in dict.fromkeys(rates.values())]
        return pools, [round(rates[pool[0]] * sum(alive[n] for n in pool)) for pool in pools]

    def rates(self, amount: Rates) -> dict[str, float]:
        """The fraction for each tensor that is pruned."""
        if isinstance(amount, Mapping):
            exact = {name: float(rate) for name, rate in amount.items() if name in self.bits}
            rest = [name for name in self.bits if name not in exact]
            patterns = [(pattern, float(rate)) for pattern, rate in amount.items() if pattern not in exact]
            by_name = exact | (rates_of(patterns, rest) if patterns else {})
        else:
            by_name = dict.fromkeys(self.bits, float(amount))
        for name, rate in by_name.items():
            if not 0 <= rate <= 1:
                raise ValueError(f"Masks.prune: a fraction must be in [0, 1], got {rate} for {name!r}")
        found = {name: by_name[name] for name in self.bits if name in by_name}
        if not any(self.sizes[name] for name in found):
            raise ValueError("Masks.prune: the scope must hold a weight, got none")
        return found

    def shuffled(self, seed: int, scope: str = "layer") -> Masks:
        """As many survivors, elsewhere: the random-mask control.

        Args:
            seed: with the place of each tensor among the sorted names.
            scope: ``"layer"``: as many in each tensor; ``"global"``: as many in all; ``"even"``: one density for all.
        """
        if scope not in RANDOM:
            raise ValueError(f"Masks.shuffled: 'scope' must be one of {', '.join(RANDOM)}, got {scope!r}")
        sizes, counts = self.sizes, dict(self.alive)
        if scope == "even":
            total, rest = sum(counts.values()), sum(counts.values())
            for name in sizes:
                counts[name] = min(sizes[name], round(total * sizes[name] / max(1, sum(sizes.values()))))
                rest -= counts[name]
            for name in sizes:  # rounding: a few more or fewer, from the first tensors on
                change = max(-counts[name], min(rest, sizes[name] - counts[name]))
                counts[name] += change
                rest -= change
        facts = {"rule": "random", "scope": scope, "seed": seed, "parent": self.hash()}
        if scope == "global":
            alive = _random(sum(sizes.values()), sum(counts.values()), seed)
            parts = dict(zip(sizes, alive.split(list(sizes.values()))))
        else:
            place = {name: i for i, name in enumerate(sorted(sizes))}
            parts = {name: _random(sizes[name], counts[name], seed + 1_000_003 * place[name]) for name in sizes}
        return Masks({name: pack(part) for name, part in parts.items()}, self.shapes, facts)

    # ----------------------------------------------------------------------------------------------------- networks

    def check(self, model: nn.Module | Weights, who: str = "Masks.check") -> dict[str, Tensor]:
        """The masked tensors of a network, in the order of the masks.

        Raises:
            ValueError: it lacks one, or has it in another shape: all of them.
        """
        weights = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else model
        shapes = {name: tuple(t.shape) for name, t in weights.items() if name in self.shapes}
        if shapes != self.shapes:
            raise ValueError(f"{who}: the masks must be those of this network, got {_difference(shapes, self.shapes)}")
        return {name: weights[name] for name in self.shapes}

    def apply_(self, model: nn.Module | Weights) -> None:
        """Set what is dead to +0, in place (also where it is NaN).

        Raises:
            ValueError: masks of another network.

        Cost: one pass over the weights (:func:`zipfast.ops.apply_mask_`).
        """
        weights = self.check(model, "Masks.apply_")
        apply_bits_(list(weights.values()), self.on(weights))

    def rewind_(self, model: nn.Module, state: Weights) -> None:
        """Put a network back to an earlier state, all of it (biases, norms and their statistics too), and mask it.

        Args:
            state: the state dict of θ₀ or θ_k.

        Reference: Frankle et al. 2020 (linear mode connectivity, arXiv 1912.05671), §3.
        """
        weights = self.check(model, "Masks.rewind_")
        source = self.check({name: state[name] for name in self.shapes if name in state}, "Masks.rewind_")
        whole = model.state_dict(keep_vars=True)
        shapes = [{n: tuple(t.shape) for n, t in found.items()} for found in (state, whole)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"Masks.rewind_: the state must be of this network, got {_difference(*shapes)}")
        model.load_state_dict({n: t for n, t in state.items() if n not in self.shapes}, strict=False)
        apply_bits_(list(weights.values()), self.on(weights), list(source.values()))

    def on(self, weights: Weights) -> list[Tensor]:
        """The bits, each where its weight lies."""
        return [self.bits[name].to(weights[name].device) for name in self.shapes]

    # -------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str], **facts: Any) -> None:
        """Write them as safetensors, atomically: one U8 tensor per mask, under the weight's name; facts as JSON.

        Raises:
            OSError, ValueError: as :func:`zipfast.checkpoint.save`.
        """
        about = {
            "format": FORMAT, "shapes": {n: list(s) for n, s in self.shapes.items()}, "alive": self.alive,
            "hash": self.hash(), "facts": {**self.facts, **facts},
        }  # fmt: skip
        checkpoint.save(path, self.bits, {"masks": about, "order": list(self.bits)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read masks.

        Raises:
            FileNotFoundError, ValueError: none there, another file, or bits that are not those that were written.
        """
        bits = checkpoint.load(path)
        header = checkpoint.read_metadata(path)
        about = header.get("masks")
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ValueError(f"Masks.load: {path} must hold masks of format {FORMAT}, got another file")
        try:
            shapes = {name: tuple(map(int, about["shapes"][name])) for name in header["order"]}
            facts, written = dict(about["facts"]), about["hash"]
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"Masks.load: {path} is damaged: its header lacks what masks have ({e})") from None
        for name, shape in shapes.items():
            own = bits.get(name)
            if own is None or own.dtype != torch.uint8 or own.shape != (mask_bytes(prod(shape)),):
                raise ValueError(
                    f"Masks.load: {path} is damaged: the mask of {name!r} has not the bits of {list(shape)}"
                )
        found = cls({name: bits[name] for name in shapes}, shapes, facts)
        if found.hash() != written:
            raise ValueError(f"Masks.load: {path} is damaged: its bits are not those that were written")
        return found

    def to_json(self) -> dict[str, Any]:
        """Densities and origin, without the bits."""
        plain: dict[str, Any] = json.loads(
            json.dumps({"density": self.density, "layers": self.densities, **self.facts})
        )
        return plain


def rate_for(density: float, rounds: int) -> float:
    """The fraction to prune per round, so that `density` is left after so many: 1 - density^(1 / rounds).

    >>> round(rate_for(0.0115, 20), 3)
    0.2
    """
    if not 0 < density <= 1 or rounds < 1:
        raise ValueError(f"rate_for: density must be in (0, 1] and rounds at least 1, got {density} and {rounds}")
    return float(1 - density ** (1 / rounds))


def apply_bits_(tensors: Sequence[Tensor], bits: Sequence[Tensor], source: Sequence[Tensor] = ()) -> None:
    """:func:`zipfast.ops.apply_mask_`, of tensors that are not contiguous (channels last) by way of a copy."""
    if not tensors:
        return
    whole = [t.detach().contiguous() for t in tensors]
    given = [s.detach().to(t.device, t.dtype) for s, t in zip(source, tensors)]
    apply_mask_(whole, list(bits), given)
    for tensor, own in zip(tensors, whole):
        if not tensor.is_contiguous():
            tensor.detach().copy_(own)


def _weights(model: nn.Module | Weights) -> dict[str, Tensor]:
    return dict(prunable(model)) if isinstance(model, nn.Module) else dict(model)


def _random(size: int, count: int, seed: int) -> Tensor:
    alive = torch.zeros(size, dtype=torch.bool)
    alive[torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]] = True
    return alive


def _some(names: Mapping[str, Any], most: int = 6) -> str:
    return ", ".join(list(names)[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _difference(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    parts = [f"no {n!r}" for n in wanted if n not in found]
    parts += [f"{n!r} besides" for n in found if n not in wanted]
    parts += [
        f"{n!r} of {list(found[n])} for {list(wanted[n])}" for n in wanted if n in found and found[n] != wanted[n]
    ]
    return "; ".join(parts[:6]) + (f" and {len(parts) - 6} more" if len(parts) > 6 else "")
