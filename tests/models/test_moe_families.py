"""Families of mixtures of experts: every row of theirs through whole jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from covers import some
from folders import check_sliced, plan_of_experts, read
from journeys import one_of_each_kind
from tiny import MOE, batches, class_of, outputs, tiny, tiny_config, tiny_inputs
from tiny_moe import MOE_FAMILIES
from torch import nn

from liar_ext import Budget, InputError, Plan, apply_plan, load_pruned, prune, save_pruned, sites
from liar_ext.checkpoint.stock_config import auto_classes
from liar_ext.models.plan import SitePlan, kind_of
from liar_ext.models.registry import family_of
from liar_ext.models.sites import teams_of
from liar_ext.models.whole import choice_of, reroute, router_of
from liar_ext.selection.costs import total_cost

LATENT = ["deepseek_v2", "deepseek_v2 lite", "deepseek_v3", "glm4_moe_lite"]
ALL = {**MOE, **MOE_FAMILIES}
QUICK_JOBS = ["deepseek_v2", "granitemoe", "qwen3_next", "lfm2_moe"]
QUICK = {"allocation": "uniform", "criterion": "wifv"}


def with_choice(name: str, **settings) -> nn.Module:
    """Return a tiny model whose router has a bias of the choice alone, if it knows one."""
    model = tiny(name, **settings)
    both = [*model.named_buffers(), *model.named_parameters()]
    for each_name, each in both:
        if each_name.endswith(("e_score_correction_bias", "expert_bias")):
            each.data.copy_(0.3 * torch.randn(each.shape))
    return model


def loaded_by_its_class(name: str, model: nn.Module, plan: Plan, folder: Path, **how) -> nn.Module:
    """Save a model, and return what the stock class loads, which must compute the same."""
    save_pruned(model, folder, plan, **how)
    assert "auto_map" not in read(folder)
    stock = class_of(name).from_pretrained(folder)
    torch.testing.assert_close(outputs(stock), outputs(model))
    return stock


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_slicing_equals_zeroing(name: str) -> None:
    model = with_choice(name, dtype=torch.float64)
    model.set_experts_implementation("eager")
    # Linear attention, and what scales by sinks, compute in float32, whatever the dtype is.
    rough = name == "granitemoe_swa" or any(site.key_dim for site in sites(model))
    close = 1e-5 if rough else 1e-9
    check_sliced(model, plan_of_experts(model), rtol=close, atol=close)


@some("name", [*MOE, *one_of_each_kind(MOE_FAMILIES)], *MOE, *QUICK_JOBS)
def test_a_job_of_unequal_layers(name: str, tmp_path: Path) -> None:
    model = with_choice(name)
    report = prune(model, batches(model, 2), 0.6, allocation="global", criterion="wifv", tile=1)
    alone = "layerwise" in family_of(model).without
    assert report.settings["schedule"] == ("one-pass" if alone else "layerwise")
    assert any(row.tokens for row in report.sites)
    save_pruned(model, tmp_path / "one", report.plan, report=report)
    expected = outputs(model)
    auto = getattr(transformers, auto_classes(model)[0])
    loaded = auto.from_pretrained(tmp_path / "one", trust_remote_code=True)
    torch.testing.assert_close(outputs(loaded), expected)
    loaded.save_pretrained(tmp_path / "two")
    again = load_pruned(tmp_path / "two")
    torch.testing.assert_close(outputs(again), expected)
    again.train()
    ids = tiny_inputs(again)["input_ids"]
    again(input_ids=ids, labels=ids).loss.backward()
    assert all(each.grad.isfinite().all() for n, each in again.named_parameters() if "experts" in n)
    torch.optim.SGD(again.parameters(), lr=0.1).step()
    again.eval()
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert again.generate(ids, **settings).shape == (2, ids.shape[1] + 3)
    assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))


FIRST = ["deepseek_v3", "ernie4_5_moe", "granitemoe", "qwen3_next"]


@some("name", ALL, *MOE, *FIRST)
def test_experts_and_channels_leave_and_the_stock_class_loads_it(name: str, tmp_path: Path) -> None:
    model = with_choice(name)
    even = {**QUICK, "uniform_layers": True, "kinds": ("mlp",), "schedule": "one-pass"}
    said = "channels" not in family_of(model).without.get("stock", "")  # by the config
    keep = 0.6 if said else 1.0
    for what, why in {"layerwise": "chosen block by block", "experts": "keeps all"}.items():
        if what in family_of(model).without:
            with pytest.raises(InputError, match=f"experts: .*{why}"):
                prune(model, batches(model, 2), keep, keep_experts=0.75, **even)
            return
    report = prune(model, batches(model, 2), keep, keep_experts=0.75, **even)
    assert {len(layer.kept) for layer in report.plan.experts.values()} == {3}
    rows = [row for row in report.sites if row.name.endswith(".experts")]
    assert {(row.units_before, row.units_after) for row in rows} == {(4, 3)}
    stock = loaded_by_its_class(name, model, report.plan, tmp_path / "pruned", report=report)
    if name in MOE:  # the loss that balances experts counts them
        ids = tiny_inputs(stock)["input_ids"]
        given = {"input_ids": ids, "labels": ids, "output_router_logits": True}
        torch.testing.assert_close(stock(**given).loss, model(**given).loss)
    # The plan alone, without new weights, keeps the same units of the dense model.
    dense = with_choice(name)
    apply_plan(dense, report.plan)
    assert [each.shape for each in dense.parameters()] == [e.shape for e in model.parameters()]
    if not said:
        prune(model, batches(model, 2), 0.6, **even)
        save_pruned(model, tmp_path / "less", model.liar_plan)
        torch.testing.assert_close(outputs(load_pruned(tmp_path / "less")), outputs(model))


@pytest.mark.parametrize("name", sorted(MOE_FAMILIES.keys() - {"llama4_text"}))
@torch.no_grad()
def test_tokens_are_sent_anew_as_the_router_without_some_experts_sends_them(name: str) -> None:
    dense, fewer = with_choice(name), with_choice(name)
    layer = next(iter(teams_of([s for s in sites(dense) if s.expert is not None]).values()))
    kept = torch.tensor([0, 2, 3])
    plan = Plan(
        dense.config.model_type, "auto", {}, experts={layer[0].team: SitePlan(4, (0, 2, 3))}
    )
    apply_plan(fewer, plan)
    hidden = torch.randn(50, layer[0].d_out)
    router = router_of(dense, layer[0])
    choice, experts = choice_of(dense, layer[0]), layer[0].wiring.experts
    assert len(choice) == (name in ("hy_v3", "lfm2_moe", "minimax_m2"))
    weights, places = reroute(router, router(hidden, *choice)[0], kept, experts, choice)
    _, expected, chosen = router_of(fewer, layer[0])(hidden, *choice_of(fewer, layer[0]))
    order, other = places.argsort(1), chosen.argsort(1)
    assert torch.equal(places.gather(1, order), chosen.gather(1, other))
    torch.testing.assert_close(weights.gather(1, order), expected.gather(1, other))


@pytest.mark.parametrize("name", ["deepseek_v3", "dots1", "glm4_moe", "lfm2_moe"])
def test_a_bias_of_the_choice_is_as_long_as_its_layer_has_experts(name: str, tmp_path) -> None:
    """It is a buffer, which no config sizes by the layer."""
    model = with_choice(name)
    last = [site for site in sites(model) if site.expert is not None][-1].team
    plan = Plan(model.config.model_type, "auto", {}, experts={last: SitePlan(4, (0, 2, 3))})
    apply_plan(model, plan)
    save_pruned(model, tmp_path / "pruned", plan)
    auto = transformers.AutoModelForCausalLM
    for loaded in (
        load_pruned(tmp_path / "pruned"),
        auto.from_pretrained(tmp_path / "pruned", trust_remote_code=True),
    ):
        torch.testing.assert_close(outputs(loaded), outputs(model))
        biases = [b for n, b in loaded.named_buffers() if n.endswith("bias")]
        assert [len(bias) for bias in biases] == [4, 3]


def test_experts_that_are_chosen_by_groups_stay() -> None:
    model = tiny("deepseek_v3", n_routed_experts=8, n_group=4, topk_group=2)
    with pytest.raises(InputError, match="chooses among 4 groups"):
        prune(model, batches(model, 2), 1.0, keep_experts=0.75)
    report = prune(model, batches(model, 2), 0.6, **QUICK)  # their channels may go
    assert any(site.removed for site in report.plan.sites.values())


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("qwen2_moe", [0]), ("deepseek_v3", [1, 2]), ("hunyuan_v1_moe", [0, 1]), ("phimoe", [])],
)
def test_an_expert_that_every_token_passes_is_a_site_beside_the_others(name, blocks) -> None:
    model = tiny(name)
    shared = [site for site in sites(model, ("mlp",)) if site.name.endswith(".shared_mlp")]
    assert [site.block for site in shared] == blocks
    assert all(site.kind == "mlp" and site.expert is None for site in shared)
    assert {kind_of(site.name) for site in sites(model)} == {"attn", "mlp"}
    report = prune(model, batches(model, 2), 0.6, tile=1, **QUICK)
    assert all(report.plan.sites[site.name].removed for site in shared)


@pytest.mark.parametrize("name", ALL)
def test_no_config_says_other_numbers_of_experts_in_each_layer(name: str) -> None:
    """docs/moe.md says so; a config that does is worth an option."""
    _, fields = ALL[name]
    wiring = next(site.wiring for site in sites(tiny(name), ("mlp",)) if site.expert is not None)
    (field,) = (field for field, size in wiring.config.items() if size == "experts")
    inner = fields.get("text_config", fields)
    counts = {field: [4] * (inner["num_hidden_layers"] - 1) + [3]}
    given = {"text_config": inner | counts} if "text_config" in fields else counts
    tiny_config(name)
    with pytest.raises(Exception, match=f"Validation error for field '{field}'"):
        tiny_config(name, **given)


@pytest.mark.parametrize("name", LATENT)
def test_a_compressed_cache_is_the_same_whatever_heads_there_are(name: str) -> None:
    model = tiny(name)
    with pytest.raises(InputError, match="holds what all heads make their keys and values from"):
        total_cost(model, sites(model), Budget(0.8, "kv_cache"))


@pytest.mark.parametrize("name", sorted({*MOE_FAMILIES} - {"flex_olmo", "minimax", "minimax_m2"}))
def test_equal_heads_are_said_by_the_config(name: str, tmp_path: Path) -> None:
    model, kept = tiny(name), {}
    for site in sites(model, ("attn",)):
        if site.head_dim:  # and not the channels of a convolution
            kept[site.name] = SitePlan(site.units, tuple(range(0, site.units, 2)))
    plan = Plan(model.config.model_type, "auto", kept)
    apply_plan(model, plan)
    loaded_by_its_class(name, model, plan, tmp_path / "pruned")
