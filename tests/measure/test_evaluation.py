"""Perplexity and divergence against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import CAUSAL, TINY, tiny, tiny_inputs
from torch import nn

from liar_ext import InputError, kl_divergence
from liar_ext.measure.evaluation import perplexity


def by_hand(model, ids, real) -> tuple[float, int]:
    """Sum −log p of each token that follows a real one, row by row and token by token."""
    loss, tokens = 0.0, 0
    with torch.no_grad():
        log_p = model(input_ids=ids, attention_mask=real.long()).logits.double().log_softmax(-1)
    for row in range(len(ids)):
        for at in range(1, ids.shape[1]):
            if real[row, at] and real[row, at - 1]:
                loss -= float(log_p[row, at - 1, ids[row, at]])
                tokens += 1
    return loss, tokens


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_perplexity_is_that_of_the_formula(family, side):
    model = tiny(family).train()
    ids = tiny_inputs(model, batch=3, tokens=11)["input_ids"]
    real = torch.ones_like(ids).bool()
    if side != "none":
        real[1, slice(0, 4) if side == "left" else slice(-4, None)] = False
    got = perplexity(model, [{"input_ids": ids, "attention_mask": real.long()}])
    assert model.training
    loss, tokens = by_hand(model.eval(), ids, real)
    assert got["tokens"] == tokens == 30 - (0 if side == "none" else 4)
    assert got["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    assert (got["sequences"], got["seq_len"]) == (3, 11)


def test_the_first_token_after_padding_is_not_predicted():
    """Its loss alone would change the mean: it is predicted from padding."""
    model = tiny("llama")
    ids = tiny_inputs(model, batch=1, tokens=9)["input_ids"]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    with pytest.raises(InputError, match="has token 900, and the tokens of"):
        perplexity(model, [torch.full_like(ids, 900)])
    bare = perplexity(model, [ids])
    assert perplexity(model, [{"input_ids": padded, "attention_mask": mask}]) == {
        **bare,
        "perplexity": pytest.approx(bare["perplexity"], rel=1e-5),
        "seq_len": 12,
    }


def test_a_batch_needs_no_mask():
    model = tiny("llama")
    batch = tiny_inputs(model)
    whole = perplexity(model, [batch])
    assert perplexity(model, [batch["input_ids"]]) == whole
    assert perplexity(model, [{**batch, "labels": batch["input_ids"]}]) == whole


@torch.no_grad()
def test_a_mask_that_says_who_sees_whom_is_kept():
    model, ids = tiny("llama"), tiny_inputs(tiny("llama"), batch=2, tokens=9)["input_ids"]
    alone = torch.eye(9, dtype=torch.bool).expand(2, 1, 9, 9)
    places = torch.arange(9).repeat(2)[:, None]
    logits = model(ids.reshape(-1, 1), position_ids=places).logits.view(2, 9, -1)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    found = perplexity(model, [{"input_ids": ids, "attention_mask": alone}])
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize("family", TINY)
def test_only_causal_models_have_a_perplexity(family):
    model = tiny(family)
    if family in CAUSAL:
        assert perplexity(model, [tiny_inputs(model)])["perplexity"] > 1
        return
    with pytest.raises(InputError, match="perplexity: needs a causal language model, got"):
        perplexity(model, [tiny_inputs(model)])


def test_a_bert_with_a_language_head_sees_what_it_is_to_predict():
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 61}
    ids = torch.randint(3, 60, (2, 7))
    with pytest.raises(InputError, match="got BertLMHeadModel, which sees the tokens"):
        perplexity(BertLMHeadModel(BertConfig(intermediate_size=8, **sizes)), [ids])
    decoder = BertLMHeadModel(BertConfig(intermediate_size=8, is_decoder=True, **sizes))
    assert perplexity(decoder, [ids])["tokens"] == 12


def test_a_perplexity_past_all_numbers_is_infinite():
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity(model, [tiny_inputs(model)])["perplexity"] == math.inf
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert math.isnan(perplexity(model, [tiny_inputs(model)])["perplexity"])


def test_nothing_to_predict_is_refused():
    model = tiny("llama")
    for batches in ([], [torch.tensor([[5]])]):
        with pytest.raises(InputError, match="no token to predict"):
            perplexity(model, batches)
    with pytest.raises(InputError, match="each batch needs input_ids"):
        perplexity(model, [{"inputs_embeds": torch.ones(2, 5, 40)}])
    with pytest.raises(InputError, match="at least one batch"):
        kl_divergence(model, model, [])


def test_divergence_is_the_mean_over_all_tokens_of_all_batches():
    dense, pruned = tiny("llama"), tiny("llama", seed=1)
    data = [tiny_inputs(dense, batch=rows, seed=rows) for rows in (1, 3)]
    data[1]["attention_mask"][0, -4:] = 0
    total, tokens = 0.0, 0
    for batch in data:
        with torch.no_grad():
            p, q = (model(**batch).logits.double().log_softmax(-1) for model in (dense, pruned))
        each = nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        real = batch["attention_mask"].bool()
        total, tokens = total + float(each[real].sum()), tokens + int(real.sum())
    assert kl_divergence(pruned, dense, data) == pytest.approx(total / tokens, rel=1e-4)
    assert kl_divergence(dense, dense, data) == 0.0
