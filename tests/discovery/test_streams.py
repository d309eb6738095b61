"""Residual streams that are proposed: those of the table anew, and refused where none can be."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from discovery import odd
from discovery.odd import OddConfig, OddModel, variant
from tiny import TINY, outputs, tiny
from transformers import AutoConfig

import liar_ext
from liar_ext.discovery.instance import Instance, Refused, make_instance
from liar_ext.discovery.rows import registered
from liar_ext.discovery.stream import find_stream
from liar_ext.discovery.stream_proof import prove_stream
from liar_ext.discovery.suggest import suggest_family
from liar_ext.models.family import Step
from liar_ext.models.registry import FAMILIES
from liar_ext.models.residual_stream import hidden_of, stream_of

# Norms before and after the branches, transposed layers, a head that is tied, that reads what a
# pooler wrote, or the first token; a block without a norm, norms that add one, blocks that differ.
KNOWN = "llama gpt2 bert opt vit falcon modernbert qwen3_5_text olmo olmo2 gemma2 electra".split()


@pytest.fixture(autouse=True)
def table():
    before = dict(FAMILIES)
    yield
    assert FAMILIES == before


def narrowable(model):
    """Return the stream of a model: size, writers, and who reads what, without their order."""
    found = hidden_of(model)
    read = {(s.module, s.norm, s.first): {*s.readers, *s.tied} for s in found.sources}
    return found.size, set(found.writers), read, set(found.norms)


@pytest.mark.parametrize("name", KNOWN)
def test_a_stream_of_the_table_is_found_anew(name):
    row = FAMILIES[name]
    if name in TINY:
        model_class, config = type(tiny(name)), tiny(name).config
    else:
        model = liar_ext.discovery.suggest._class_of(AutoConfig.for_model(name))
        model_class, config = model, AutoConfig.for_model(name)
    instance = make_instance(model_class, config, None)
    found = replace(row, stream=find_stream(instance, row))
    with registered(found):
        ours = narrowable(instance.model)
    assert ours == narrowable(instance.model)
    theirs = stream_of(instance.model)  # of alternatives the one that it has
    assert found.stream.norm_offset == theirs.norm_offset
    assert found.stream.scaled == theirs.scaled
    assert "narrowed equals zeroed" in prove_stream([instance], found)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_fields_that_follow_are_those_of_the_table(name, monkeypatch):
    """Llama's heads stay; BERT's are the hidden size by their number."""
    row, config = FAMILIES[name], tiny(name).config
    config.architectures = [TINY[name][0]]
    with monkeypatch.context() as without:
        without.delitem(FAMILIES, name)
        found = suggest_family(config)
    stream = found.family.stream
    assert (stream.config, stream.multiple_of) == (row.stream.config, row.stream.multiple_of)
    assert "hidden" not in found.family.without
    assert f"smaller hidden size it loads in {TINY[name][0]}" in found.proved[-1]
    assert f"of the heads of the family, the stream names those of {TINY[name][0]}" in found.notes


def test_a_class_that_nobody_has_is_narrowed_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = OddModel(OddConfig()).eval()
    batches = [{"input_ids": torch.randint(53, (2, 9))} for _ in range(3)]
    with registered(suggest_family(model).family):
        report = liar_ext.prune(model, batches, keep=1.0, keep_hidden=0.8, tile=1)
        assert model.lexicon.weight.shape == (53, 24)
        liar_ext.save_pruned(model, tmp_path / "odd", report.plan)
        loaded = OddModel.from_pretrained(tmp_path / "odd").eval()
        assert torch.equal(outputs(loaded, batches[0]), outputs(model, batches[0]))


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [
        (
            variant("Other", stratum_class=odd.FlippedStratum),
            "strata.0.rise reads neither what a norm put out nor the stream feature by feature",
        ),
        (odd.Averaged, "verdict reads something else than the stream or what a norm put out"),
        (odd.Scaled, "with a smaller hidden size a saved folder loads with other outputs"),
        (
            variant("Other", stratum_class=odd.StrictStratum),
            "who reads and writes it can't be seen: ArithmeticError: no weight",
        ),
    ],
)
def test_a_stream_that_no_row_can_name_is_left_out(model_class, reason):
    found = suggest_family(model_class(OddConfig())).family
    assert found.stream is None and found.attn is not None and found.mlp is not None
    assert re.search(reason, found.without["hidden"])


@pytest.mark.parametrize(
    ("model_class", "start", "block"),
    [
        (
            variant("Other", stratum_class=odd.RawStratum),
            "lexicon",
            (
                Step("norm", ("hush",)),
                Step("read", ("gaze.seen", "gaze.ask")),
                Step("take", ("rise",)),
                Step("write", ("gaze.tell", "fall")),
            ),
        ),
        (
            variant("Other", stratum_class=odd.BranchStratum),
            "lexicon",
            (
                Step("norm", ("hush",)),
                Step("read", ("rise", "gaze.seen", "gaze.ask")),
                Step("write", ("gaze.tell", "fall")),
                Step("branch_norm", ("calm",)),
            ),
        ),
        (odd.Slim, "widen", None),
    ],
)
def test_streams_of_other_forms_are_described(model_class, start, block):
    """Read through no norm, with a norm over a branch, and wider than the embeddings."""
    found = suggest_family(model_class(OddConfig())).family
    assert found.stream.start == (Step("write", (start,)),)
    assert block is None or set(found.stream.block) == set(block)


def test_a_table_that_is_read_twice_is_written_once():
    found = suggest_family(odd.Twice(OddConfig())).family
    assert found.stream.start == (Step("write", ("lexicon",)),)


@pytest.fixture(scope="module")
def llama() -> Instance:
    return make_instance(type(tiny("llama")), tiny("llama").config, None)


def block_of(row, **steps):
    """Return Llama's row with steps of its blocks replaced, by number."""
    block = list(row.stream.block)
    for index, step in steps.items():
        block[int(index[1:])] = step
    return replace(row, stream=replace(row.stream, block=tuple(block)))


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (
            {"_1": Step("read", ("self_attn.q_proj", "self_attn.k_proj"))},
            "self_attn.v_proj of LlamaForCausalLM has 60 features",
        ),
        (
            {
                "_1": Step("read", ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")),
                "_4": Step("read", ("self_attn.v_proj", "mlp.gate_proj")),
            },
            "up_proj reads something else than model.layers.0.input_layernorm",
        ),
        ({"_2": Step("take", ("self_attn.o_proj",))}, "o_proj of .* reads 48 features"),
    ],
)
def test_a_wrong_stream_is_not_proved(llama, steps, reason):
    row = FAMILIES["llama"]
    assert prove_stream([llama], row)
    with pytest.raises(Refused, match=reason):
        prove_stream([llama], block_of(row, **steps))


def test_a_norm_that_is_none_is_not_proved():
    """A layer that computes a maximum over all features isn't one over those that stay."""
    torch.manual_seed(0)
    model = variant("Other", stratum_class=odd.SkewedStratum)(OddConfig())
    found = suggest_family(model).family
    assert found.stream is None
    assert re.search("with a smaller hidden size the outputs are .* from", found.without["hidden"])
