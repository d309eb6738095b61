"""Pruned tiny models, to be saved and loaded."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from tiny import outputs, tiny
from torch import nn

from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.sites import Site, get_consumer_bias, get_consumer_weight, sites
from liar_ext.models.slicing import apply_plan


def keep_some(site: Site, seed: int = 0, bias: bool = False) -> SitePlan:
    """Keep a random half of the units of a site, one more in each next block."""
    generator = torch.Generator().manual_seed(seed + 7 * site.block)
    run = site.units // site.groups
    n_kept = min(max(run // 2, 1) + site.block % 2, run)
    kept = [
        group * run + unit
        for group in range(site.groups)
        for unit in torch.randperm(run, generator=generator)[:n_kept].sort().values.tolist()
    ]
    return SitePlan(site.units, tuple(kept), bias)


def make_plan(model: nn.Module, kinds=("attn", "mlp"), attn_unit="auto", bias=False) -> Plan:
    chosen = sites(model, kinds, attn_unit)
    return Plan(
        model.config.model_type,
        attn_unit,
        {site.name: keep_some(site, bias=bias) for site in chosen},
    )


def plan_of_experts(model: nn.Module) -> Plan:
    """Return a plan that keeps other channels of every expert, equally many, and some heads."""
    plan = make_plan(model)
    kept = {
        site.name: SitePlan(site.units, tuple(range(site.expert % 2, site.units, 2)))
        for site in sites(model)
        if site.expert is not None
    }
    return replace(plan, sites={**plan.sites, **kept})


def as_in_the_hubs_cache(folder: Path) -> Path:
    """Move a folder into a cache like the hub's, where every file is a link; return its place."""
    repository = folder.with_name("models--someone--model")
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(each for each in folder.rglob("*") if each.is_file())):
        link, blob = snapshot / path.relative_to(folder), blobs / str(number)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def change(path: Path, **fields) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def equal_plan(model: nn.Module, kinds=("attn", "mlp"), bias: bool = False) -> Plan:
    """Keep the last half of the units of every site."""
    kept = {
        site.name: SitePlan(site.units, tuple(range(site.units // 2, site.units)), bias)
        for site in sites(model, kinds)
    }
    return Plan(model.config.model_type, "auto", kept)


def pruned(name: str, plan_of=make_plan, dtype=torch.float32, **settings):
    """Return a pruned tiny model with random biases where it gained some, and its plan."""
    model = tiny(name, dtype=dtype)
    plan = plan_of(model, **settings)
    apply_plan(model, plan)
    with torch.no_grad():
        for site in sites(model):
            bias = get_consumer_bias(model, site)
            if bias is not None:
                bias.normal_()
    return model, plan


def read(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
def zero_removed(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of the model whose consumers don't read the removed units."""
    model = copy.deepcopy(model)
    for site in sites(model, attn_unit=plan.attn_unit):
        if site.name in plan.sites:
            removed = site.features(plan.sites[site.name].removed)
            get_consumer_weight(model, site)[:, removed] = 0
    return model


def check_sliced(model: nn.Module, plan: Plan, **tolerance: float) -> nn.Module:
    """Slicing equals zeroing, and takes the parameters that it should; return the sliced copy."""
    zeroed, sliced = zero_removed(model, plan), copy.deepcopy(model)
    planned = [s for s in sites(model, attn_unit=plan.attn_unit) if s.name in plan.sites]
    apply_plan(sliced, plan)
    expected = outputs(zeroed)
    torch.testing.assert_close(outputs(sliced), expected, **tolerance)
    removed = sum(len(plan.sites[site.name].removed) * site.unit_params for site in planned)
    counts = [sum(p.numel() for p in each.parameters()) for each in (model, sliced)]
    assert counts[0] - counts[1] == removed
    assert (removed != 0) != torch.equal(expected, outputs(model)), plan.sites.keys()
    return sliced


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    fast.chat_template = "{{ messages[0].content }}!"
    return fast


def byte_level(size: int = 61) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE whose tokens are those of the tiny models; few bytes are among them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE(ignore_merges=False))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False
    )
    core.train_from_iterator(["aa bb ab abba bab", "ab ba 12 3"], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
