"""What every family must stand, on a tiny model: from pruning to a folder that is saved again."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

import torch
import transformers
from folders import check_sliced, make_plan
from tiny import batches, class_of, outputs, tiny, tiny_inputs
from torch import nn

from liar_ext import Plan, load_pruned, narrow, prune, save_pruned
from liar_ext.models.family import Stack
from liar_ext.models.layers import weight_of
from liar_ext.models.registry import FAMILIES
from liar_ext.models.residual_stream import hidden_of
from liar_ext.models.sites import sites, why_whole
from liar_ext.models.slicing import apply_plan
from liar_ext.reconstruction import hidden_size
from liar_ext.reconstruction.solve import SiteRow

KINDS = ("attn", "mlp")


def kinds_of(model: nn.Module) -> tuple[str, ...]:
    """Return the kinds of sites that the family of a model has rows for."""
    return tuple(kind for kind in KINDS if not why_whole(model, kind))


def one_of_each_kind(names: Iterable[str]) -> list[str]:
    """Return the first of those tiny models whose families differ by names alone.

    Classes for other uses (``ForCausalLM``) are of other kinds, and so are several models of one
    family whose row has alternatives. What a row alone can break is tried of every family.
    """
    found: dict[object, str] = {}
    models = Counter()
    for name in names:
        model_class = class_of(name)
        row = FAMILIES[model_class.config_class.model_type]
        wirings = [getattr(part, kind) for part in row.all_parts for kind in KINDS]
        number = models[row.name] * any(type(wiring) is tuple for wiring in wirings)
        models[row.name] += 1
        found.setdefault(
            (_without_names(row), model_class.__name__.partition("For")[2], number), name
        )
    return list(found.values())


def _without_names(value: object) -> object:
    """Return what a row of the table is made of: sizes, layouts and counts, and no paths."""
    if isinstance(value, Stack):
        return tuple(value)
    if isinstance(value, Mapping):
        return tuple(
            sorted(
                repr(each if isinstance(each, str) else _without_names(each))
                for each in value.values()
            )
        )
    if is_dataclass(value):
        left = {f.name: getattr(value, f.name) for f in fields(value)}
        whole = tuple(sorted(left.pop("without", ())))
        own = [each for name, each in left.items() if name not in ("name", "requires", "stream")]
        return whole, *map(_without_names, own)
    if isinstance(value, tuple):
        return (
            len(value)
            if all(isinstance(each, str) for each in value)
            else tuple(map(_without_names, value))
        )
    return bool(value) if isinstance(value, str) else value


def check_slicing(name: str) -> None:
    """Slicing units equals zeroing them, for each kind of site, and for heads of groups."""
    model = tiny(name, dtype=torch.float64)
    model.set_attn_implementation("eager")  # it reads what modules say of groups; jobs take sdpa
    kinds = kinds_of(model)
    grouped = {site.unit for site in sites(model)} & {"kv_group"}
    for unit in ("kv_group", "head") if grouped else ("auto",):
        for chosen in [kinds] if unit == "head" else [(kind,) for kind in kinds]:
            plan = make_plan(model, chosen, unit)
            # Linear attention computes in float32, whatever the dtype is.
            close = 1e-5 if any(site.key_dim for site in sites(model)) else 1e-7
            sliced = check_sliced(model, plan, rtol=close, atol=close)
            for site in sites(sliced, attn_unit=unit):
                layers = [sliced.get_submodule(path) for path in (*site.producers, site.consumer)]
                for layer in layers:
                    assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape)


def wanting(monkeypatch, kept: Sequence[int]) -> None:
    """Let the hidden features that stay be these."""

    def scores(bank: Mapping) -> torch.Tensor:
        size = next(iter(bank.values())).d_in
        return torch.isin(torch.arange(size), torch.tensor(kept)).double()

    monkeypatch.setattr(hidden_size, "score_hidden", scores)


def double_features(model: nn.Module) -> int:
    """Make the second half of the hidden features a copy of the first, in every writer and norm."""
    found = hidden_of(model)
    half = found.size // 2
    with torch.no_grad():
        alone = dict(model.named_parameters())
        for path in found.writers:
            if path in alone:
                alone[path][..., half:] = alone[path][..., :half]
                continue
            layer = model.get_submodule(path)
            if isinstance(layer, nn.Embedding):
                layer.weight[:, half:] = layer.weight[:, :half]
            else:
                weight_of(layer)[half:] = weight_of(layer)[:half]
                if layer.bias is not None:
                    layer.bias[half:] = layer.bias[:half]
        for path in found.norms:
            for parameter in model.get_submodule(path).parameters():
                parameter[half:] = parameter[:half]
    return half


def halved(model: nn.Module, monkeypatch) -> tuple[nn.Module, dict, Sequence[SiteRow]]:
    """Let a model have each feature twice; return it without the copies, inputs, and rows."""
    half = double_features(model)
    wanting(monkeypatch, range(half))
    found = narrow(model, batches(model), 0.5, damp=1e-12)
    plan = Plan(model.config.model_type, "auto", {}, hidden=found.kept)
    small = copy.deepcopy(model)
    apply_plan(small, plan, found.weights)
    return small, tiny_inputs(model, batch=16, tokens=16, seed=99), found.rows


def check_hidden(name: str, monkeypatch, **fields) -> None:
    """Features that others repeat are given back: every statistic stays, and readers add up."""
    model = tiny(name, dtype=torch.float64, **fields)
    small, inputs, rows = halved(model, monkeypatch)
    torch.testing.assert_close(outputs(small, inputs), outputs(model, inputs), rtol=1e-4, atol=1e-4)
    read = [row for row in rows if "cholesky" in row.path]
    assert read and all(row.holdout_error < 1e-7 for row in read)


def check_job(name: str, folder: Path, fields: dict | None = None, **choices) -> nn.Module:
    """Prune, save, load by every loader, generate, train a step, save that and load it again.

    ``fields`` are of the model's config, ``choices`` of the recipe.
    """
    model = tiny(name, **(fields or {}))
    if all(site.units == 1 for site in sites(model) if site.kind == "attn"):
        choices["attn_unit"] = "head"
    report = prune(model, batches(model, 4), 0.6, **choices)
    assert any(site.removed for site in report.plan.sites.values())
    expected = outputs(model)
    save_pruned(model, folder / "one")
    fields = json.loads((folder / "one" / "config.json").read_text())
    stock = getattr(transformers, type(model).__name__)
    if fields["liar"]["layers"] == "equal":
        loaded = stock.from_pretrained(folder / "one")
        assert type(loaded) is stock
    else:
        auto = next(a for a, c in fields["auto_map"].items() if c.endswith(stock.__name__))
        auto = getattr(transformers, auto)
        loaded = auto.from_pretrained(folder / "one", trust_remote_code=True)
    assert torch.equal(outputs(loaded.eval()), expected)
    assert torch.equal(outputs(load_pruned(folder / "one")), expected)
    if loaded.can_generate():
        settings = {**tiny_inputs(model), "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(loaded.generate(**settings), model.generate(**settings))
    train_a_step(loaded)
    loaded.save_pretrained(folder / "two")
    again = load_pruned(folder / "two")
    assert torch.equal(outputs(again), outputs(loaded))
    assert again.config.liar == loaded.config.liar
    return model


def train_a_step(model: nn.Module) -> None:
    """Every weight of a site gets a gradient, and the outputs move by a step."""
    inputs, before = tiny_inputs(model), outputs(model)
    result = model.train()(**inputs)
    values = [v for v in result.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    sum(value.square().mean() for value in values).backward()
    at = [layer for site in sites(model) for layer in (*site.producers, site.consumer)]
    weights = [model.get_submodule(layer).weight for layer in at]
    assert all(weight.grad.any() for weight in weights)
    torch.optim.SGD(weights, lr=0.1).step()  # not waves of positions, which aren't saved
    assert not torch.equal(outputs(model.eval()), before)


def says_equal_layers(model: nn.Module) -> bool:
    """Whether the row of a model's family has config fields for equal sizes of all its sites."""
    return all(site.wiring.config is not None for site in sites(model))
