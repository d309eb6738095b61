"""Folders with equal layers, made of unequal ones: the same outputs, by the stock loader."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from covers import some
from folders import equal_plan, make_plan, pruned
from tiny import TINY, outputs, tiny

from liar_ext import InputError, cli, load_pruned, save_pruned, verify_pruned
from liar_ext.checkpoint.folder import PLAN_FILE, strangers
from liar_ext.export import export
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.sites import get_consumer_bias, sites
from liar_ext.models.slicing import apply_plan


def exported(model, plan, tmp_path, **options):
    save_pruned(model, tmp_path / "model", plan)
    done = export(tmp_path / "model", "uniform", **options)
    stock = getattr(transformers, type(model).__name__)
    return stock.from_pretrained(done.paths[0]).eval(), done


def same_outputs(a, b):
    torch.testing.assert_close(outputs(a), outputs(b), atol=1e-5, rtol=1e-5)


FAMILIES = [*TINY, "phi3", "falcon_new", "stablelm", "qwen3_5_text"]


@some("name", FAMILIES, *"llama gpt2 bert gemma3 vit phi3 falcon_new qwen3_5_text".split())
def test_outputs_stay_and_the_stock_class_loads_it(name, tmp_path):
    model, plan = pruned(name, make_plan)
    again, done = exported(model, plan, tmp_path)
    same_outputs(model, again)
    (out,) = done.paths
    assert strangers(out) == [] and verify_pruned(out)["layers"] == "equal"
    for kind in ("attn", "mlp"):
        sizes = {(site.wiring.consumer, site.d_in) for site in sites(again, (kind,))}
        assert len(sizes) == len({consumer for consumer, _ in sizes})
    assert "+" in done.notes[1] and "padded with zeros" in done.notes[0]
    assert f"--recipe {tmp_path / 'model/liar/recipe.yaml'} --uniform" in done.notes[1]


def test_it_generates_by_the_settings_of_its_folder(tmp_path):
    model, plan = pruned("llama", make_plan)
    model.generation_config.eos_token_id, model.generation_config.max_new_tokens = [1, 2], 7
    again, _ = exported(model, plan, tmp_path)
    assert again.generation_config.eos_token_id == [1, 2]
    assert again.generation_config.max_new_tokens == 7


def test_whole_blocks_may_be_gone(tmp_path):
    model = tiny("llama")
    plan = make_plan(model)
    plan = replace(plan, blocks=SitePlan(3, (0, 2)))
    plan = replace(plan, sites={n: each for n, each in plan.sites.items() if n[0] != "2"})
    apply_plan(model, plan)
    again, done = exported(model, plan, tmp_path)
    same_outputs(model, again)
    assert Plan.load(done.paths[0] / PLAN_FILE).blocks == plan.blocks
    assert verify_pruned(done.paths[0])["agrees"]


def test_a_folder_that_was_pruned_twice(tmp_path):
    """After the first time the config says fewer units than the dense model has."""
    model, first = pruned("llama", equal_plan, kinds=("mlp",))
    save_pruned(model, tmp_path / "first", first)
    model = load_pruned(tmp_path / "first")
    second = make_plan(model)
    apply_plan(model, second)
    plan = second.after(first)
    again, done = exported(model, plan, tmp_path)
    same_outputs(model, again)
    wide = Plan.load(done.paths[0] / PLAN_FILE)
    assert {each.units for name, each in wide.sites.items() if "mlp" in name} == {24}
    assert all(set(each.kept) <= set(wide.sites[name].kept) for name, each in plan.sites.items())


def test_heads_of_another_size_than_the_config_says_are_refused(tmp_path):
    model = tiny("bert")
    plan = replace(equal_plan(model), hidden=SitePlan(32, tuple(range(24))))
    apply_plan(model, plan)
    with pytest.raises(InputError, match="no config of bert says equal layers"):
        exported(model, plan, tmp_path)


@pytest.mark.parametrize("kinds", [("mlp",), ("attn",)])
def test_sites_of_one_kind(kinds, tmp_path):
    model, plan = pruned("llama", make_plan, kinds=kinds)
    again, _ = exported(model, plan, tmp_path)
    same_outputs(model, again)


@pytest.mark.parametrize("unit", ["kv_group", "head"])
def test_each_kind_of_attention_has_a_number_of_its_own(unit, tmp_path):
    model, plan = pruned("qwen3_5_text", make_plan, attn_unit=unit)
    again, _ = exported(model, plan, tmp_path)
    same_outputs(model, again)
    kept = {name: len(each.kept) for name, each in plan.sites.items() if "attn" in name}
    for site in sites(again, ("attn",), unit):
        alike = [n for name, n in kept.items() if bool(site.key_dim) == (name != "1.attn")]
        assert site.units == max(alike)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_query_heads_within_kv_groups(name, tmp_path):
    model = tiny(name, num_attention_heads=8, num_key_value_heads=2)
    kept = {
        f"{block}.attn": SitePlan(8, units)
        for block, units in enumerate([(0, 1, 4, 7), (2, 5), (1, 2, 3, 4, 5, 6)])
    }
    plan = Plan(model.config.model_type, "head", kept)
    apply_plan(model, plan)
    again, _ = exported(model, plan, tmp_path)
    same_outputs(model, again)


def test_biases_of_some_layers_only(tmp_path):
    model = tiny("llama")
    plan = make_plan(model)
    plan = Plan(
        "llama",
        "auto",
        {
            name: SitePlan(site.units, site.kept, name == "1.mlp")
            for name, site in plan.sites.items()
        },
    )
    apply_plan(model, plan)
    torch.nn.init.normal_(get_consumer_bias(model, sites(model, ("mlp",))[1]))
    again, _ = exported(model, plan, tmp_path)
    same_outputs(model, again)


def test_a_bias_that_no_config_says_is_refused(tmp_path):
    model, plan = pruned("qwen2", make_plan, bias=True)
    with pytest.raises(InputError, match="no config of qwen2 .* --reconstruct linear"):
        exported(model, plan, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_smaller_hidden_size(tmp_path):
    model = tiny("llama")
    plan = make_plan(model)
    plan = Plan("llama", "auto", plan.sites, hidden=SitePlan(40, tuple(range(8, 40))))
    apply_plan(model, plan)
    again, _ = exported(model, plan, tmp_path)
    assert again.config.hidden_size == 32
    same_outputs(model, again)


def test_the_plan_says_where_the_zeros_are(tmp_path):
    model, plan = pruned("llama", make_plan)
    again, done = exported(model, plan, tmp_path)
    wide = Plan.load(done.paths[0] / PLAN_FILE)
    for site in sites(again, ("mlp",)):
        old, new = plan.sites[site.name].kept, wide.sites[site.name].kept
        assert set(old) <= set(new) and len(new) == site.units
        zero = again.get_submodule(site.consumer).weight.abs().sum(0) == 0
        assert zero.tolist() == [unit not in old for unit in new]


def test_channels_to_a_multiple(tmp_path):
    model, plan = pruned("llama", make_plan)
    again, _ = exported(model, plan, tmp_path, multiple_of=16)
    assert again.config.intermediate_size == 16
    assert max(len(plan.sites[f"{block}.mlp"].kept) for block in range(3)) == 13
    same_outputs(model, again)
    for wrong in (0, 1.5, "16"):
        with pytest.raises(InputError, match=f"integer of at least 1, got {wrong!r}"):
            export(tmp_path / "model", "uniform", tmp_path / "other", multiple_of=wrong)


def test_equal_layers_are_refused(tmp_path):
    model, plan = pruned("llama", equal_plan)
    with pytest.raises(InputError, match="needs no code to load as it is"):
        exported(model, plan, tmp_path)


def test_a_folder_without_plan_is_refused(tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path / "model")
    assert cli.main(["export", str(tmp_path / "model"), "--to", "uniform"]) == 2
    assert "use the folder itself" in capsys.readouterr().err


def test_a_folder_whose_plan_is_gone_is_refused(tmp_path):
    model, plan = pruned("llama", make_plan)
    save_pruned(model, tmp_path / "model", plan)
    (tmp_path / "model" / PLAN_FILE).unlink()
    with pytest.raises(InputError, match="plan.json"):
        export(tmp_path / "model", "uniform")


def test_equal_layers_that_no_config_says(tmp_path):
    """Three heads of four don't divide the hidden size, which LlamaConfig insists on."""
    model = tiny("llama")
    kept = {site.name: SitePlan(4, (0, 1, 3)) for site in sites(model, ("attn",))}
    plan = Plan("llama", "auto", kept)
    apply_plan(model, plan)
    again, done = exported(model, plan, tmp_path)
    assert again.config.num_attention_heads == 8
    assert "Nothing is saved" in done.notes[-1]
    same_outputs(model, again)


def test_a_plan_of_another_model_is_refused(tmp_path):
    model, plan = pruned("llama", make_plan)
    save_pruned(model, tmp_path / "model", plan)
    path = tmp_path / "model" / PLAN_FILE
    fields = json.loads(path.read_text())
    fields["sites"]["0.mlp"]["kept"] = [0]
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError):
        export(tmp_path / "model", "uniform")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
