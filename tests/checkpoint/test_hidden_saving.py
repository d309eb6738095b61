"""A model with a smaller hidden size is a model folder like any other."""

from __future__ import annotations

import json
from pathlib import Path

import fresh_workers
import pytest
import torch
from covers import some
from folders import equal_plan, read
from tiny import NARROWABLE, outputs, tiny, tiny_inputs

from liar_ext import load_pruned, save_pruned, verify_pruned
from liar_ext.checkpoint.stock_config import auto_classes, how_to_load
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.sites import sites
from liar_ext.models.slicing import apply_plan

# For each folder a line: what is wrong, or nothing.
PLAIN = """
import sys
from pathlib import Path
import torch
import transformers
for folder in map(Path, sys.argv[1:]):
    inputs, expected, loader, hidden = torch.load(folder / "probe.pt")
    try:
        model = getattr(transformers, loader).from_pretrained(folder / "pruned").eval()
        with torch.no_grad():
            found = model(**inputs)[0]
        wrong = "" if torch.equal(found, expected) else "other outputs"
        wrong = wrong or f"{model.config.hidden_size=}" * (model.config.hidden_size != hidden)
    except Exception as error:
        wrong = repr(error)
    print(folder.name, *wrong.split())
assert not any(name.startswith("liar_ext") for name in sys.modules)
"""


def narrow_plan(model, count: int, sites_of=None) -> Plan:
    """Keep the last features."""
    size = model.config.hidden_size
    kept = SitePlan(size, tuple(range(size - count, size)))
    plan = sites_of(model) if sites_of else Plan(model.config.model_type, "auto", {})
    return Plan(plan.model_type, plan.attn_unit, plan.sites, hidden=kept)


def saved(name: str, folder: Path, count: int, sites_of=None):
    model = tiny(name)
    plan = narrow_plan(model, count, sites_of)
    apply_plan(model, plan)
    save_pruned(model, folder, plan)
    return model, plan


def heads_plan(count: int):
    """Return a maker of plans that keep some heads of every layer, and everything else."""

    def plan(model) -> Plan:
        kept = {s.name: SitePlan(s.units, tuple(range(count))) for s in sites(model, ("attn",))}
        return Plan(model.config.model_type, "auto", kept)

    return plan


PLAINLY = {
    "llama": ("AutoModelForCausalLM", None),
    "smollm3": ("AutoModelForCausalLM", None),
    "qwen3": ("AutoModelForCausalLM", equal_plan),
    "bert": ("AutoModelForSequenceClassification", heads_plan(3)),
    "roberta": ("AutoModelForMaskedLM", heads_plan(3)),
    "distilbert": ("AutoModel", heads_plan(3)),
    "opt": ("AutoModelForCausalLM", heads_plan(3)),
    "gpt_neox": ("AutoModelForCausalLM", heads_plan(3)),
    "gemma3_text": ("AutoModelForCausalLM", None),
    "glm4": ("AutoModelForCausalLM", None),
    "olmo": ("AutoModelForCausalLM", equal_plan),
    "olmo2": ("AutoModelForCausalLM", None),
    "exaone4": ("AutoModelForCausalLM", None),
    "electra": ("AutoModelForSequenceClassification", heads_plan(3)),
    "albert": ("AutoModelForMaskedLM", heads_plan(3)),
    "dinov3_vit": ("AutoModel", heads_plan(3)),
}


@pytest.fixture(scope="module")
def plainly(tmp_path_factory):
    """How each folder is said to load, and what is wrong where transformers alone has loaded it."""
    home, said = tmp_path_factory.mktemp("plainly"), {}
    hidden = 24  # of 40; of 32, where 3 of 4 heads of 8 must go with them
    for name, (loader, sites_of) in PLAINLY.items():
        torch.manual_seed(0)
        model, plan = saved(name, home / name / "pruned", hidden, sites_of)
        said[name] = how_to_load(model, plan)
        inputs = tiny_inputs(model)
        probe = (dict(inputs), outputs(model, inputs), loader, hidden)
        torch.save(probe, home / name / "probe.pt")
    done = fresh_workers.run_script(PLAIN, *(home / name for name in PLAINLY))
    assert done.returncode == 0, done.stderr
    wrong = dict(f"{line} ".split(" ", 1) for line in done.stdout.splitlines())
    return home, said, wrong


@pytest.mark.parametrize("name", PLAINLY)
def test_plain_transformers_loads_it(name, plainly):
    home, said, wrong = plainly
    assert f"plain `transformers.{PLAINLY[name][0]}" in said[name]
    assert read(home / name / "pruned")["liar"]["layers"] == "equal"
    assert wrong[name].strip() == ""


@some("name", [*NARROWABLE, "gemma2"], "llama", "gpt2", "bert", "gemma2")
def test_sizes_that_no_config_says_load_with_the_plan(name, tmp_path):
    """An odd hidden size, which heads do not divide, and BERT with all its heads."""
    hidden = 23
    model, plan = saved(name, tmp_path / "pruned", hidden, equal_plan)
    fields = read(tmp_path / "pruned")
    if fields["liar"]["layers"] == "unequal":
        named = ("hidden_size", "dim", "n_embd")
        assert [fields[name] for name in named if name in fields] == [plan.hidden.units]
        assert set(fields["auto_map"]) <= set(auto_classes(model))  # no other head would fit
    loaded = load_pruned(tmp_path / "pruned")
    assert torch.equal(outputs(loaded), outputs(model))
    facts = verify_pruned(tmp_path / "pruned")
    assert facts["agrees"] and facts["params"] == sum(p.numel() for p in model.parameters())
    plan_file = json.loads((tmp_path / "pruned" / "liar/plan.json").read_text())
    assert plan_file["version"] == 2 and len(plan_file["hidden"]["kept"]) == hidden


def test_an_encoder_is_told_which_heads_a_stock_loader_needs(tmp_path):
    model, plan = saved("bert", tmp_path / "pruned", 24)
    assert "24 hidden features go with 3 heads in every layer" in how_to_load(model, plan)


def test_no_option_is_offered_where_no_config_can_help(tmp_path):
    model, plan = saved("mpnet", tmp_path / "pruned", 24)
    sentence = how_to_load(model, plan)
    assert sentence.endswith("No config of mpnet can tell of a smaller hidden size.")
    assert "trust_remote_code=True" in sentence and "--uniform-layers" not in sentence


def test_a_tied_head_stays_tied(tmp_path):
    model, _ = saved("llama", tmp_path / "pruned", 24)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loaded = load_pruned(tmp_path / "pruned")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tokens = loaded.generate(**tiny_inputs(loaded), max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, model.generate(**tiny_inputs(model), max_new_tokens=4))
