"""Encoders, encoder-decoders and towers: every row of theirs, from slicing to a second folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from covers import cover, some
from folders import check_sliced, equal_plan, make_plan, read
from journeys import (
    check_hidden,
    check_job,
    halved,
    one_of_each_kind,
    says_equal_layers,
)
from tiny import outputs, tiny, tiny_config, tiny_inputs
from tiny_encoders import ENCODERS
from torch import nn

from liar_ext import InputError, Plan, apply_plan
from liar_ext.checkpoint.stock_config import describe
from liar_ext.models.plan import SitePlan
from liar_ext.models.registry import family_of
from liar_ext.models.residual_stream import hidden_of
from liar_ext.models.sites import sites

PARTS = ("clip", "bart", "t5", "whisper")
QUICK = (
    *PARTS,
    "marian",
    "deberta-v2",
    "dinov3_vit",
    "electra",
    "modernbert",
    "albert",
    "xlm-roberta",
)


def some_plans(model: nn.Module) -> list[Plan]:
    """Return plans for each kind of site, each part of the model, and attention across."""
    found = make_plan(model)
    at = sites(model)
    groups = [{s.name for s in at if s.kind == kind} for kind in ("attn", "mlp")]
    groups += [{s.name for s in at if s.part.name == part} for part in {s.part.name for s in at}]
    groups += [{s.name for s in at if "cross" in s.name}]
    distinct = {frozenset(group) for group in groups if group}
    return [
        found,
        *(replace(found, sites={n: found.sites[n] for n in sorted(each)}) for each in distinct),
    ]


@pytest.mark.parametrize("name", ENCODERS)
def test_slicing_equals_zeroing(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    for plan in some_plans(model):
        check_sliced(model, plan, rtol=1e-6, atol=1e-6)


def test_sites_are_named_by_the_part_that_they_are_in() -> None:
    def names(name: str) -> list[str]:
        return [site.name for site in sites(tiny(name)) if site.block == 1]

    both = ["encoder.1.attn", "encoder.1.mlp", "decoder.1.attn", "decoder.1.cross_attn"]
    assert names("t5") == names("whisper") == names("bart") == [*both, "decoder.1.mlp"]
    assert names("clip") == ["vision.1.attn", "vision.1.mlp", "text.1.attn", "text.1.mlp"]
    assert names("clip_text_model") == names("albert") == ["1.attn", "1.mlp"]
    # What a model lacks has no sites; nor has attention to an encoder that isn't there.
    assert names("t5 encoder") == names("whisper classes") == ["encoder.1.attn", "encoder.1.mlp"]
    assert names("bart decoder") == ["decoder.1.attn", "decoder.1.mlp"]
    assert [site.kind for site in sites(tiny("bart"))][-3:] == ["attn", "attn", "mlp"]
    assert len(sites(tiny("bart"), ("attn",))) == 2 + 4


@pytest.mark.parametrize("name", ENCODERS)
def test_equal_layers_are_said_by_the_stock_config(name: str) -> None:
    """The config is proved by building the stock class from it, with the same names and shapes."""
    model = tiny(name)
    apply_plan(model, equal_plan(model))
    expected = outputs(model)
    describe(model)
    assert model.config.liar["layers"] == ("equal" if says_equal_layers(model) else "unequal")
    assert torch.equal(outputs(model), expected)


@some("name", one_of_each_kind(ENCODERS), *QUICK)
def test_a_job_of_unequal_layers(name: str, tmp_path: Path) -> None:
    model = check_job(name, tmp_path, allocation="global", criterion="wifv")
    # Of DeBERTa only the MLPs have several sites, by chance alike.
    assert read(tmp_path / "one")["liar"]["layers"] == "unequal" or name == "deberta"
    assert model.config.liar["history"]


@cover(
    1,
    kinds=[("attn",), ("mlp",)],
    name=["nomic_bert", "modernbert", "deberta-v2", "albert", "dinov3_vit", *PARTS],
)
def test_a_job_of_equal_layers(name: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    equal = {"uniform_layers": True, "reconstruct": "linear", "schedule": "one-pass"}
    check_job(name, tmp_path, kinds=kinds, **equal)
    possible = kinds == ("mlp",) or name == "nomic_bert"
    assert read(tmp_path / "one")["liar"]["layers"] == ("equal" if possible else "unequal")
    assert possible or "stock" in family_of(tiny(name)).without


NARROWED = "nomic_bert modernbert clip_text_model siglip_text_model vit dinov2".split()
NARROWED += ["clip_vision_model", "electra", "dinov3_vit", "albert", "megatron-bert", "deit"]


OF_A_ROW = "nomic_bert modernbert vit albert megatron-bert deit".split()
LIKE_THEM = "roberta-prelayernorm xlm-roberta-xl ernie layoutlm ijepa vit_msn".split()


@some("name", [*OF_A_ROW, *LIKE_THEM], *OF_A_ROW)
def test_hidden_features_that_others_repeat_are_given_back(name: str, monkeypatch) -> None:
    check_hidden(name, monkeypatch, **({} if "vit" in name else {"tie_word_embeddings": False}))


@pytest.mark.parametrize("size", [16, 32])
def test_hidden_features_of_electra_that_others_repeat_are_given_back(size, monkeypatch) -> None:
    """Embeddings with a size of their own stay as they are; those of the stream are narrowed."""
    check_hidden("electra", monkeypatch, embedding_size=size)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("dinov2", {}),
        ("dinov2_swiglu", {}),
        ("dinov2_with_registers", {}),
        ("dinov3_vit", {}),
        ("dinov3_vit gated", {}),
        ("siglip_vision_model", {"vision_use_head": False}),
        ("albert one", {}),
        ("mpnet", {"hidden_size": 32}),  # as many as its buckets of relative positions
    ],
)
@torch.no_grad()
def test_hidden_features_that_are_put_out_are_those_that_others_repeat(
    name: str, fields: dict, monkeypatch
) -> None:
    model = tiny(name, dtype=torch.float64, **fields)
    small, inputs, _ = halved(model, monkeypatch)
    half = model.config.hidden_size // 2
    wanted = outputs(model, inputs)[..., :half]
    torch.testing.assert_close(outputs(small, inputs), wanted, rtol=1e-4, atol=1e-4)


def test_a_head_that_reads_the_stream_twice_is_refused() -> None:
    model = transformers.Dinov2ForImageClassification(tiny("dinov2").config)
    with pytest.raises(InputError, match="classifier of .* reads 64 features, .* has 32"):
        hidden_of(model)
    model = transformers.ViTForMaskedImageModeling(tiny("vit").config)
    with pytest.raises(InputError, match="decoder.0 of .* has 32 features"):
        hidden_of(model)


@pytest.mark.parametrize("head", ["clip", "siglip", "images"])
@torch.no_grad()
def test_hidden_features_of_a_tower_that_others_repeat_are_given_back(
    head: str, monkeypatch
) -> None:
    """What is put out for an input is as it was, and its hidden states those that stay."""
    name, row, put_out = {
        "clip": ("CLIPTextModelWithProjection", "clip_text_model", "text_embeds"),
        "siglip": ("SiglipTextModel", "siglip_text_model", "pooler_output"),
        "images": ("CLIPVisionModelWithProjection", "clip_vision_model", "image_embeds"),
    }[head]
    config = tiny_config(row, projection_dim=12, projection_size=12)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval().double()
    small, inputs, _ = halved(model, monkeypatch)
    before, after = model(**inputs), small(**inputs)
    half = model.config.hidden_size // 2
    wanted, given = before.last_hidden_state[..., :half], after.last_hidden_state
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[put_out], before[put_out], rtol=1e-4, atol=1e-4)


@some("name", [*NARROWED, "xlm-roberta"], "nomic_bert", "clip_text_model", "dinov2", "albert")
def test_jobs_with_a_smaller_hidden_size(name: str, tmp_path: Path) -> None:
    model = check_job(name, tmp_path, keep_hidden=0.7)
    assert sites(model)[0].d_out < tiny(name).config.hidden_size


@pytest.mark.parametrize(
    ("name", "prefix", "heads"),
    [("nomic_bert", "NomicBert", 2), ("modernbert", "ModernBert", 3)],
)
def test_heads_of_rotary_encoders_read_the_stream_somewhere(name, prefix, heads) -> None:
    every = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    for head in (*every[:heads], "Model"):
        model = getattr(transformers, prefix + head)(tiny(name).config).eval()
        found, size = hidden_of(model), model.config.hidden_size
        # The norm of ModernBERT's embeddings stands for the first block's; its heads have one.
        norms = 1 + 2 * 3 if name == "nomic_bert" else 1 + 5 + 1 + (head != "Model")
        assert len(found.norms) == norms and found.size == size
        kept = SitePlan(size, tuple(range(8, size)))
        apply_plan(model, Plan(name, "auto", {}, hidden=kept))
        assert model(**tiny_inputs(model))[0].isfinite().all()
