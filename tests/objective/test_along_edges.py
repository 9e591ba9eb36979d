"""R along edges against plain loops over its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sas.objective.along_edges import DIRECTIONS, attention_along


def random_probs(seed: int, layers: int, batch: int, num_heads: int, seq: int, levels: int) -> tuple[list, list]:
    """to_head and to_dependent of every layer, 0 where there is no edge; few levels make ties common."""
    torch.manual_seed(seed)
    edge = torch.rand(batch, 1, seq) < 0.6
    edge[0] = False  # a sequence without any edge

    def draw() -> list[Tensor]:
        shape = (batch, num_heads, seq)
        return [
            (torch.where(edge, torch.randint(1, levels, shape) / levels, 0.0)).double().requires_grad_()
            for _ in range(layers)
        ]

    return draw(), draw()


def wanted_directions(to_head: list, to_dependent: list, directions: str) -> list[list[Tensor]]:
    return {"both": [to_head, to_dependent], "to_head": [to_head], "to_dependent": [to_dependent]}[directions]


def naive(parts: list[list[Tensor]], mode: str, p: float) -> tuple[list[float], list[list[Tensor]]]:
    """R of every sequence and its gradients, in Python numbers."""
    batch, num_heads, seq = parts[0][0].shape
    totals = [0.0] * batch
    parts = [[probs.detach() for probs in part] for part in parts]
    gradients = [[torch.zeros_like(x) for x in part] for part in parts]
    for part, grads in zip(parts, gradients, strict=True):
        for b in range(batch):
            if mode == "max":
                for i in range(seq):
                    best, winner = -1.0, (0, 0)
                    for layer, probs in enumerate(part):
                        for h in range(num_heads):
                            if float(probs[b, h, i]) > best:
                                best, winner = float(probs[b, h, i]), (layer, h)
                    totals[b] += best
                    grads[winner[0]][b, winner[1], i] += 1
            else:
                power = sum(float(x) ** p for probs in part for x in probs[b].flatten())
                if power > 0:
                    totals[b] += power ** (1 / p)
                    for probs, grad in zip(part, grads, strict=True):
                        grad[b] = power ** (1 / p - 1) * probs[b] ** (p - 1)
    return totals, gradients


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    layers=st.integers(1, 3),
    batch=st.integers(1, 3),
    num_heads=st.integers(1, 4),
    seq=st.integers(1, 12),
    levels=st.sampled_from([2, 3, 1000]),
    mode_p=st.sampled_from([("max", 1.0), ("uniform", 1.0), ("uniform", 2.0), ("uniform", 3.0)]),
    directions=st.sampled_from(DIRECTIONS),
)
def test_equals_loops(seed, layers, batch, num_heads, seq, levels, mode_p, directions):
    mode, p = mode_p
    to_head, to_dependent = random_probs(seed, layers, batch, num_heads, seq, levels)
    term = attention_along(to_head, to_dependent, mode=mode, p=p, directions=directions)
    totals, gradients = naive(wanted_directions(to_head, to_dependent, directions), mode, p)
    torch.testing.assert_close(term, torch.tensor(totals, dtype=torch.float64))
    assert term[0] == 0
    term.sum().backward()
    for part, grads in zip(wanted_directions(to_head, to_dependent, directions), gradients, strict=True):
        for probs, grad in zip(part, grads, strict=True):
            assert torch.isfinite(probs.grad).all()
            edge = probs > 0 if p == 1.0 else torch.ones_like(probs, dtype=torch.bool)
            if mode == "uniform" and p == 1.0:
                assert (probs.grad == 1).all()  # also where there is no edge: there, p itself has no gradient
            else:
                torch.testing.assert_close(probs.grad * edge, grad * edge)
            if mode == "uniform" and p > 1.0:
                assert (probs.grad[0] == 0).all()  # the zero sum of a sequence without edges


def test_ties_go_to_the_lowest_layer_and_head_alone():
    layers = [torch.full((1, 2, 3), 0.5, requires_grad=True) for _ in range(2)]
    layers[0].data[0, 0, 1] = 0.4
    layers[0].data[0, :, 2] = 0.4
    attention_along(layers, layers, directions="to_head").sum().backward()
    assert layers[0].grad.tolist() == [[[1, 0, 0], [0, 1, 0]]]
    assert layers[1].grad.tolist() == [[[0, 0, 1], [0, 0, 0]]]


@pytest.mark.parametrize(("mode", "p"), [("max", 1.0), ("uniform", 1.0), ("uniform", 2.0)])
def test_gradients_are_contiguous(mode, p):
    """A compiled layer copies others before it uses them."""
    to_head, to_dependent = random_probs(0, 3, 2, 2, 5, 1000)
    term = attention_along(to_head, to_dependent, mode=mode, p=p)
    assert all(grad.is_contiguous() for grad in torch.autograd.grad(term.sum(), to_head + to_dependent))


def test_unused_direction_has_no_gradient():
    to_head, to_dependent = random_probs(0, 2, 2, 2, 5, 1000)
    attention_along(to_head, to_dependent, directions="to_dependent").sum().backward()
    assert all(x.grad is None for x in to_head)
    assert all(x.grad is not None for x in to_dependent)


@pytest.mark.parametrize("p", [2.0, 16.0, 40.0])
def test_small_probabilities_to_a_high_power(p):
    """α^p is 0 in float32 for what suppression leaves, but the p-th root of its sum is not."""
    probs = [(1e-4 * torch.rand(2, 3, 5)).requires_grad_() for _ in range(2)]
    exact = [x.detach().double().requires_grad_() for x in probs]
    terms = [attention_along(x, x, mode="uniform", p=p, directions="to_head") for x in (probs, exact)]
    power = sum((x.detach().double() ** p).sum(dim=(1, 2)) for x in probs)
    torch.testing.assert_close(terms[1], power ** (1 / p))
    torch.testing.assert_close(terms[0].double(), terms[1])
    gradients = [torch.autograd.grad(term.sum(), x) for term, x in zip(terms, (probs, exact), strict=True)]
    for ours, true in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_no_edges_at_all_gives_zero_with_finite_gradient(p):
    zeros = [torch.zeros(2, 2, 4, requires_grad=True)]
    term = attention_along(zeros, zeros, mode="uniform", p=p)
    assert (term == 0).all()
    term.sum().backward()
    assert torch.isfinite(zeros[0].grad).all()
