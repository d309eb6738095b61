"""What bench/scaling counts beside what real jobs do, and its tables beside the page."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from bench.common import placed
from bench.scaling import __main__ as scaling
from bench.scaling import counts
from bench.scaling.rates import SHARES
from bench.scaling.shapes import SHAPES, Settings, Shape
from liar_ext import Recipe, ops
from liar_ext.calibration.batches import FOLDS
from liar_ext.job.analysis import analyze, narrowed, passes_of
from liar_ext.job.preparing import prepare
from liar_ext.job.solving import solve
from liar_ext.job.state import Job
from liar_ext.selection.allocation import allocate

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
SEQUENCES, LENGTH, BATCH, KEEP = 6, 20, 2, 0.5


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=40,
        intermediate_size=600,  # of which half are more than a block of rows
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=4,
        tie_word_embeddings=False,
        attn_implementation="eager",  # whose products torch counts on a CPU
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@contextmanager
def products(total):
    """Add the operations of torch's matrix products in the context, rotary positions aside."""
    with FlopCounterMode(display=False) as counter:
        yield
    found = counter.get_flop_counts()
    rotary = [sum(each.values()) for name, each in found.items() if name.endswith("rotary_emb")]
    total.append(counter.get_total_flops() - sum(rotary))


class Calls:
    """What a job asks of operators and factorisations, by formula from the shapes of each call."""

    def __init__(self, monkeypatch):
        self.counted, self.calls = Counter(), Counter()
        gram, solve = ops.gram_update_, ops.reconstruct
        factor, triangular = torch.linalg.cholesky_ex, torch.linalg.solve_triangular

        def note(kind, count):
            self.counted[kind] += count
            self.calls[kind] += 1

        def gram_update(g, s, c, x, y=None, weight=None):
            d = x.shape[1]
            note("gram", len(x) * (d * (d + 1) if y is None else 2 * d * y.shape[1]))
            return gram(g, s, c, x, y, weight)

        def reconstruct(weight, g, kept, damps, holdout=None, cross=None, *more, **how):
            d, n = g.shape[-1], kept.shape[-1]
            held, dense = holdout is not None, cross is not None
            for _ in range(len(g) if g.dim() == 3 else 1):
                found = counts.solved(d, n, weight.shape[-2], len(damps), held, dense)
                self.counted["solve"] += found["product"]
                note("factor", found["cholesky"])
                self.calls["solve"] += 1
            return solve(weight, g, kept, damps, holdout, cross, *more, **how)

        def cholesky(square):
            note("factor", len(square) ** 3 / 3)
            return factor(square)

        def solve_triangular(square, right, **how):
            note("factor", len(square) * right.numel())
            return triangular(square, right, **how)

        monkeypatch.setattr(ops, "gram_update_", gram_update)
        monkeypatch.setattr(ops, "reconstruct", reconstruct)
        monkeypatch.setattr(torch.linalg, "cholesky_ex", cholesky)
        monkeypatch.setattr(torch.linalg, "solve_triangular", solve_triangular)


def run(model, recipe, monkeypatch):
    """Run a job's steps; return its plan, torch's products by step, and the calls."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 61, (SEQUENCES, LENGTH), generator=generator)
    folds = torch.arange(SEQUENCES) // (SEQUENCES // 2) % FOLDS
    batches = [
        {"input_ids": a, "fold": b}
        for a, b in zip(ids.split(BATCH), folds.split(BATCH), strict=True)
    ]
    seen, calls, by_step = [], Calls(monkeypatch), []

    def step(call, *args):
        before = calls.counted.copy()
        with products(seen):
            found = call(*args)
        by_step.append(calls.counted - before)
        return found

    job = step(prepare, Job(model, batches, recipe))
    passes = passes_of(job, narrowed(job))
    found = step(analyze, job, passes)
    # Layers that all lose half: by curves all attention might stay, and be solved for nothing.
    at, budget = job.sites(model), job.recipe.budget
    plan = allocate(at, found.scores, budget, "uniform", model_type="llama")
    outcome = step(solve, job, passes, plan)
    ((_, _, rows),) = outcome.blocks
    return plan, seen, by_step, calls.calls, list(rows.values())


def features(plan, shape):
    kept = {}
    for kind, width in (("attn", 2 * shape.head_dim), ("mlp", 1)):
        (count,) = {len(plan.sites[f"{b}.{kind}"].kept) for b in range(shape.layers)}
        kept[kind] = count * width
    return kept


def tried(rows):
    """Return the finite λ that a site of a walk tried, on average by kind: all also tried ∞."""
    numbers = {kind: [] for kind in ("attn", "mlp")}
    for row in rows:
        count, _ = re.fullmatch(r".*, (\d) of (\d) λ", row.path).groups()
        numbers[row.name.split(".")[1]].append(int(count) - 1)
    return {kind: sum(each) / len(each) for kind, each in numbers.items()}


def total(works, kinds):
    return sum(work.operations[kind] for work in works for kind in kinds)


@pytest.mark.parametrize("whole", [True, False])
def test_a_default_job_makes_the_operations_that_are_counted(model, monkeypatch, whole):
    """Torch's counter sees the same products; operators and factorisations the same calls."""
    shape = Shape.of(model.config)
    sizes = [16 * d**2 for d in shape.features.values()]
    room = {} if whole else {"memory": 2 * sizes[0] + sizes[1]}  # three groups, one up to attention
    recipe = Recipe(keep=KEEP, tile=1, uniform_layers=True, **room)
    plan, (checked, scored, walked), steps, calls, rows = run(model, recipe, monkeypatch)
    settings = Settings(
        SEQUENCES,
        LENGTH,
        BATCH,
        KEEP,
        room=room.get("memory", 1 << 62),
        kept=features(plan, shape),
        probed={"attn": 2 * 2 * shape.head_dim, "mlp": 300},
        tried=tried(rows),
    )
    found = {work.name: work for work in counts.phases(shape, settings)}
    walk = [found[name] for name in found if name.startswith("walk")]
    once = shape.layers * counts.block(shape, LENGTH, LENGTH)
    assert checked == once
    solve = sum(step["solve"] for step in steps[2:])
    assert walked == pytest.approx(total(walk, ["forward", "product"]) - solve - once, rel=1e-12)
    before = [work for name, work in found.items() if not name.startswith("walk")]
    solve = steps[1]["solve"]
    assert scored == total(before, ["forward", "product"]) - solve
    assert steps[1]["gram"] == total(before, ["gram"])
    assert steps[2]["gram"] == total(walk, ["gram32"])
    assert steps[1]["factor"] == pytest.approx(total(before, ["cholesky"]))
    assert steps[2]["factor"] == pytest.approx(total(walk, ["cholesky"]))
    sites = 2 * shape.layers
    assert calls["solve"] == sites * (1 + FOLDS + 1) + sites


@pytest.mark.parametrize("whole", [True, False])
def test_a_fast_job_makes_the_operations_that_are_counted(model, monkeypatch, whole):
    shape = Shape.of(model.config)
    room = 1 << 62 if whole else 16 * sum(d**2 for d in shape.features.values())
    recipe = Recipe.preset("fast", keep=KEEP, tile=1, memory=room)
    _, (_, *products), steps, calls, _ = run(model, recipe, monkeypatch)
    settings = Settings(SEQUENCES, LENGTH, BATCH, KEEP, layerwise=False, curve=False, room=room)
    found = {work.name: work for work in counts.phases(shape, settings)}
    sums = [work for name, work in found.items() if name.startswith("calibration")]
    assert sum(products) == total(sums, ["forward"])
    assert steps[1]["gram"] + steps[2]["gram"] == total(sums, ["gram"])
    assert steps[2]["solve"] == total([found["solves"]], ["product"])
    assert steps[2]["factor"] == pytest.approx(total([found["solves"]], ["cholesky"]))
    assert calls["factor"] == 2 * shape.layers * (1 + FOLDS + 1)


def test_the_page_has_the_tables_of_the_bench():
    page = PAGE.read_text(encoding="utf-8")
    assert placed(page, "\n".join(scaling.lines(SHARES)), scaling.BEGIN, scaling.END) == page


def test_a_model_that_is_too_large_for_a_device_goes_block_by_block():
    small, *large = SHAPES
    assert not scaling.fitted(small, Settings(), 1).by_blocks
    assert all(scaling.fitted(shape, Settings(), 1).by_blocks for shape in large)
    # The parameters that the models are known for, in billions, norms aside.
    sizes = [shape.params / 1e9 for shape in SHAPES]
    assert sizes == pytest.approx([6.74, 32.5, 70.6], rel=0.01)
