"""Rows that are proposed: those of the table anew, and one of a class that nobody has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from covers import some
from folders import equal_plan
from suggest.odd import OddConfig, OddModel
from tiny import TINY, outputs, tiny
from transformers import AutoConfig

import liar_ext
from liar_ext.models.family import Family, Stack, Wiring
from liar_ext.models.registry import FAMILIES
from liar_ext.models.sites import sites
from liar_ext.suggest.instance import Refused, make_instance
from liar_ext.suggest.suggest import prove, suggest_family

# Of kinds that differ: grouped and not, stacked in both ways, transposed, an input made for all
# heads, images, the config in a part.
KNOWN = "llama gpt2 gpt_neox bert mpnet distilbert opt vit gemma2 gemma3 phi3".split()


@pytest.fixture(autouse=True)
def table():
    """The table stays as it was, whatever is tried."""
    before = dict(FAMILIES)
    yield
    assert FAMILIES == before


@some("name", KNOWN, "llama", "gpt2", "vit")
def test_a_family_of_the_table_is_found_anew(name, monkeypatch):
    row = FAMILIES[name]
    config = tiny(name).config if name in TINY else AutoConfig.for_model(name)
    if name in TINY:
        config.architectures = [TINY[name][0]]
    with monkeypatch.context() as without:
        without.delitem(FAMILIES, name)
        found = suggest_family(config)
        assert not found.known
        assert name not in FAMILIES
    ours = found.family
    assert (ours.name, ours.blocks, ours.config) == (name, row.blocks, row.config)
    for kind in ("attn", "mlp"):
        theirs, wiring = getattr(row, kind), getattr(ours, kind)
        for word in (
            "producers",
            "consumer",
            "head_dim",
            "stacked",
            "transposed",
            "head_input",
            "output_norm",
        ):
            assert getattr(wiring, word) == getattr(theirs, word), word
        assert set(wiring.key_value) == set(theirs.key_value)
        assert wiring.config == theirs.config
        assert wiring.numbers.items() <= theirs.numbers.items()
        assert theirs.bias_flag in (None, wiring.bias_flag)
    assert any("sliced equals zeroed" in each for each in found.proved)
    assert ("stock" in ours.without) == (ours.attn.config is None)


def test_the_code_registers_the_row():
    row = FAMILIES["llama"]
    for name in (name for name in KNOWN if name in TINY):
        found = suggest_family(tiny(name))
        assert found.known and found.family is FAMILIES[name] and not found.proved
        before = FAMILIES.pop(name)
        try:
            exec(found.code, {})
            assert FAMILIES[name] == before
        finally:
            FAMILIES[name] = before
    assert FAMILIES["llama"] is row


@pytest.fixture(scope="module")
def odd():
    """What is proposed for a class with names that say nothing."""
    model = OddModel(OddConfig())
    state = torch.get_rng_state()
    found = suggest_family(model)
    assert torch.equal(torch.get_rng_state(), state)
    return found


def test_a_class_that_nobody_has_is_described_right(odd):
    assert odd.family == Family(
        name="odd",
        blocks="strata",
        attn=Wiring(
            producers=("gaze.seen", "gaze.ask"),
            consumer="gaze.tell",
            head_dim="gaze.lens_width",
            stacked={"gaze.seen": Stack(("key", "value"))},
            numbers={"gaze.lenses": "heads", "gaze.shades": "kv_heads"},
            config={"lenses": "heads", "shades": "kv_heads", "lens_width": "head_dim"},
        ),
        mlp=Wiring(
            producers=("rise",),
            consumer="fall",
            stacked={"rise": Stack(("up", "gate"))},
            config={"swell": "features"},
        ),
        without={"hidden": "the residual stream isn't described"},
    )
    assert any("equal layers of attn and mlp load in OddModel" in each for each in odd.proved)


def test_a_model_of_that_class_is_pruned_saved_and_loaded(odd, tmp_path):
    model = OddModel(OddConfig()).eval()
    inputs = {"input_ids": torch.randint(53, (2, 9))}
    before = dict(FAMILIES)
    try:
        exec(odd.code, {})
        plan = equal_plan(model)
        liar_ext.apply_plan(model, plan)
        assert [site.units for site in sites(model)] == [1, 11] * 3
        liar_ext.save_pruned(model, tmp_path / "odd", plan)
        loaded = OddModel.from_pretrained(tmp_path / "odd").eval()
        assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    finally:
        FAMILIES.clear()
        FAMILIES.update(before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"producers": ("self_attn.v_proj",), "key_value": ("self_attn.k_proj", "self_attn.q_proj")},
        {"head_dim": "self_attn.layer_idx"},
    ],
)
def test_a_wrong_row_is_not_proved(wrong):
    row = FAMILIES["llama"]
    instance = make_instance(type(tiny("llama")), tiny("llama").config)
    assert "mlp" in prove([instance], row)[0]
    with pytest.raises((Refused, ValueError, ZeroDivisionError)):
        prove([instance], replace(row, attn=replace(row.attn, **wrong)))


def test_numbers_that_the_proof_alone_tells_are_found(monkeypatch):
    """GPT-2 has as many features of heads as hidden ones, whatever its sizes."""
    with monkeypatch.context() as without:
        without.delitem(FAMILIES, "gpt2")
        found = suggest_family(tiny("gpt2"))
    assert found.family.attn.numbers["attn.split_size"] == "features"
    assert found.notes[0] == "may be the hidden size, and are left alone: attn.embed_dim"


def test_a_layout_that_one_key_hides_is_noted(monkeypatch):
    with monkeypatch.context() as without:
        without.delitem(FAMILIES, "falcon")
        found = suggest_family(AutoConfig.for_model("falcon", multi_query=True))
    assert found.family.attn.config is None  # no field keeps the size of a head
    assert any("stacked by group can't be seen" in note for note in found.notes)
    assert "attn by head" in found.proved[0] and "kv_group" not in found.proved[0]
