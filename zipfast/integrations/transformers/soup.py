# SPDX-License-Identifier: Apache-2.0
"""A greedy soup of one training: the weights along the way, averaged as long as the held-out score rises."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import checkpoint
from ...merging import reestimate_batchnorm
from ...pretrained import WEIGHTS, save_pretrained
from ...soups import uniform_soup
from ...soups.recipes import ACCEPT, Tried
from ...states import INDEXES, SINGLES
from .common import TrainerCallback, check_resumed, undisturbed

EVENTS = ("evaluate", "save", "epoch")
FILE = "greedy.json"
FORMAT = 1


class GreedySoupCallback(TrainerCallback):
    """Try the present weights as an ingredient of a soup at every evaluation, save or epoch; keep them if it gets better.

    `out` is a folder that ``from_pretrained`` loads, from the first ingredient on; beside the soup it has greedy.json (what
    was tried, and its scores) and the ingredients' own weights. The training goes on from its own weights, bit for bit. A
    resumed run forgets what was tried after its checkpoint and tries it again, so that it ends like one that was not
    interrupted.

    Args:
        evaluate: ``evaluate(model)`` -> held-out score, higher is better; the model holds the weights to be scored, in eval
            mode. :func:`metric_of` makes one of a trainer, to which the callback is then added.
        out: the folder.
        at: ``"evaluate"``, ``"save"`` or ``"epoch"``: when to try.
        start: the first step that may be an ingredient; averages take in early, worse weights otherwise.
        accept: ``"gt"``: an ingredient stays if the score rises; ``"ge"``: if it does not fall.
        recalibrate: batches to re-estimate batch-norm statistics on, where there are any: averaged ones are wrong.
        max_shard_size: of weight files, as transformers takes it.
        overwrite: a new run may delete the soup or the model in `out`.

    Attributes:
        tried: list of :class:`zipfast.soups.Tried`, in order, `model` being the step. score: of the soup; None before the
        first. members: steps of the ingredients.

    Raises:
        ValueError: options that are none; several processes (soup their checkpoints with ``zipfast.greedy_soup``
        afterwards); a folder with another run's soup or another model; a score that is NaN; weights that are not finite.
        OSError: the folder.

    Cost: per event one evaluation, one copy of the model in memory, and every ingredient's weights read once; on disk one
    copy of the weights per ingredient.

    Example:
        >>> callback = GreedySoupCallback(lambda model: 0.0, "soup", at="epoch")

    Reference: Wortsman et al. 2022 (model soups, arXiv 2203.05482), §2, Recipe 1, in the order of training instead of that
    of the scores.
    """

    def __init__(
        self,
        evaluate: Callable[[nn.Module], float],
        out: str | Path,
        *,
        at: str = "evaluate",
        start: int = 1,
        accept: str = "gt",
        recalibrate: Iterable[Any] | None = None,
        max_shard_size: int | str | None = None,
        overwrite: bool = False,
    ) -> None:
        if not callable(evaluate):
            kind = type(evaluate).__name__
            raise TypeError(
                f"GreedySoupCallback: 'evaluate' must be a function of the model, got {kind}; see metric_of(trainer, ...)"
            )
        for what, value, known in (("at", at, EVENTS), ("accept", accept, ACCEPT)):
            if value not in known:
                raise ValueError(f"GreedySoupCallback: '{what}' must be one of {', '.join(known)}, got {value!r}")
        self.out = Path(out).expanduser()
        checkpoint.check_folder(self.out)
        self.evaluate, self.at, self.start, self.accept = evaluate, at, start, accept
        self.recalibrate, self.max_shard_size, self.overwrite = recalibrate, max_shard_size, overwrite
        self.tried: list[Tried] = []
        self.training = False

    @property
    def members(self) -> list[int]:
        """Steps of the ingredients."""
        return [one.model for one in self.tried if one.accepted]

    @property
    def score(self) -> float | None:
        """Of the soup; None before the first ingredient."""
        return next((one.score for one in reversed(self.tried) if one.accepted), None)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **_: Any
    ) -> None:
        """Go on from the checkpoint, or begin with nothing."""
        if args.world_size > 1:
            raise ValueError(
                f"GreedySoupCallback: 'args' must train in one process, got {args.world_size}; keep the checkpoints and "
                "call zipfast.greedy_soup on them afterwards"
            )
        check_resumed("GreedySoupCallback", args, state, model)
        there = self._read()
        if there and state.global_step == 0 and not self.overwrite:
            raise ValueError(
                f"GreedySoupCallback: 'out' must be free for a new run, got {self.out} with a soup of another; resume "
                "from a checkpoint, name another folder, or say overwrite=True"
            )
        names = [name for name in (*SINGLES, *INDEXES) if (self.out / name).is_file()]
        if names and not there and not (self.out / "ingredients").is_dir() and not self.overwrite:
            raise ValueError(
                f"GreedySoupCallback: 'out' must be free for a new run, got {self.out} with {names[0]}; name another "
                "folder, or say overwrite=True"
            )
        self.tried = [one for one in there if one.model <= state.global_step]
        kept = {self._file(step).name for step in self.members}
        for file in (self.out / "ingredients").glob("step-*.safetensors"):
            if file.name not in kept:  # later ones, and one that was being tried
                file.unlink()
        if there:
            self._restore(model, processing_class)
        if self.at == "save" and state.global_step and state.global_step not in [one.model for one in self.tried]:
            self._try(state, model, processing_class)  # killed between the checkpoint and this
        self.training = True

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **_: Any
    ) -> None:
        """Try at an evaluation."""
        if self.at == "evaluate" and self.training:
            self._try(state, model, processing_class)

    def on_save(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **_: Any
    ) -> None:
        """Try at a checkpoint."""
        if self.at == "save":
            self._try(state, model, processing_class)

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **_: Any
    ) -> None:
        """Try at the end of an epoch."""
        if self.at == "epoch":
            self._try(state, model, processing_class)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluations from now on are of other weights."""
        self.training = False

    def _try(self, state: Any, model: nn.Module, processor: Any) -> None:
        step = int(state.global_step)
        if step < self.start or any(one.model == step for one in self.tried):
            return
        file = self._file(step)
        file.parent.mkdir(parents=True, exist_ok=True)
        own = _state_of(model)
        checkpoint.save(file, own, {"step": step})
        best = self.score
        try:
            score = self._scored(model, [*map(self._file, self.members), file])
            stays = best is None or score > best or (self.accept == "ge" and score == best)
            if stays:
                self._save(model, processor)
        except BaseException:
            file.unlink()
            raise
        finally:
            _load(model, own)
        if not stays:
            file.unlink()
        self.tried.append(Tried(step, file.name, score, score if best is None else best, stays))
        self._write()
        entry = {"soup_score": score, "soup_accepted": stays, "epoch": state.epoch, "step": step}
        state.log_history.append(entry)

    def _scored(self, model: nn.Module, files: list[Path]) -> float:
        """The score of the average of these, which the model then holds."""
        self._mix(model, files)
        with undisturbed(model):
            score = float(self.evaluate(model))
        if math.isnan(score):
            raise ValueError("GreedySoupCallback: 'evaluate' must return a number, got NaN")
        return score

    def _mix(self, model: nn.Module, files: list[Path]) -> None:
        soup = uniform_soup(files, int_policy="first").state
        assert soup is not None
        _load(model, soup)
        if self.recalibrate is not None:
            with undisturbed(model):
                reestimate_batchnorm(model, self.recalibrate)

    def _restore(self, model: nn.Module, processor: Any) -> None:
        """The folder as it was after what is still remembered."""
        if self.members:
            own = _state_of(model)
            try:
                self._mix(model, [*map(self._file, self.members)])
                self._save(model, processor)
            finally:
                _load(model, own)
        else:
            for pattern in WEIGHTS:
                for old in self.out.glob(pattern):
                    old.unlink()
        self._write()

    def _save(self, model: nn.Module, processor: Any) -> None:
        save_pretrained(model, self.out, processor=processor, max_shard_size=self.max_shard_size)

    def _file(self, step: int) -> Path:
        return self.out / "ingredients" / f"step-{step:08d}.safetensors"

    def _write(self) -> None:
        known = {"format": FORMAT, "score": self.score, "members": self.members, "tried": [*map(asdict, self.tried)]}
        with checkpoint.atomic_write(self.out / FILE, "w") as file:
            json.dump(known, file, indent=1)

    def _read(self) -> list[Tried]:
        path = self.out / FILE
        if not path.is_file():
            return []
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["format"] != FORMAT:
                raise ValueError(f"format {known['format']}")
            return [Tried(**one) for one in known["tried"]]
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"GreedySoupCallback: {path} must be the record of a soup of format {FORMAT}, got another file ({e}); name "
                "another folder"
            ) from None


def metric_of(
    trainer: Any, metric: str, *, greater_is_better: bool | None = None, dataset: Any = None
) -> Callable[[nn.Module], float]:
    """A trainer's metric as a score, higher is better, that neither logs nor calls back: soups may be scored with it.

    Args:
        trainer: with ``eval_dataset`` and, for metrics other than the loss, ``compute_metrics``.
        metric: as ``metric_for_best_model`` names it, with or without ``eval_``.
        greater_is_better: None: unless it ends in "loss", as the trainer has it.
        dataset: instead of the trainer's.

    Returns:
        A function of the trainer's own model.

    Raises:
        ValueError: on a call: another model; no such metric, with the names there are.
    """
    name = metric.removeprefix("eval_")
    rises = not name.endswith("loss") if greater_is_better is None else greater_is_better

    def evaluate(model: nn.Module) -> float:
        if model is not trainer.model:
            raise ValueError(f"metric_of: 'model' must be the trainer's own, got another {type(model).__name__}")
        found = trainer.evaluation_loop(
            trainer.get_eval_dataloader(dataset), description="Soup", metric_key_prefix="soup",
            prediction_loss_only=True if trainer.compute_metrics is None else None,
        )  # fmt: skip
        for (
            callback
        ) in trainer.callback_handler.callbacks:  # the progress bar would go on with it at the next evaluation
            if getattr(callback, "prediction_bar", None) is not None:
                callback.prediction_bar.close()
                callback.prediction_bar = None
        value = found.metrics.get(f"soup_{name}")
        if value is None:
            known = ", ".join(sorted(key.removeprefix("soup_") for key in found.metrics))
            raise ValueError(f"metric_of: 'metric' must be one of the trainer's ({known}), got {metric!r}")
        return float(value) if rises else -float(value)

    return evaluate


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)
