"""An encoder and a decoder that are proposed: those of the table anew, and two that nobody has."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from covers import some
from suggest import odd
from suggest.odd import DuetConfig, DuetModel
from tiny import outputs
from transformers import AutoConfig

import liar_ext
from liar_ext.models.family import Stack, Wiring
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.registry import FAMILIES
from liar_ext.models.sites import get_consumer_weight, sites
from liar_ext.suggest.sizes import registered
from liar_ext.suggest.suggest import suggest_family
from liar_ext.system.errors import InputError

KINDS = ("attn", "cross_attn", "mlp")


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """Neither family is known, and the table stays as it is."""
    rows = {name: FAMILIES[name] for name in ("bart", "t5")}
    for name in rows:
        monkeypatch.delitem(FAMILIES, name)
    before = dict(FAMILIES)
    yield rows
    assert FAMILIES == before


@some("name", ["bart", "t5"])
def test_a_family_of_the_table_is_found_anew(name, table):
    """T5 makes a bias of relative positions from a table in the first block alone."""
    found = suggest_family(AutoConfig.for_model(name))
    row = table[name]
    for ours, theirs in zip(found.family.parts, row.parts, strict=True):
        for word in ("name", "blocks", "config", "input", "mask"):
            assert getattr(ours, word) == getattr(theirs, word), word
        for kind in KINDS:
            mine, known = getattr(ours, kind), getattr(theirs, kind)
            known = known[-1] if isinstance(known, tuple) else known  # T5's MLP without a gate
            assert (mine is None) == (known is None)
            if mine is not None:
                assert mine.numbers.items() <= known.numbers.items()
                assert replace(mine, numbers=known.numbers) == known
    assert set(found.family.without) == set(row.without)
    assert found.family.without["hidden"] == row.without["hidden"]
    assert "attn and mlp by head" in found.proved[0]
    assert "equal layers of mlp load in" in found.proved[1]


@pytest.fixture(scope="module")
def duet():
    return suggest_family(DuetModel(DuetConfig()))


def test_a_class_that_nobody_has_is_described_right(duet):
    def attention(module: str) -> Wiring:
        return Wiring(
            producers=(f"{module}.seen", f"{module}.ask"),
            consumer=f"{module}.tell",
            head_dim=f"{module}.lens_width",
            stacked={f"{module}.seen": Stack(("key", "value"))},
            numbers={f"{module}.lenses": "heads", f"{module}.shades": "kv_heads"},
            config={"lenses": "heads", "shades": "kv_heads", "lens_width": "head_dim"},
        )

    encoder, decoder = duet.family.parts
    assert (encoder.name, encoder.blocks, encoder.input) == ("encoder", "strata", "input_ids")
    assert (decoder.name, decoder.blocks) == ("decoder", "echoes")
    assert (decoder.input, decoder.mask) == ("decoder_input_ids", "")  # its forward takes no mask
    assert encoder.attn == decoder.attn == attention("gaze")
    assert encoder.cross_attn is None and decoder.cross_attn == attention("glance")
    assert encoder.mlp.stacked == {"rise": Stack(("up", "gate"))} and not decoder.mlp.stacked
    assert encoder.mlp.config == decoder.mlp.config == {"swell": "features"}
    assert set(duet.family.without) == {"hidden"}


def test_a_model_of_that_class_is_pruned_saved_and_loaded(duet, tmp_path):
    torch.manual_seed(0)
    model = DuetModel(DuetConfig()).eval()
    inputs = {
        "input_ids": torch.randint(53, (2, 9)),
        "decoder_input_ids": torch.randint(53, (2, 7)),
    }
    namespace: dict = {}
    before = dict(FAMILIES)
    try:
        exec(duet.code, namespace)
        zeroed, kept = copy.deepcopy(model), {}
        for site in sites(model):
            kept[site.name] = SitePlan(site.units, tuple(range(site.units // 2)))
            gone = site.features(kept[site.name].removed)
            get_consumer_weight(zeroed, site)[:, gone] = 0
        assert "decoder.2.cross_attn" in kept and "encoder.0.attn" in kept
        plan = Plan("duet", "auto", kept)
        liar_ext.apply_plan(model, plan)
        torch.testing.assert_close(outputs(model, inputs), outputs(zeroed, inputs))
        liar_ext.save_pruned(model, tmp_path / "duet", plan)
        loaded = DuetModel.from_pretrained(tmp_path / "duet").eval()
        assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    finally:
        FAMILIES.clear()
        FAMILIES.update(before)


@pytest.mark.parametrize(
    ("echo", "reason"),
    [
        (odd.MixedEcho, "no attention of echoes that a row can name reads the encoder: .*blend"),
        (odd.DeafEcho, "no attention of echoes that a row can name reads the encoder"),
    ],
)
def test_a_decoder_that_no_row_can_name_is_refused(echo, reason):
    model = type("Other", (DuetModel,), {"echo_class": echo})(DuetConfig())
    with pytest.raises(InputError, match=f"no row for 'duet': {reason}.*by hand") as caught:
        suggest_family(model)
    assert "\n" not in str(caught.value)


def test_an_encoder_alone_is_refused():
    """What its config says has two stacks has one."""
    model = type("Half", (odd.OddModel,), {"config_class": DuetConfig})(DuetConfig())
    with pytest.raises(InputError, match="it has lists of blocks strata, and not 2"):
        suggest_family(model)


def test_an_encoder_of_sound_is_refused():
    reason = "no row for 'whisper': .*takes input_features, and only tokens and images are known"
    row = FAMILIES.pop("whisper")
    try:
        with pytest.raises(InputError, match=reason):
            suggest_family(AutoConfig.for_model("whisper"))
    finally:
        FAMILIES["whisper"] = row


def test_a_self_attention_that_is_left_out_is_named(duet):
    model = type("Other", (DuetModel,), {"stratum_class": odd.stratum_with(odd.BareGaze)})
    found = suggest_family(model(DuetConfig())).family
    encoder, decoder = found.parts
    assert encoder.attn is None and decoder.attn is not None and decoder.cross_attn is not None
    assert re.search("encoder: no linear layer that attention writes", found.without["attn"])
    with registered(found):
        assert {site.kind for site in sites(model(DuetConfig()))} == {"attn", "mlp"}
