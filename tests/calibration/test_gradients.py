"""Gradient statistics against finite differences and plain autograd, and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from covers import cover
from tiny import tiny, tiny_inputs
from torch import Tensor
from torch.nn import functional

from liar_ext import InputError, MomentBank, calibrate, criterion, prune, score, sites
from liar_ext.calibration import collect as calibration
from liar_ext.calibration.divergence import collect_gradients
from liar_ext.models.recipe_checks import CRITERIA
from liar_ext.selection.criteria import _CRITERIA

STEP = 0.02  # norms of a float64 model round to float32 in some families
# Grouped heads, a head for classes, transposed fused layers, tokens and sequences flattened.
CASES = [
    ("llama", "auto"),
    ("llama", "head"),
    ("bert", "auto"),
    ("roberta", "auto"),
    ("gpt2", "auto"),
    ("gpt_neox", "auto"),
    ("opt", "auto"),
    ("vit", "auto"),
    ("phi3", "head"),
    ("falcon_new", "auto"),
    ("falcon_new", "head"),
]


def labelled(model, inputs: dict) -> dict:
    """Add labels for the model's own loss, padding left out."""
    generator = torch.Generator().manual_seed(7)
    rows = len(next(iter(inputs.values())))
    if "Classification" in type(model).__name__:
        labels = torch.randint(model.config.num_labels, (rows,), generator=generator)
    else:
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return {**inputs, "labels": labels}


def mean_loss(model, inputs: dict) -> Tensor:
    """Return the mean cross-entropy in float64; the models' own loss is float32 for some."""
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    labels = inputs["labels"]
    if model.can_generate():
        logits, labels = logits[:, :-1], labels[:, 1:]
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def unlabelled(model, inputs: dict) -> dict:
    """Drop the labels where the text itself is what a model is asked for."""
    return {k: v for k, v in inputs.items() if k != "labels" or not model.can_generate()}


def sample(name: str):
    """Return a float64 model, padded sequences with labels, and the same in unequal batches."""
    smooth = {"activation_function": "gelu"} if name == "opt" else {}  # ReLU has kinks
    model = tiny(name, dtype=torch.float64, **smooth)
    inputs = tiny_inputs(model, batch=5, tokens=7)
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, 4:] = 0
        inputs["attention_mask"][3, 2:] = 0
    whole = labelled(model, inputs)
    parts = [{k: v[:2] for k, v in whole.items()}, {k: v[2:] for k, v in whole.items()}]
    return model, whole, [unlabelled(model, part) for part in parts]


def slope(loss: Callable[[], Tensor], scale: Callable[[float], None]) -> Tensor:
    """Return the derivative of a loss by a factor at 1, by differences of fourth order."""
    total = torch.zeros((), dtype=torch.float64)
    for steps, weight in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
        scale(1 + steps * STEP)
        with torch.no_grad():
            total += weight * loss()
    scale(1.0)
    return total / (12 * STEP)


def unit_slices(model, site, unit: int) -> list[list[tuple[torch.nn.Parameter, tuple]]]:
    """Return, per layer of a site, the parameters and the index of what one unit owns."""
    everything = slice(None)
    layers = []
    for path in site.producers:
        layer = model.get_submodule(path)
        count = layer.weight.shape[1 if site.wiring.transposed else 0]
        rows = (site.row_units(path, count) == unit).nonzero().flatten()
        index = (everything, rows) if site.wiring.transposed else (rows, everything)
        parts = [(layer.weight, index)]
        if layer.bias is not None:
            parts.append((layer.bias, (rows,)))
        layers.append(parts)
    columns = site.features([unit])
    index = (columns, everything) if site.wiring.transposed else (everything, columns)
    return [*layers, [(model.get_submodule(site.consumer).weight, index)]]


@pytest.mark.parametrize(("name", "attn_unit"), CASES)
def test_signed_products_are_the_slope_of_the_loss(name: str, attn_unit: str):
    """Scaling all that a unit owns in one layer changes the mean loss by Σ w·g."""
    model, whole, batches = sample(name)
    at = sites(model, attn_unit=attn_unit)
    gradients = collect_gradients(model, batches, at)
    for site in (at[0], at[-1]):
        for unit in {0, site.units - 1}:
            for layer, parts in enumerate(unit_slices(model, site, unit)):
                dense = [(parameter, index, parameter[index].clone()) for parameter, index in parts]

                def scale(factor: float, dense=dense) -> None:
                    with torch.no_grad():
                        for parameter, index, values in dense:
                            parameter[index] = factor * values

                expected = slope(lambda: mean_loss(model, whole), scale)
                found = gradients[site.name].signed[layer, unit]
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "attn_unit"), CASES)
def test_scores_are_those_of_plain_autograd(name: str, attn_unit: str):
    model, whole, batches = sample(name)
    at = sites(model, attn_unit=attn_unit)
    bank = calibrate(model, [{k: v for k, v in whole.items() if k != "labels"}], at)
    snip, taylor = (score(model, bank, at, by, batches=batches) for by in ("snip", "taylor"))
    mean_loss(model, whole).backward()
    for site in at:
        for unit in range(site.units):
            products = [
                torch.cat([(part[index] * part.grad[index]).flatten() for part, index in parts])
                for parts in unit_slices(model, site, unit)
            ]
            wanted = sum(product.abs().sum() for product in products).double()
            torch.testing.assert_close(snip[site.name][unit], wanted)
            wanted = sum(product.sum().abs() for product in products).double()
            torch.testing.assert_close(taylor[site.name][unit], wanted, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("name", "attn_unit"), CASES)
def test_fisher_is_that_of_a_mask_on_the_consumers_input(name: str, attn_unit: str):
    """One sequence at a time, without padding, the mask moved by a finite difference."""
    model, whole, batches = sample(name)
    at = sites(model, attn_unit=attn_unit)
    gradients = collect_gradients(model, batches, at)
    for site in (at[0], at[-1]):
        consumer = model.get_submodule(site.consumer)
        for unit in {0, site.units - 1}:
            mask = torch.ones(site.d_in, dtype=torch.float64)
            features = site.features([unit])

            def scale(factor: float, mask=mask, features=features) -> None:
                mask[features] = factor

            handle = consumer.register_forward_pre_hook(lambda _, x, mask=mask: (x[0] * mask,))
            squares = []
            for row in range(5):
                one = {key: value[row : row + 1] for key, value in whole.items()}
                if "attention_mask" in one:
                    real = int(one["attention_mask"].sum())
                    one = {k: v[:, :real] if v.dim() == 2 else v for k, v in one.items()}
                items = one["labels"].numel() - (1 if model.can_generate() else 0)
                squares.append((items * slope(lambda one=one: mean_loss(model, one), scale)) ** 2)
            handle.remove()
            found, expected = gradients[site.name].fisher[unit], torch.stack(squares).mean()
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "side"),  # BERT's first token stands at the left
    [("llama", "left"), ("llama", "right"), ("opt", "left"), ("opt", "right"), ("bert", "right")],
)
def test_padding_does_not_count(name: str, side: str):
    model = tiny(name, dtype=torch.float64)
    bare = labelled(model, tiny_inputs(model, batch=3, tokens=5))
    padded = dict(bare)
    for key, filling in (("input_ids", 9), ("attention_mask", 0)):
        extra = torch.full((3, 4), filling)
        parts = (extra, bare[key]) if side == "left" else (bare[key], extra)
        padded[key] = torch.cat(parts, 1)
    if side == "left":
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
    if name != "bert":
        del padded["labels"], bare["labels"]
    at = sites(model)
    short, long = (collect_gradients(model, [batch], at) for batch in (bare, padded))
    for site in at:
        for statistic in ("signed", "absolute", "fisher"):
            one, other = (getattr(x[site.name], statistic) for x in (short, long))
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_own_labels_of_a_causal_model_count():
    model, whole, _ = sample("llama")
    at = sites(model, ("mlp",))
    whole["labels"][:, :3] = -100  # a prompt that is not to be predicted
    gradients = collect_gradients(model, [whole], at)
    mean_loss(model, whole).backward()
    for site in at:
        weight = model.get_submodule(site.consumer).weight
        expected = (weight * weight.grad).sum(0).detach()
        torch.testing.assert_close(gradients[site.name].signed[-1], expected)


def test_the_model_is_left_as_it_was():
    model = tiny("llama").train()
    frozen, used = model.model.layers[0].mlp.up_proj.weight, model.lm_head.weight
    frozen.requires_grad_(False)
    used.grad = torch.ones_like(used)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        collect_gradients(model, [tiny_inputs(model)], sites(model))
    assert model.training and model.config.use_cache
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(used.grad, torch.ones_like(used))
    for parameter in model.parameters():
        assert parameter.requires_grad == (parameter is not frozen)
        assert parameter.grad is None or parameter is used
    consumers = [model.get_submodule(site.consumer) for site in sites(model)]
    assert not any(consumer._forward_pre_hooks for consumer in consumers)
    with pytest.raises(InputError):  # whatever goes wrong in the middle
        collect_gradients(model, [{"input_ids": torch.full((2, 3), 10**6)}], sites(model))
    assert not frozen.requires_grad and used.requires_grad and model.training


def test_labels_do_not_change_what_the_outputs_mean():
    """A head writes into its config what labels of floating point are: several at once."""
    model = tiny("bert", num_labels=3)
    batches = [
        {**tiny_inputs(model), "labels": torch.ones(len(tiny_inputs(model)["input_ids"]), 3)}
    ]
    collect_gradients(model, batches, sites(model))
    assert model.config.problem_type is None


def test_same_inputs_same_scores_and_a_saved_bank_serves(tmp_path):
    model = tiny("llama")
    at, batches = sites(model), [tiny_inputs(model, batch=4, seed=seed) for seed in range(3)]
    bank = calibrate(model, batches, at)
    bank.save(tmp_path / "bank.safetensors")
    loaded = MomentBank.load(tmp_path / "bank.safetensors")
    for name in ("snip", "taylor", "fisher"):
        one = score(model, bank, at, name, batches=batches)
        again = score(model, loaded, at, name, batches=iter(batches))
        assert all(torch.equal(one[site.name], again[site.name]) for site in at)
    with pytest.raises(InputError, match="fisher needs gradients.*give the calibration text"):
        score(model, loaded, at, "fisher")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype(dtype: torch.dtype):
    exact, model = tiny("llama", dtype=dtype).double(), tiny("llama", dtype=dtype)
    at, batches = sites(model), [tiny_inputs(model, batch=4, tokens=16)]
    wanted, found = (collect_gradients(each, batches, at) for each in (exact, model))
    tolerance = 60 * torch.finfo(dtype).eps  # through three blocks and back
    for site in at:
        for statistic in ("absolute", "fisher"):
            one, other = (getattr(x[site.name], statistic) for x in (wanted, found))
            assert other.dtype == torch.float64
            assert (one - other).norm() <= tolerance * one.norm()


@cover(
    1,
    name=["snip", "taylor", "fisher"],
    allocation=["uniform", "global", "curve"],
    family=["llama", "bert"],
)
def test_the_whole_job(family: str, allocation: str, name: str):
    model = tiny(family)
    batches = [labelled(model, tiny_inputs(model, batch=8, seed=seed)) for seed in range(3)]
    report = prune(model, iter(batches), 0.7, criterion=name, allocation=allocation)
    assert report.params["prunable_after"] <= 0.7 * report.params["prunable_before"]


def test_layerwise_and_query_heads():
    model = tiny("llama")
    batches = [tiny_inputs(model, batch=8, seed=seed) for seed in range(3)]
    settings = {"criterion": "taylor", "attn_unit": "head", "schedule": "layerwise"}
    report = prune(model, batches, 0.6, **settings)
    assert all(len(report.plan.sites[f"{block}.attn"].kept) % 4 == 0 for block in range(3))


def test_users_register_their_own():
    model = tiny("gpt2")
    at, batches = sites(model), [tiny_inputs(model, batch=4)]
    bank = calibrate(model, batches, at)

    @criterion("consumer_taylor", needs="gradient")
    def consumer_taylor(stats):
        return stats.gradients.signed[-1].abs()

    try:
        scores = score(model, bank, at, "consumer_taylor", batches=batches)
        assert scores["0.mlp"].shape == (24,) and (scores["0.mlp"] > 0).all()
        prune(model, batches, 0.7, criterion="consumer_taylor")
    finally:
        del _CRITERIA["consumer_taylor"], CRITERIA["consumer_taylor"]


@pytest.mark.parametrize(
    ("family", "message"),
    [("bert", "is no causal language model and got no labels"), ("mpnet", "has no head")],
)
def test_a_model_without_a_loss_is_refused_before_any_work(family, message, monkeypatch):
    def not_yet(*args, **kwargs):
        raise AssertionError("calibrated first")

    model = tiny(family)
    monkeypatch.setattr(calibration, "collect", not_yet)
    with pytest.raises(InputError, match=f"{message}; give a model with a head"):
        prune(model, [tiny_inputs(model)], 0.7, criterion="fisher")
    with pytest.raises(InputError, match=message):
        collect_gradients(model, [tiny_inputs(model)], sites(model))


def test_unusable_batches():
    model = tiny("llama")
    at, inputs = sites(model), tiny_inputs(model)
    with pytest.raises(InputError, match="0 sequences hold nothing to predict"):
        collect_gradients(model, iter([]), at)
    with pytest.raises(InputError, match="2 sequences hold nothing to predict"):
        collect_gradients(model, [tiny_inputs(model, tokens=1)], at)
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(InputError, match="the loss must be finite, got nan in batch 0"):
        collect_gradients(model, [inputs], at)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_labels_that_a_head_cannot_take_are_named(name: str):
    model = tiny(name)
    batch = {**tiny_inputs(model), "labels": torch.full((2,), 99)}
    with pytest.raises(InputError, match="can't compute the loss of batch 0: .*give labels as"):
        collect_gradients(model, [batch], sites(model))


@pytest.mark.parametrize("task", ["regression", "spans"])
def test_other_heads_count_one_item_per_sequence(task: str):
    model = tiny("bert", num_labels=2 if task == "spans" else 1, dtype=torch.float64)
    inputs = tiny_inputs(model, batch=5)
    if task == "spans":
        model = transformers.BertForQuestionAnswering(model.config).double().eval()
        spans = {"start_positions": torch.tensor([0, 3, 1, 8, 2])}
        inputs |= {**spans, "end_positions": spans["start_positions"] // 2 + 4}
    else:
        inputs["labels"] = torch.linspace(-1, 1, 5, dtype=torch.float64)
    at = sites(model)
    batches = [{k: v[:2] for k, v in inputs.items()}, {k: v[2:] for k, v in inputs.items()}]
    gradients = collect_gradients(model, batches, at)
    model(**inputs).loss.backward()
    for site in at:
        weight = model.get_submodule(site.consumer).weight
        expected = (weight * weight.grad).detach().sum(0).view(site.units, -1).sum(1)
        torch.testing.assert_close(gradients[site.name].signed[-1], expected)
