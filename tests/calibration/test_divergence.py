"""Divergence of outputs against closed forms."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from oracle import by_states
from tiny import outputs, tiny, tiny_inputs
from torch import Tensor, nn

from liar_ext.calibration.batches import read_batch
from liar_ext.calibration.divergence import DenseOutputs, _spread
from liar_ext.healing.training import Teacher, losses


class Fixed(nn.Module):
    """A model that gives the same outputs whatever it gets."""

    def __init__(self, value: Tensor, key: str = "logits") -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.outputs, self.config = {key: value}, SimpleNamespace()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict:
        return self.outputs


def logits(*probabilities: float) -> Tensor:
    """Return logits of one distribution per token of one sequence, over two words."""
    return torch.tensor([[[math.log(p), math.log(1 - p)] for p in probabilities]])


def kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_divergence_of_two_coins():
    ids = torch.ones(1, 2, dtype=torch.long)
    dense = DenseOutputs(Fixed(logits(0.5, 0.9)), {"input_ids": ids})
    assert len(dense) == 2
    got = dense.divergence(Fixed(logits(0.25, 0.6) + 3.0))  # a constant changes no distribution
    assert got == pytest.approx(kl(0.5, 0.25) + kl(0.9, 0.6), rel=1e-5)
    assert dense.divergence(Fixed(logits(0.5, 0.9))) == pytest.approx(0.0, abs=1e-7)


def test_padding_and_labels_do_not_count():
    ids = torch.ones(1, 3, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1]]), "labels": ids}
    dense = DenseOutputs(Fixed(logits(0.1, 0.5, 0.9)), batch)
    assert len(dense) == 2
    got = dense.divergence(Fixed(logits(0.9, 0.25, 0.9)))
    assert got == pytest.approx(kl(0.5, 0.25), rel=1e-5)


def test_spans_are_two_distributions_over_the_tokens_that_are_read():
    """Of a start and of an end; a token of padding is none of their classes."""
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [1, 1, 0]])
    dense, pruned = torch.randn(2, 2, 2, 3, dtype=torch.float64)

    def model(spans: Tensor) -> Fixed:
        made = Fixed(spans[:, 0], "start_logits")
        made.outputs["end_logits"] = spans[:, 1]
        return made

    outputs = DenseOutputs(model(dense), {"input_ids": ids, "attention_mask": mask}, positions=1)
    assert len(outputs) == 4 and outputs.has_logits
    wanted = 0.0
    for sequence, read in enumerate([3, 2]):
        for which in range(2):
            p = dense[sequence, which, :read].softmax(0)
            q = pruned[sequence, which, :read].softmax(0)
            wanted += float((p * (p / q).log()).sum())
    assert outputs.divergence(model(pruned)) == pytest.approx(wanted, rel=1e-5)
    target = Teacher(model(dense))(read_batch({"input_ids": ids, "attention_mask": mask}))
    rows = losses(model(pruned), target)
    assert len(rows) == 4
    assert float(rows.sum()) == pytest.approx(wanted, rel=1e-5)


def test_hidden_states_are_compared_by_token_and_by_sequence_relative_to_their_energy():
    state = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [9.0, 9.0]]])
    batch = {
        "input_ids": torch.ones(1, 3, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 0]]),
    }
    other = state + torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 0.0]]])
    of_mean = (0.5**2 + 1.0**2) / (1.5**2 + 3.0**2)
    for positions, wanted in ((None, 1 / 25 + 4 / 4 + 2 * of_mean), (1, 4 / 4 + of_mean)):
        dense = DenseOutputs(Fixed(state, "last_hidden_state"), batch, positions)
        got = dense.divergence(Fixed(other, "last_hidden_state"))
        assert got == pytest.approx(0.5 * wanted)


def test_a_lone_logit_is_compared_by_its_value():
    """Of one class alone the divergence of distributions is 0 whatever the model does."""
    ids = torch.ones(3, 2, dtype=torch.long)
    scores = torch.tensor([[1.0], [-3.0], [0.0]])
    dense, other = DenseOutputs(Fixed(scores), {"input_ids": ids}), scores + 0.5
    assert dense.divergence(Fixed(other)) == pytest.approx(3 * 0.5 * 0.25)
    change = torch.tensor([[0.1], [0.2], [-0.3]])
    slope, root, centre = dense.metric(other)
    expanded = float((slope * change).sum() + 0.5 * (root * change).square().sum())
    found = dense.divergence(Fixed(other + change)) - dense.divergence(Fixed(other))
    assert centre is None and found == pytest.approx(expanded, rel=1e-5)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_each_output_counts_by_itself_where_several_may_be_right(problem):
    """A softmax over them would not see that all of them rise."""
    ids, z = torch.ones(3, 2, dtype=torch.long), torch.randn(3, 4)
    other, change = z + torch.randn(3, 4), 1e-2 * torch.randn(3, 4)

    def model(value: Tensor) -> Fixed:
        made = Fixed(value)
        made.config.problem_type = problem
        return made

    def distance(value: Tensor) -> Tensor:
        if problem == "regression":
            return (value - z).square() / 2
        pairs = zip(z.sigmoid().flatten(), value.sigmoid().flatten(), strict=True)
        return torch.tensor([kl(float(p), float(q)) for p, q in pairs])

    dense = DenseOutputs(model(z), {"input_ids": ids})
    assert len(dense) == 3
    for value in (z, z + 1.0, other):
        wanted = float(distance(value).sum())
        assert dense.divergence(model(value)) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    slope, root, centre = dense.metric(other)
    expanded = float((slope * change).sum() + 0.5 * (root * change).square().sum())
    found = dense.divergence(model(other + change)) - dense.divergence(model(other))
    assert centre is None and found == pytest.approx(expanded, rel=0.02)
    if problem != "regression":
        assert dense.same(other) == int(((other > 0) == (z > 0)).all(1).sum())
    target = Teacher(model(z))(read_batch({"input_ids": ids}))
    assert float(losses(model(z), target).sum()) == pytest.approx(0.0, abs=1e-6)
    scale = 2 / 4 if problem == "regression" else 1.0
    value = other.clone().requires_grad_()
    loss = losses(model(value), target).sum()
    assert float(loss) == pytest.approx(scale * float(distance(other).sum()), rel=1e-4)
    torch.testing.assert_close(torch.autograd.grad(loss, value)[0], scale * slope)


def test_rows_that_the_dense_model_cannot_give_are_left_out():
    ids = torch.ones(1, 3, dtype=torch.long)
    value = logits(0.5, 0.5, 0.9)
    value[0, 1, 0] = math.inf
    dense = DenseOutputs(Fixed(value), {"input_ids": ids})
    assert len(dense) == 2
    got = dense.divergence(Fixed(logits(0.25, 0.1, 0.6)))
    assert got == pytest.approx(kl(0.5, 0.25) + kl(0.9, 0.6), rel=1e-5)
    broken = logits(0.25, 0.1, 0.6)
    broken[0, 0, 0] = math.nan
    assert math.isnan(dense.divergence(Fixed(broken)))
    got = dense.divergence(Fixed(broken), finite_only=True)
    assert got == pytest.approx(2 * kl(0.9, 0.6), rel=1e-5)
    assert math.isnan(dense.divergence(Fixed(broken * math.nan), finite_only=True))


@pytest.mark.parametrize("count", [1, 3, 5, 11])
def test_positions_are_spread_over_the_tokens(count):
    ids = torch.ones(2, 12, dtype=torch.long)
    mask = torch.ones_like(ids).bool()
    mask[:, 8:] = False
    at = _spread(ids, mask, count)
    if count >= 8:
        assert at is None
        return
    assert at.tolist() == [int((step + 0.5) * 8 / count) for step in range(count)]


@pytest.mark.parametrize("family", ["llama", "bert", "vit", "distilbert"])
def test_some_positions_are_those_of_the_whole_output(family):
    model, other = tiny(family), tiny(family, seed=1)
    batch = tiny_inputs(model, batch=2, tokens=9)
    dense = DenseOutputs(model, batch, 4)
    p, q = outputs(model, batch).double(), outputs(other, batch).double()
    at = [int((step + 0.5) * 9 / 4) for step in range(4)]
    if family == "distilbert":
        counted = torch.zeros(2, 9)
        counted[:, at] = 1
        want, rows = by_states(p, q, counted), 16  # of tokens, and as many of their sequences
    else:
        if p.dim() == 3 and "input_ids" in batch:
            p, q = p[:, at], q[:, at]
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        want, rows = (p.exp() * (p - q)).sum(), p.shape[:-1].numel()
    assert len(dense) == rows
    with torch.no_grad():
        assert dense.divergence(other) == pytest.approx(float(want), rel=1e-3)
