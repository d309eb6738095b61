"""Where the residual stream is found, and what slicing it does to a model."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny import NARROWABLE, class_of, outputs, tiny, tiny_config, tiny_inputs
from torch import nn

from liar_ext import InputError, Plan
from liar_ext.models.plan import SitePlan
from liar_ext.models.residual_stream import hidden_of, slice_hidden
from liar_ext.models.sites import sites
from liar_ext.models.slicing import apply_plan

USUAL = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "Model",
)
HEADS = {
    "llama": USUAL,
    "bert": ("ForPreTraining", "LMHeadModel", "ForMaskedLM", "ForNextSentencePrediction", *USUAL),
    "roberta": ("ForCausalLM", *USUAL),
    "mpnet": ("ForMaskedLM", *USUAL),
    "distilbert": ("ForMaskedLM", *USUAL),
    "opt": ("ForCausalLM", "ForSequenceClassification", "ForQuestionAnswering", "Model"),
    "gpt2": USUAL,
    "gpt_neox": ("ForCausalLM", *USUAL),
    "gemma2": ("ForSequenceClassification", "ForTokenClassification", "Model"),
    "albert": ("ForPreTraining", "ForMaskedLM", *USUAL),
    "electra": ("ForPreTraining", "ForMaskedLM", *USUAL),
}


def with_head(name: str, head: str, **fields) -> nn.Module:
    """Return a tiny model with another head, and random weights like those of the others."""
    prefix = class_of(name).__name__.split("For")[0].removesuffix("LMHeadModel")
    prefix = prefix.removesuffix("Model")
    config = tiny_config(name, **fields)
    torch.manual_seed(0)
    return getattr(transformers, prefix + head)(config).eval()


def narrowed(model: nn.Module, kept: tuple[int, ...], weights=None) -> nn.Module:
    """Return a copy of a model that keeps some hidden features."""
    copied = copy.deepcopy(model)
    plan = SitePlan(hidden_of(model).size, kept)
    apply_plan(copied, Plan(model.config.model_type, "auto", {}, hidden=plan), weights)
    return copied


@pytest.mark.parametrize("name", NARROWABLE)
def test_every_parameter_with_hidden_features_loses_them(name):
    model = tiny(name)
    hidden = model.config.hidden_size
    small = narrowed(model, tuple(range(0, hidden, 2)))
    after = dict(small.named_parameters())
    attention = {p for site in sites(model) for p in site.producers if site.kind == "attn"}
    attention |= {site.consumer for site in sites(model, ("attn",))}
    for path, before in model.named_parameters():
        # With as many heads as BERT has, attention is as wide as the stream, and stays so.
        own = path.rpartition(".")[0] in attention
        gone = sum(before.shape[d] - after[path].shape[d] for d in range(before.ndim))
        assert gone == (hidden // 2 if own and before.ndim == 2 else gone)
        assert own or hidden not in after[path].shape, path
    assert outputs(small).shape[:2] == outputs(model).shape[:2]
    tied = {id(p) for _, p in model.named_parameters(remove_duplicate=False)}
    assert len({id(p) for p in small.parameters()}) == len(tied)


@pytest.mark.parametrize("name", NARROWABLE)
def test_keeping_every_feature_changes_nothing(name):
    model = tiny(name)
    same = narrowed(model, tuple(range(model.config.hidden_size)))
    assert torch.equal(outputs(same), outputs(model))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_features_that_are_never_written_cost_the_scale_of_the_norms(name):
    """RMSNorm averages over fewer features: √(H / n) of scale, and nothing else."""
    model = tiny(name, dtype=torch.float64)
    hidden, kept = 40, tuple(i for i in range(40) if i % 5)
    gone = [i for i in range(40) if i % 5 == 0]
    found = hidden_of(model)
    with torch.no_grad():
        for path in found.writers:
            weight = model.get_submodule(path).weight
            table = isinstance(model.get_submodule(path), nn.Embedding)
            weight[(slice(None), gone) if table else gone] = 0
        for path in found.norms:
            model.get_submodule(path).variance_epsilon = 0.0
    scale = (hidden / len(kept)) ** 0.5
    weights = {
        path: (scale * model.get_submodule(path).weight.detach()[list(kept)], None)
        for path in found.norms
    }
    small = narrowed(model, kept, weights)
    torch.testing.assert_close(outputs(small), outputs(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs(narrowed(model, kept)), outputs(model), rtol=1e-2)


@pytest.mark.parametrize(("name", "head"), [(n, head) for n in HEADS for head in HEADS[n]])
def test_every_head_reads_the_stream_somewhere(name, head):
    model = with_head(name, head)
    found = hidden_of(model)
    readers = [p for source in found.sources for p in (*source.readers, *source.tied)]
    assert len(readers) == len(set(readers))
    small = narrowed(model, tuple(range(16)))
    result, dense = small(**tiny_inputs(model)), model(**tiny_inputs(model))
    first, expected = result[0], dense[0]
    assert first.shape == (expected.shape if head != "Model" else (*expected.shape[:-1], 16))
    if head == "Model" and name in ("bert", "roberta", "mpnet"):
        assert result["pooler_output"].shape == (2, 16)


@pytest.mark.parametrize("head", ["ForPreTraining", "ForMaskedLM", "ForSequenceClassification"])
def test_embeddings_of_electra_that_are_as_wide_as_the_stream_are_narrowed(head):
    small = narrowed(with_head("electra", head, embedding_size=32), tuple(range(16)))
    assert 32 not in {size for p in small.electra.embeddings.parameters() for size in p.shape}
    assert small(**tiny_inputs(small))[0].isfinite().all()


def test_a_siglip_that_pools_its_patches_is_refused():
    with pytest.raises(InputError, match="vision_use_head=False, got True .*as wide as the hidden"):
        hidden_of(tiny("siglip_vision_model"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text"])
def test_embeddings_scaled_by_the_hidden_size_put_out_what_they_did(name, tied):
    """The table takes over what the root of fewer features lacks; a tied head doesn't see it."""
    model = tiny(name, dtype=torch.float64, tie_word_embeddings=tied)
    small = narrowed(model, tuple(range(8)))
    ids = torch.arange(3, 20)
    wanted = model.model.embed_tokens(ids)[:, :8]
    torch.testing.assert_close(small.model.embed_tokens(ids), wanted)
    built = type(small.model.embed_tokens)(61, 8, 0, embed_scale=8**0.5)
    assert small.model.embed_tokens.scalar_embed_scale == built.scalar_embed_scale
    assert small.model.embed_tokens.embed_scale.float() == built.embed_scale
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    h = torch.randn(5, 8, dtype=torch.float64)
    head = h / (h.square().mean(1, keepdim=True) + small.model.norm.eps).sqrt()
    head = (head * (1 + model.model.norm.weight[:8].double())) @ model.lm_head.weight[:, :8].T
    torch.testing.assert_close(small.lm_head(small.model.norm(h)), head, rtol=1e-5, atol=1e-5)


def test_a_head_that_the_family_does_not_name_is_refused():
    model = tiny("llama")
    model.value_head = nn.Linear(model.config.hidden_size, 1)
    with pytest.raises(InputError, match="value_head of LlamaForCausalLM has 40 features"):
        hidden_of(model)


def test_a_block_with_more_norms_than_the_family_has_is_refused():
    model = tiny("llama")
    model.model.layers[1].extra = nn.LayerNorm(model.config.hidden_size)
    with pytest.raises(InputError, match="model.layers.1.extra of LlamaForCausalLM"):
        hidden_of(model)


@pytest.mark.parametrize("name", ["nanochat", "gemma4_text", "deberta-v2", "bart"])
def test_a_family_without_a_stream_is_refused(name):
    with pytest.raises(InputError, match=f"no stream for family '{name}'"):
        hidden_of(tiny(name))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_layer_norm_before": False}, "do_layer_norm_before=True, got False"),
        ({"layer_norm_elementwise_affine": False}, "elementwise_affine=True, got False"),
        ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm=False, got True"),
        ({"word_embed_proj_dim": 16}, "project_out of OPTForCausalLM has 16 features"),
    ],
)
def test_an_opt_that_is_built_otherwise_is_refused(fields, message):
    model = tiny("opt", **fields)
    before = outputs(model)
    with pytest.raises(InputError, match=message):
        narrowed(model, (0, 1, 2, 3))
    assert torch.equal(outputs(model), before)


def test_a_plan_that_does_not_fit_is_refused_before_anything_changes():
    model = tiny("llama")
    before = outputs(model)
    wrong = Plan("llama", "auto", {}, hidden=SitePlan(41, (0, 1)))
    with pytest.raises(InputError, match="the model has 40 hidden features, the plan counts 41"):
        apply_plan(model, wrong)
    fitting = Plan("llama", "auto", {}, hidden=SitePlan(40, (0, 1, 2, 3)))
    path = "model.layers.0.mlp.up_proj"
    with pytest.raises(InputError, match=r"up_proj must have shape \(24, 4\), got \(24, 5\)"):
        apply_plan(model, fitting, {path: (torch.zeros(24, 5), None)})
    with pytest.raises(InputError, match="a weight came for model.norm2"):
        apply_plan(model, fitting, {"model.norm2": (torch.zeros(4), None)})
    with pytest.raises(InputError, match="a weight came for model.norm,"):
        apply_plan(model, Plan("llama", "auto", {}), {"model.norm": (torch.zeros(40), None)})
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_hidden_features_and_units_go_in_any_order(name):
    model = tiny(name)
    kept = tuple(range(8, model.config.hidden_size))
    units = {s.name: SitePlan(s.units, tuple(range(1, s.units))) for s in sites(model)}
    both, one_by_one = copy.deepcopy(model), copy.deepcopy(model)
    hidden = SitePlan(model.config.hidden_size, kept)
    apply_plan(both, Plan(name, "auto", units, hidden=hidden))
    apply_plan(one_by_one, Plan(name, "auto", units))
    slice_hidden(one_by_one, kept, {})
    assert torch.equal(outputs(both), outputs(one_by_one))
    assert {site.d_out for site in sites(both)} == {len(kept)}
    flops = [site.unit_flops(1) - 4 * site.width * (site.kind == "attn") for site in sites(both)]
    assert flops == [2 * site.unit_weights for site in sites(both)]


def test_a_table_of_as_many_rows_as_the_stream_has_features_stays():
    """MPNet has 32 buckets of relative positions; a hidden size of 32 was refused for them."""
    model = tiny("mpnet", hidden_size=32)
    apply_plan(model, Plan("mpnet", "auto", {}, hidden=SitePlan(32, tuple(range(8, 32)))))
    assert model.encoder.relative_attention_bias.weight.shape == (32, 4)
    assert outputs(model).shape[-1] == 24


def test_a_table_as_wide_as_the_stream_is_refused_by_its_name():
    model = tiny("llama")
    model.model.extra = nn.Embedding(7, model.config.hidden_size)
    with pytest.raises(InputError, match="hidden: model.extra of LlamaFor.* has 40 .* as aside if"):
        hidden_of(model)
