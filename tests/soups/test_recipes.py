# SPDX-License-Identifier: Apache-2.0
"""Recipes: weighted averages, WiSE-FT's curve, greedy soups that replay their definition, journals that resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from zipfast import checkpoint
from zipfast.soups import Soup, greedy_soup, uniform_soup, wise_ft
from zipfast.soups.ingredients import fingerprint
from zipfast.states import open_state

State = dict[str, Tensor]


def model(*values: float) -> State:
    return {"w": torch.tensor(values), "b": torch.tensor(sum(values))}


def random_models(count: int, seed: int = 0) -> list[State]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"w": torch.randn(6, 5, generator=generator), "b": torch.randn(5, generator=generator)} for _ in range(count)
    ]


TARGET = random_models(1, 99)[0]


def score(state: State) -> float:
    """Higher the nearer to a target, in steps, so that ties occur."""
    return -round(float((state["w"] - TARGET["w"]).square().mean() + (state["b"] - TARGET["b"]).square().mean()), 1)


class Recorder:
    """An evaluation that keeps what it was asked."""

    def __init__(self, inner: Callable[[State], float] = score) -> None:
        self.inner, self.asked = inner, list[State]()

    def __call__(self, state: State) -> float:
        self.asked.append({key: value.clone() for key, value in state.items()})
        return self.inner(state)


def alike(one: State | None, two: State | None) -> bool:
    assert one is not None and two is not None
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def same(one: Soup, two: Soup) -> bool:
    return one.to_dict() == two.to_dict() and alike(one.state, two.state)


# ---------------------------------------------------------------------------------------------------------------- uniform


def test_uniform_weights() -> None:
    models = [model(1.0, 2.0), model(3.0, 6.0), model(-1.0, 1.0)]
    assert uniform_soup(models).weights == pytest.approx([1 / 3] * 3)
    soup = uniform_soup(models, weights=[2, 1, 1])
    assert soup.weights == (0.5, 0.25, 0.25) and soup.ingredients == [0, 1, 2]
    assert soup.state is not None and soup.state["w"].tolist() == [1.0, 2.75]
    raw = uniform_soup(models, weights=[1, 0, -1], normalize=False)
    assert raw.weights == (1.0, 0.0, -1.0) and raw.ingredients == [0, 2]
    assert raw.state is not None and raw.state["w"].tolist() == [2.0, 1.0]
    assert uniform_soup([model(1.0)]).state == {"w": torch.tensor([1.0]), "b": torch.tensor(1.0)}
    assert uniform_soup(model(1.0)).names == ("model 0",), "a single model may stand alone"


def test_the_file_says_what_it_was_made_of(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for i, path in enumerate(paths):
        safetensors.torch.save_file(model(float(i)), path)
    out = tmp_path / "soup.safetensors"
    soup = uniform_soup(paths, weights=[3, 1], out=out, metadata={"who": "me"})
    assert soup.state is None and soup.path == str(out)
    facts = checkpoint.read_metadata(out)
    assert facts["recipe"] == "uniform" and facts["weights"] == [0.75, 0.25] and facts["who"] == "me"
    assert facts["sources"] == [str(path) for path in paths] and facts["zipfast"]
    plain = json.loads(json.dumps(soup.to_dict()))
    assert plain["weights"] == [0.75, 0.25] and plain["path"] == str(out) and "state" not in plain


def test_wise_ft_ends_are_the_models_to_the_bit() -> None:
    start, tuned = random_models(2)
    curve = dict(wise_ft(start, tuned, [0.0, 0.25, 1.0]))
    assert alike(curve[0.0], start) and alike(curve[1.0], tuned)
    assert torch.equal(curve[0.25]["w"], start["w"] * 0.75 + tuned["w"] * 0.25)
    with pytest.raises(ValueError, match="model 1 lacks b"):
        next(wise_ft(start, {"w": tuned["w"]}, [0.5]))


# ----------------------------------------------------------------------------------------------------------------- greedy


def replay(models: Sequence[State], soup: Soup, accept: str) -> None:
    """Every step again, from the definition."""
    alone = [score(m) for m in models]
    assert list(soup.scores) == alone
    members, best = [soup.tried[0].model], alone[soup.tried[0].model]
    assert best == max(alone) and sorted(t.model for t in soup.tried) == list(range(len(models)))
    for step in soup.tried[1:]:
        state = uniform_soup([models[i] for i in [*members, step.model]]).state
        assert state is not None and step.score == score(state) and step.best == best
        assert step.accepted == (step.score > best or (accept == "ge" and step.score == best))
        if step.accepted:
            members.append(step.model)
            best = step.score
    assert soup.ingredients == sorted(members) and soup.score == best >= max(alone)
    assert alike(soup.state, uniform_soup([models[i] for i in members]).state)
    assert soup.weights == tuple(1 / len(members) if i in members else 0.0 for i in range(len(models)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("accept", ["gt", "ge"])
@pytest.mark.parametrize("order", ["score", "random"])
def test_greedy_replays_its_definition(order: str, accept: str, seed: int) -> None:
    models = random_models(8, seed)
    models.append(models[3])
    recorder = Recorder()
    soup = greedy_soup(models, recorder, accept=accept, order=order, seed=seed)
    replay(models, soup, accept)
    assert len(recorder.asked) == 2 * len(models) - 1
    assert soup.score in {score(asked) for asked in recorder.asked}
    assert any(alike(asked, soup.state) for asked in recorder.asked), "what is returned was evaluated, to the bit"
    ranked = [t.model for t in soup.tried]
    if order == "score":
        assert ranked == sorted(range(len(models)), key=lambda i: (-soup.scores[i], i))
    else:
        assert ranked == [t.model for t in greedy_soup(models, score, order=order, seed=seed).tried]
        others = {tuple(t.model for t in greedy_soup(models, score, order=order, seed=s).tried) for s in range(20, 24)}
        assert len(others) > 1


def test_gt_and_ge_differ_on_a_tie() -> None:
    models = [model(1.0), model(3.0)]
    assert greedy_soup(models, lambda state: 5.0, accept="gt").ingredients == [0]
    assert greedy_soup(models, lambda state: 5.0, accept="ge").ingredients == [0, 1]


def test_ties_of_single_models() -> None:
    models = [model(1.0), model(2.0), model(3.0)]
    for ties, wanted in (("first", [0, 1, 2]), ("reference", [2, 1, 0])):
        soup = greedy_soup(models, lambda state: 1.0, ties=ties)
        assert [t.model for t in soup.tried] == wanted and soup.ingredients == [wanted[0]]


def test_scores_that_are_known_are_not_asked_for() -> None:
    models, recorder = random_models(4), Recorder()
    scores = [score(m) for m in models]
    assert same(greedy_soup(models, recorder, scores=scores), greedy_soup(models, score, scores=scores))
    assert len(recorder.asked) == 3
    for bad in ([1.0], [1.0, 2.0, 3.0, float("nan")]):
        with pytest.raises(ValueError, match="'scores' must be 4 finite numbers, one per model"):
            greedy_soup(models, score, scores=bad)


def test_minus_infinity_is_a_score() -> None:
    models = random_models(3)
    worst = models[1]["b"]
    soup = greedy_soup(models, lambda state: -math.inf if torch.equal(state["b"], worst) else score(state))
    assert soup.tried[-1].model == 1


def test_bad_options() -> None:
    models = random_models(2)
    for options, message in (
        ({"accept": "le"}, "'accept' must be gt or ge, got 'le'"),
        ({"ties": "last"}, "'ties' must be first or reference, got 'last'"),
        ({"order": "name"}, "'order' must be score or random, got 'name'"),
    ):
        with pytest.raises(ValueError, match=message):
            greedy_soup(models, score, **options)
    with pytest.raises(ValueError, match="'evaluate' must return a number, got NaN"):
        greedy_soup(models, lambda state: float("nan"))


def test_a_nan_ingredient_is_named() -> None:
    models = random_models(3)
    models[2]["w"][1, 1] = float("inf")
    with pytest.raises(ValueError, match=r"greedy_soup: .*NaN or infinity in model 2, tensor 'w' at flat index 6"):
        greedy_soup(models, lambda state: 1.0, accept="ge")


def test_progress() -> None:
    seen: list[tuple[str, int]] = []
    greedy_soup(random_models(3), score, progress=lambda stage, n: seen.append((stage, n)))
    assert seen == [("models", 1), ("models", 2), ("models", 3), ("soup", 2), ("soup", 3)]


# ---------------------------------------------------------------------------------------------------------------- journal


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 2, 5, 6])
def test_a_killed_run_goes_on(after: int, tmp_path: Path) -> None:
    models, journal = random_models(4), tmp_path / "j.jsonl"
    whole = greedy_soup(models, score, journal=tmp_path / "other.jsonl")

    def mortal(state: State) -> float:
        if len(first.asked) > after:
            raise Killed
        return score(state)

    first, second = Recorder(mortal), Recorder()
    with pytest.raises(Killed):
        greedy_soup(models, first, journal=journal)
    assert same(greedy_soup(models, second, journal=journal), whole)
    assert len(second.asked) == 2 * 4 - 1 - after
    third = Recorder()
    assert same(greedy_soup(models, third, journal=journal), whole) and not third.asked
    assert journal.read_text() == (tmp_path / "other.jsonl").read_text()


def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path: Path) -> None:
    models, journal = random_models(3), tmp_path / "j.jsonl"
    whole = greedy_soup(models, score, journal=journal)
    text = journal.read_text()
    journal.write_text(text[:-9])
    recorder = Recorder()
    assert same(greedy_soup(models, recorder, journal=journal), whole)
    assert len(recorder.asked) == 1 and journal.read_text() == text


def test_journals_know_models_by_their_weights(tmp_path: Path) -> None:
    models, journal = random_models(3), tmp_path / "j.jsonl"
    greedy_soup(models, score, journal=journal)
    recorder = Recorder()
    greedy_soup([models[2], models[0], models[1]], recorder, journal=journal)
    assert not recorder.asked, "another order of the same models"
    models[1]["w"][0, 0] += 1
    changed = greedy_soup(models, recorder, journal=journal)
    assert len(recorder.asked) > 1 and changed.weights == greedy_soup(models, score).weights


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    journal = tmp_path / "j.jsonl"
    for text in ("hello\n", '{"a": 1}\n', "[1]\n", '{"models": ["x"], "score": "high"}\n'):
        journal.write_text(text)
        with pytest.raises(ValueError, match=r"j.jsonl must be a journal of soups, got another file"):
            greedy_soup(random_models(2), score, journal=journal)
        assert journal.read_text() == text


class Stopping:
    """An evaluation that says only that a soup misses."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, state: State) -> float:
        self.calls += 1
        return score(state)

    def at_most(self, state: State, need: float, *, equal: bool) -> tuple[float, bool]:
        self.calls += 1
        found = score(state)
        misses = found < need or (found == need and not equal)
        return (need if not equal else math.nextafter(need, -math.inf), False) if misses else (found, True)


def test_bounds_are_kept_as_bounds(tmp_path: Path) -> None:
    models, journal = random_models(6, 3), tmp_path / "j.jsonl"
    plain, stopping = greedy_soup(models, score), Stopping()
    soup = greedy_soup(models, stopping, journal=journal)
    assert soup.weights == plain.weights and any(not t.exact for t in soup.tried)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert sum(line.get("at_most", False) for line in lines) == sum(not t.exact for t in soup.tried)
    calls = stopping.calls
    assert same(greedy_soup(models, stopping, journal=journal), soup) and stopping.calls == calls
    # "at least as good" asks for more than the bound of "better" can tell: only what is still open is evaluated again
    again = greedy_soup(models, stopping, journal=journal, accept="ge")
    assert again.weights == greedy_soup(models, score, accept="ge").weights


# ------------------------------------------------------------------------------------------------------------------ files


def test_from_files_to_a_file(tmp_path: Path) -> None:
    models = random_models(5)
    paths = [tmp_path / f"{i}.safetensors" for i in range(5)]
    for path, state in zip(paths, models):
        safetensors.torch.save_file(state, path)
    memory = greedy_soup(models, score)
    soup = greedy_soup(paths, score, out=tmp_path / "soup.safetensors")
    assert soup.weights == memory.weights and soup.state is None
    assert alike(safetensors.torch.load_file(tmp_path / "soup.safetensors"), memory.state)
    facts = checkpoint.read_metadata(tmp_path / "soup.safetensors")
    assert facts["recipe"] == "greedy" and facts["score"] == memory.score and facts["scores"] == list(memory.scores)
    assert json.loads(json.dumps(soup.to_dict()))["tried"][0]["accepted"] is True


def test_a_failed_evaluation_leaves_no_file(tmp_path: Path) -> None:
    def broken(state: State) -> float:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        greedy_soup(random_models(2), broken, out=tmp_path / "soup.safetensors", journal=tmp_path / "j.jsonl")
    assert os.listdir(tmp_path) == []


def test_fingerprints_are_those_of_the_states(tmp_path: Path) -> None:
    state = {**random_models(1)[0], "none": torch.empty(0, 2), "n": torch.tensor(3), "h": torch.ones(5).bfloat16()}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    wanted = checkpoint.state_hash(state)[:16]
    assert fingerprint(open_state(state)) == fingerprint(open_state(tmp_path / "m.safetensors")) == wanted
