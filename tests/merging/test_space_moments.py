# SPDX-License-Identifier: Apache-2.0
"""The statistics of a whole network: additive, saved, resumed, and no further than they are needed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zipfast
from zipfast import SpaceMoments, zoo
from zipfast.merging import find_spaces, gather_moments, part_of

DATA = [torch.randn(32, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]


def nets(count: int = 2) -> list[nn.Module]:
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append(zoo.mlp(8, (12, 10), 3).eval())
    return found


@pytest.fixture
def setting():
    models = nets()
    return find_spaces(models[0], (DATA[0],)), [m.state_dict() for m in models], models


def test_parts_add_up(setting):
    graph, states, _ = setting
    whole = gather_moments(graph, states, DATA)
    first = gather_moments(graph, states, DATA[:2])
    rest = gather_moments(graph, states, DATA[2:])
    both = first.merge(rest)
    assert both.batches == whole.batches == 6
    for name in whole:
        torch.testing.assert_close(both.correlation(name), whole.correlation(name), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"SpaceMoments.merge: 'other' must have the same spaces, taps and models"):
        first.merge(gather_moments(graph, states, DATA, taps="all"))


def test_saved_resumed_and_not_read_again(setting, tmp_path):
    graph, states, _ = setting
    path = tmp_path / "stats.safetensors"
    gather_moments(graph, states, DATA[:3], checkpoint_to=path, checkpoint_every=1)
    read = []

    class Counting(list):
        def __iter__(self):
            for i, x in enumerate(list.__iter__(self)):
                read.append(i)
                yield x

    resumed = gather_moments(graph, states, Counting(DATA), resume=SpaceMoments.load(path))
    whole = gather_moments(graph, states, DATA)
    for name in whole:
        assert torch.equal(resumed.correlation(name), whole.correlation(name))
        for a, b in zip(resumed[name], whole[name]):
            assert all(torch.equal(x, y) for x, y in zip(a.sums(), b.sums())) and a.count == b.count
    with pytest.raises(ValueError, match=r"gather_moments: 'resume' must hold statistics of the same spaces"):
        gather_moments(graph, states, DATA, taps="all", resume=SpaceMoments.load(path))


def test_merge_keeps_its_statistics_in_a_file(tmp_path):
    models, path = nets(), tmp_path / "stats.safetensors"
    want = zipfast.merge(models, (DATA[0],), DATA)
    zipfast.merge(models, (DATA[0],), DATA, statistics=path)
    broken = [torch.full_like(x, torch.nan) for x in DATA]  # would be refused if it were read
    again = zipfast.merge(models, (DATA[0],), broken, statistics=path)
    assert all(torch.equal(v, want.state_dict[k]) for k, v in again.state_dict.items())
    with pytest.raises(ValueError, match=r"'statistics' must be of these models and data, but .* is of other inputs"):
        zipfast.merge(nets(3)[1:], (DATA[0],), DATA, statistics=path)


def test_another_file_is_refused(tmp_path):
    zipfast.checkpoint.save(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    with pytest.raises(ValueError, match=r"SpaceMoments.load: .* must hold statistics"):
        SpaceMoments.load(tmp_path / "a.safetensors")


def test_nothing_behind_the_cut_is_run_or_kept(setting):
    graph, states, models = setting
    part = part_of(graph, stop="relu")
    assert [space.name for space in part.plan.mergeable] == ["1"]
    short = [{k: v for k, v in state.items() if k.startswith("1.")} for state in states]  # no other weights are there
    stats = gather_moments(part, short, DATA)
    with torch.no_grad():
        hidden = torch.cat([m[:3](torch.cat(DATA)) for m in models], 1)
    torch.testing.assert_close(stats.correlation("1"), torch.corrcoef(hidden.T).float(), atol=4e-6, rtol=0)


def test_several_taps_count_as_concatenated_standardised_samples(setting):
    graph, states, models = setting
    stats = gather_moments(graph, states, DATA, taps="all")
    x = torch.cat(DATA)
    with torch.no_grad():
        places = [[m[:2](x).double() for m in models], [m[:3](x).double() for m in models]]  # before and after the ReLU
    rows = []
    for place in places:
        f = torch.cat(place, 1)
        f = f - f.mean(0)
        norm = f.norm(dim=0)
        rows.append(torch.where(norm > 1e-9, f / norm, 0.0))
    joined = torch.cat(rows)
    norm = joined.norm(dim=0)
    want = (joined / norm).T @ (joined / norm)
    assert len(stats["1"]) == 2
    torch.testing.assert_close(stats.correlation("1").double(), want, atol=1e-5, rtol=0)


def test_dead_at_one_place_and_alive_at_another():
    models = nets()
    with torch.no_grad():
        for m in models:
            m[1].bias[:4] = -100.0
    graph, states = find_spaces(models[0], (DATA[0],)), [m.state_dict() for m in models]
    last = gather_moments(graph, states, DATA).correlation("1")
    every = gather_moments(graph, states, DATA, taps="all").correlation("1")
    assert last[:4].abs().max() == 0
    assert every[:4].abs().max() > 0.5 and torch.allclose(every.diagonal(), torch.ones(24))


def test_the_size_does_not_depend_on_the_data(setting):
    graph, states, _ = setting
    few, many = (gather_moments(graph, states, DATA * n) for n in (1, 10))
    size = [sum(t.numel() for m in stats.flat() for t in m.sums()) for stats in (few, many)]
    assert size[0] == size[1]


def test_skipped_spaces_are_not_read(setting):
    graph, states, _ = setting
    assert list(gather_moments(graph, states, DATA, skip=["1"])) == ["3"]
    with pytest.raises(ValueError, match="SpaceMoments: 'taps' must be 'last' or 'all', got 'first'"):
        gather_moments(graph, states, DATA, taps="first")
