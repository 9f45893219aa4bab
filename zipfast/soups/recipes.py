# SPDX-License-Identifier: Apache-2.0
"""Uniform and greedy soups, and WiSE-FT's interpolation: one model from many (Wortsman et al. 2022)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import checkpoint
from ..states import State, open_state
from .ingredients import Whole, gather
from .mix import SHARD, weights_of

Evaluate: TypeAlias = Callable[[dict[str, Tensor]], float]
ACCEPT = ("gt", "ge")
TIES = ("first", "reference")


@dataclass(frozen=True)
class Tried:
    """One ingredient of a greedy soup: what the soup scored with it, the best so far, and whether it stayed.

    Not exact: the evaluation was stopped where the best was out of reach; the score is what it could have been at most.
    """

    model: int
    name: str
    score: float
    best: float
    accepted: bool
    exact: bool = True


@dataclass(frozen=True, eq=False)  # tensors cannot be compared with ==
class Soup:
    """One model made of others.

    Attributes:
        weights: of each source, adding up to 1 unless asked otherwise. names: of the sources.
        state: the state dict, or None where it was written to `path`.
        score: of the soup by the callable given; None without one. scores: of the single models.
        tried: the steps of a greedy soup, in order.
        notes: what a user should know.
        config: of PEFT, where the soup is an adapter; else None.
    """

    recipe: str
    weights: tuple[float, ...]
    names: tuple[str, ...]
    state: dict[str, Tensor] | None
    path: str | None
    score: float | None = None
    scores: tuple[float, ...] = ()
    tried: tuple[Tried, ...] = ()
    notes: tuple[str, ...] = field(default=())
    config: dict[str, Any] | None = None

    @property
    def ingredients(self) -> list[int]:
        """Which sources are in it."""
        return [i for i, weight in enumerate(self.weights) if weight]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the tensors."""
        plain = asdict(Soup(**{**vars(self), "state": None}))
        plain.pop("state")
        return plain


def uniform_soup(
    sources: Sequence[Any],
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    out: str | os.PathLike[str] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    out_dtype: torch.dtype | None = None,
    int_policy: str = "equal",
    shard_bytes: int = SHARD,
    metadata: Mapping[str, Any] | None = None,
    base: Any = None,
    separate: bool = False,
) -> Soup:
    """The average, or a weighted sum, of checkpoints.

    Args:
        sources: k checkpoints: paths, folders, state dicts, modules (:func:`zipfast.states.open_state`); or k folders with
            LoRA adapters of PEFT, whose changes are averaged exactly: the result is an adapter of summed rank.
        weights: one per source; by default all alike.
        normalize: divide by their sum.
        out: .safetensors file or folder to write to; None: keep the state dict.
        include, exclude, out_dtype, int_policy: see :func:`zipfast.soups.layout_of` and :func:`zipfast.soups.mix`.
        shard_bytes: of the files in a folder. metadata: kept in the files beside the provenance.
        base: for adapters: the model that they change; the result is the whole model.
        separate: for adapters: average A and B on their own instead. The rank stays, but the result is the average only
            where all A, or all B, are equal; a note says how far off it is.

    Raises:
        ValueError: models that do not fit together (all problems in one message), values that are not finite, weights that
            add up to 0. FileNotFoundError, OSError: files.

    Cost: every byte read once and written once, in 16 MB of buffers.

    Example:
        >>> one, two = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}
        >>> uniform_soup([one, two]).state["w"], uniform_soup([one, two], weights=[3, 1]).state["w"]
        (tensor([2., 4.]), tensor([1.5000, 3.0000]))

    Reference: Wortsman et al. 2022 (model soups, arXiv 2203.05482), §2, Table 2.
    """
    name = "uniform_soup"
    count = 1 if isinstance(sources, (str, os.PathLike, Mapping)) else len(sources)
    column = weights_of(weights, count, normalize=normalize, name=name) if count else None
    kitchen = gather(
        sources, base=base, separate=separate, weighted=column, include=include, exclude=exclude, out=out,
        out_dtype=out_dtype, int_policy=int_policy, name=name,
    )  # fmt: skip
    assert column is not None
    states, twins = kitchen.states, kitchen.twins()
    facts = {**(metadata or {}), **provenance("uniform", states, column)}
    state = kitchen.mix(range(count), column, out=out, shard_bytes=shard_bytes, metadata=facts)
    path = None if out is None else os.fspath(out)
    names, notes = tuple(s.name for s in states), (*kitchen.notes, *twins)
    return Soup("uniform", tuple(column.tolist()), names, state, path, notes=notes, config=kitchen.config)


def wise_ft(
    zeroshot: Any,
    finetuned: Any,
    alphas: Sequence[float],
    **options: Any,
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Models between a start and its fine-tuned version: (1 - α)·zeroshot + α·finetuned, one for each α.

    Args:
        zeroshot, finetuned: checkpoints, as for :func:`uniform_soup`.
        alphas: in [0, 1] as a rule; others extrapolate.
        options: include, exclude, out_dtype, int_policy, as there.

    Yields:
        (α, state dict), made when it is asked for.

    Raises:
        ValueError: as :func:`uniform_soup`.

    Example:
        >>> curve = wise_ft({"w": torch.tensor([0.0])}, {"w": torch.tensor([8.0])}, [0.25, 1.0])
        >>> [(alpha, state["w"].item()) for alpha, state in curve]
        [(0.25, 2.0), (1.0, 8.0)]

    Reference: Wortsman et al. 2022 (WiSE-FT, arXiv 2109.01903), §3.
    """
    states = _open([zeroshot, finetuned])
    for alpha in alphas:
        soup = uniform_soup(states, weights=[1 - alpha, alpha], normalize=False, **options)
        assert soup.state is not None
        yield alpha, soup.state


def greedy_soup(
    sources: Sequence[Any],
    evaluate: Evaluate,
    *,
    scores: Sequence[float] | None = None,
    accept: str = "gt",
    ties: str = "first",
    order: str = "score",
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    out_dtype: torch.dtype | None = None,
    int_policy: str = "equal",
    progress: Callable[[str, int], None] | None = None,
    base: Any = None,
) -> Soup:
    """Add models to the average, the best first, and keep each only if the held-out score does not fall.

    Args:
        sources: k checkpoints, as for :func:`uniform_soup`.
        evaluate: state dict -> held-out score, higher is better; it may load the tensors, but not write to them. A
            :class:`zipfast.soups.Evaluator` stops early where a model cannot be accepted any more.
        scores: of the single models, if known; else each is evaluated.
        accept: ``"gt"``: a model stays if the score rises (the released code, and its published numbers); ``"ge"``: if it
            does not fall (the paper's listing).
        ties: which of two models of one score comes first: the ``"first"`` in `sources`, or the last (``"reference"``: the
            released code sorts in ascending order and reverses it).
        order: ``"score"`` or ``"random"`` (with `seed`; begins with the best all the same).
        journal: a .jsonl file of what was evaluated; a killed run begun again does not evaluate that again.
        out, include, exclude, out_dtype, int_policy: as there.
        base: for adapters, as there; what is evaluated is then the whole model, and without it an adapter of scale 1.
        progress: called with ("soup", models tried).

    Returns:
        :class:`Soup`; its score is at least that of the best single model.

    Raises:
        ValueError: as :func:`uniform_soup`; scores that are not k finite numbers; an evaluation that is NaN; a journal that
            is none.

    Cost: k - 1 evaluations (2k - 1 without `scores`), each after reading the soup's members once: what is evaluated, and
    what is returned, is the uniform soup of its members to the bit. One model in memory.

    Example:
        >>> models = [{"w": torch.tensor([v])} for v in (1.0, 3.0, 9.0)]
        >>> soup = greedy_soup(models, lambda state: -abs(state["w"].item() - 2.2))
        >>> soup.ingredients, soup.state["w"].item()
        ([0, 1], 2.0)

    Reference: Wortsman et al. 2022 (model soups, arXiv 2203.05482), §2, Recipe 1.
    """
    name = "greedy_soup"
    for what, value, known in (("accept", accept, ACCEPT), ("ties", ties, TIES), ("order", order, ("score", "random"))):
        if value not in known:
            raise ValueError(f"{name}: '{what}' must be {' or '.join(known)}, got {value!r}")
    kitchen = gather(
        sources,
        base=base,
        include=include,
        exclude=exclude,
        out=out,
        out_dtype=out_dtype,
        int_policy=int_policy,
        name=name,
    )
    states = kitchen.states
    memory = _Journal(journal, kitchen)
    alone = _scores(kitchen, evaluate, scores, memory, progress)
    best = max(range(len(states)), key=lambda i: alone[i] if ties == "first" else (alone[i], i))
    ranked = sorted(range(len(states)), key=lambda i: (-alone[i], i if ties == "first" else -i))
    if order == "random":
        shuffled = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed)).tolist()
        ranked = [best, *(i for i in shuffled if i != best)]
    soup, score, tried = (
        [ranked[0]],
        alone[ranked[0]],
        [Tried(ranked[0], states[ranked[0]].name, alone[ranked[0]], alone[ranked[0]], True)],
    )
    for number, i in enumerate(ranked[1:], 2):
        members = [*soup, i]
        found, exact = memory.score(members, partial(_evaluated, evaluate, kitchen, members), score, accept == "ge")
        stays = found > score or (accept == "ge" and found == score)
        tried.append(Tried(i, states[i].name, found, score, stays, exact))
        if stays:
            soup, score = members, found
        if progress is not None:
            progress("soup", number)
    weights = torch.zeros(len(states), dtype=torch.float64)
    weights[soup] = 1 / len(soup)
    facts = provenance("greedy", states, weights) | {"scores": alone, "score": score}
    column = weights_of(None, len(soup), normalize=False, name=name)
    state = kitchen.mix(soup, column, out=out, metadata=facts)
    notes = (*kitchen.notes, *kitchen.twins())
    path = None if out is None else os.fspath(out)
    names = tuple(s.name for s in states)
    return Soup(
        "greedy", tuple(weights.tolist()), names, state, path, score, tuple(alone), tuple(tried), notes, kitchen.config
    )  # fmt: skip


def _evaluated(
    evaluate: Evaluate, kitchen: Whole, members: Sequence[int], need: float | None, equal: bool
) -> tuple[float, bool]:
    """The score of an average, and whether it is exact: an evaluator that can stops where `need` is out of reach."""
    state = kitchen.mix(members, weights_of(None, len(members), normalize=False, name="greedy_soup"))
    assert state is not None
    if need is not None and hasattr(evaluate, "at_most"):
        score, exact = evaluate.at_most(state, need, equal=equal)
        return score, exact
    return evaluate(state), True


def _evaluated_alone(evaluate: Evaluate, kitchen: Whole, i: int, need: float | None, equal: bool) -> tuple[float, bool]:
    return evaluate(kitchen.alone(i)), True


def _scores(
    kitchen: Whole,
    evaluate: Evaluate,
    scores: Sequence[float] | None,
    memory: _Journal,
    progress: Callable[[str, int], None] | None,
) -> list[float]:
    if scores is not None:
        found = [float(score) for score in scores]
        if len(found) != len(kitchen.states) or not all(math.isfinite(score) for score in found):
            raise ValueError(
                f"greedy_soup: 'scores' must be {len(kitchen.states)} finite numbers, one per model, got {found}"
            )
        return found
    found = []
    for i in range(len(kitchen.states)):
        found.append(memory.score([i], partial(_evaluated_alone, evaluate, kitchen, i))[0])
        if progress is not None:
            progress("models", i + 1)
    return found


class _Journal:
    """Scores of averages that were evaluated, by the fingerprints of their members, one JSON line each."""

    def __init__(self, path: str | os.PathLike[str] | None, kitchen: Whole) -> None:
        self.path = None if path is None else Path(path)
        self.known: dict[str, tuple[float, bool]] = {}
        if self.path is None:
            return
        self.prints = kitchen.fingerprints()
        text = self.path.read_text() if self.path.is_file() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        try:
            for line in lines:
                entry = json.loads(line)
                self.known["+".join(entry["models"])] = float(entry["score"]), not entry.get("at_most", False)
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"greedy_soup: {self.path} must be a journal of soups, got another file ({e})") from None
        if "".join(line + "\n" for line in lines) != text:  # a kill cut the last line off
            with checkpoint.atomic_write(self.path, "w") as file:
                file.write("".join(line + "\n" for line in lines))

    def score(
        self,
        members: Sequence[int],
        evaluate: Callable[[float | None, bool], tuple[float, bool]],
        need: float | None = None,
        equal: bool = False,
    ) -> tuple[float, bool]:
        """Of the average of these; not exact where it is known to miss `need`, see :meth:`Evaluator.at_most`."""
        if self.path is None:
            return _checked(*evaluate(need, equal))
        prints = sorted(self.prints[i] for i in members)
        key = "+".join(prints)
        found, exact = self.known.get(key, (math.inf, False))
        misses = need is not None and (found < need or (found == need and not equal))
        if not exact and not misses:
            found, exact = self.known[key] = _checked(*evaluate(need, equal))
            entry = {"models": prints, "score": found, **({} if exact else {"at_most": True})}
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return found, exact


def _checked(score: float, exact: bool) -> tuple[float, bool]:
    value = float(score)
    if math.isnan(value):
        raise ValueError("greedy_soup: 'evaluate' must return a number, got NaN")
    return value, exact


def _open(sources: Sequence[Any]) -> list[State]:
    if isinstance(sources, (str, os.PathLike, Mapping)):
        sources = [sources]
    return [open_state(source, f"model {i}") for i, source in enumerate(sources)]


def provenance(recipe: str, states: Sequence[State], weights: Tensor) -> dict[str, Any]:
    """What a soup was made of, for the file."""
    from .._version import __version__

    return {"recipe": recipe, "sources": [s.name for s in states], "weights": weights.tolist(), "zipfast": __version__}
