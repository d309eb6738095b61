"""Mixtures of experts that are proposed: those of the table anew, and one that nobody has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from discovery import odd
from discovery.odd import FlockConfig, FlockModel, flock
from tiny import outputs
from transformers import AutoConfig

import liar_ext
from liar_ext.discovery.experts_proof import prove_experts
from liar_ext.discovery.instance import Refused, make_instance
from liar_ext.discovery.rows import registered
from liar_ext.discovery.suggest import suggest_family
from liar_ext.models.families.reasons import ROUTED
from liar_ext.models.family import Experts, Stack, Wiring
from liar_ext.models.registry import FAMILIES
from liar_ext.models.sites import sites
from liar_ext.plan import Plan, SitePlan

CLASSES = {"mixtral": "MixtralForCausalLM", "gpt_oss": "GptOssForCausalLM"}


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """None of these families is known, and the table stays as it is."""
    rows = {name: FAMILIES[name] for name in (*CLASSES, "glm4_moe", "qwen2_moe")}
    for name in rows:
        monkeypatch.delitem(FAMILIES, name)
    before = dict(FAMILIES)
    yield rows
    assert FAMILIES == before


@pytest.mark.parametrize("name", CLASSES)
def test_a_mixture_of_the_table_is_found_anew(name, table):
    """Rows are stored by matrix, or transposed and gate beside up, with biases."""
    found = suggest_family(AutoConfig.for_model(name, architectures=[CLASSES[name]]))
    ours, theirs = found.family.mlp, table[name].mlp
    # Of gpt_oss experts are as wide as the hidden size, and their width isn't read.
    assert ours.numbers.items() <= theirs.numbers.items()
    assert replace(ours, numbers=theirs.numbers) == theirs
    assert found.family.attn.per_head == table[name].attn.per_head
    # Mixtral has as many experts as a head of the tiny instance has features.
    assert set(found.family.attn.config) == {
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    }
    assert found.family.without == {"hidden": ROUTED}
    assert "attn and mlp by head" in found.proved[0]
    assert "without some experts it is what the router makes of the others" in found.proved[-2]
    assert found.proved[-1] == f"fewer experts load in {CLASSES[name]}.from_pretrained"


def test_dense_blocks_before_the_mixtures_stay_whole(table):
    """Of an expert for every token the width follows the same field."""
    found = suggest_family(AutoConfig.for_model("glm4_moe"))
    assert found.family.mlp.optional
    assert found.family.mlp.numbers == table["glm4_moe"].mlp[0].numbers
    assert found.family.mlp.config == {"n_routed_experts": "experts"}
    assert "channels: moe_intermediate_size changes other layers" in found.family.without["stock"]
    assert found.family.shared_mlp == table["glm4_moe"].shared_mlp
    assert any("blocks without experts keep what they have" in note for note in found.notes)


def test_the_mlp_beside_the_experts_is_described(table):
    found = suggest_family(AutoConfig.for_model("qwen2_moe"))
    assert found.family.shared_mlp == table["qwen2_moe"].shared_mlp
    assert found.family.mlp.config.keys() & {"moe_intermediate_size"}
    assert any("equal layers of attn and mlp load" in each for each in found.proved)


@pytest.fixture(scope="module")
def found():
    return suggest_family(FlockModel(FlockConfig()))


def test_a_mixture_that_nobody_has_is_described_right(found):
    assert found.family.mlp == Wiring(
        producers=("herd.ascent",),
        consumer="herd.descent",
        stacked={"herd.ascent": Stack(("up", "gate"), by_group=True)},
        transposed=True,
        numbers={"herd.flock": "experts", "herd.girth": "features"},
        config={"swell": "features", "flock": "experts"},
        experts=Experts("herd", "shepherd"),
    )


def test_its_channels_and_experts_are_pruned_saved_and_loaded(found, tmp_path):
    torch.manual_seed(0)
    model = FlockModel(FlockConfig()).eval()
    inputs = {"input_ids": torch.randint(53, (2, 9))}
    with registered(found.family):
        layers = sorted({site.team for site in sites(model, ("mlp",))})
        experts = {name: SitePlan(5, (0, 2, 4)) for name in layers}
        kept = tuple(range(3, 22))
        channels = {f"{name}.{i}": SitePlan(22, kept) for name in layers for i in range(3)}
        plan = Plan("flock", "auto", channels, experts=experts)
        liar_ext.apply_plan(model, plan)
        assert model.strata[1].herd.ascent.shape == (3, 30, 38)
        liar_ext.save_pruned(model, tmp_path / "flock", plan)
        loaded = FlockModel.from_pretrained(tmp_path / "flock").eval()
        assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"herd_class": odd.BlendedHerd}, "row 0 of herd.ascent reaches 22 columns of descent"),
        (
            {"shepherd_class": odd.MutteringShepherd},
            "what chooses the experts of herd is no module",
        ),
    ],
)
def test_a_mixture_that_no_row_can_name_is_left_out(members, reason):
    found = suggest_family(flock(**members)(FlockConfig())).family
    assert found.mlp is None and found.attn.consumer == "gaze.tell"
    assert reason in found.without["mlp"]


def test_a_wrong_router_is_not_proved(found):
    """As many numbers as there are experts are not enough to be the router of them."""
    instance = make_instance(FlockModel, FlockConfig(), None)
    assert prove_experts([instance], found.family)
    wrong = replace(found.family.mlp, experts=Experts("herd", "gaze.tell"))
    with pytest.raises((Refused, AttributeError, ValueError)):
        prove_experts([instance], replace(found.family, mlp=wrong))
