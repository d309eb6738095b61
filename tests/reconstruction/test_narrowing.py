"""What readers get back of the hidden features that they lose."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from covers import cover
from journeys import double_features, wanting
from tiny import NARROWABLE, batches, outputs, runs_at, tiny, tiny_inputs
from torch import nn

from liar_ext import Plan, narrow
from liar_ext.models.residual_stream import hidden_of, stream_of
from liar_ext.models.slicing import apply_plan
from liar_ext.reconstruction import hidden_size


def narrowed(model, data, keep, **settings):
    copied = copy.deepcopy(model)
    done = narrow(model, data, keep, **settings)
    apply_plan(copied, Plan(model.config.model_type, "auto", {}, hidden=done.kept), done.weights)
    return copied, done


@cover(1, mode=["none", "auto", "linear", "affine"], name=NARROWABLE)
def test_keeping_everything_is_the_identity(name, mode):
    model = tiny(name)
    same, done = narrowed(model, batches(model), 1.0, mode=mode)
    torch.testing.assert_close(outputs(same), outputs(model), rtol=1e-5, atol=1e-5)
    assert all(row.error < 1e-10 and row.units_after == row.units_before for row in done.rows)


@pytest.mark.parametrize("name", [name for name in NARROWABLE if name not in ("llama", "smollm3")])
def test_features_that_others_repeat_are_given_back(name, monkeypatch):
    """With half the features a copy of the other half every statistic stays, and readers add up."""
    size = 40 if name == "mpnet" else 32
    untied = {"tie_word_embeddings": False} if name in ("opt", "gpt2") else {}
    model = tiny(name, dtype=torch.float64, hidden_size=size, **untied)
    if name == "roberta":
        model = model.roberta  # a head that is tied to the embedding cannot add up
    half = double_features(model)
    wanting(monkeypatch, range(half))
    data = batches(model)
    small, done = narrowed(model, data, 0.5, damp=1e-12)
    held_out = tiny_inputs(model, batch=16, tokens=16, seed=99)
    wanted = outputs(model, held_out)
    whole = wanted.shape[-1] != 2 * half
    wanted = wanted if whole else wanted[..., :half]
    torch.testing.assert_close(outputs(small, held_out), wanted, rtol=1e-4, atol=1e-4)
    read = [row for row in done.rows if "cholesky" in row.path]
    assert read and all(row.holdout_error < 1e-7 for row in read)
    dropped, _ = narrowed(model, data, 0.5, mode="none")
    if whole:
        assert (outputs(dropped, held_out) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_scales_of_norms_over_features_that_are_never_written(name, monkeypatch):
    """Also of norms over what a branch writes; embeddings that are scaled are as they were."""
    model = tiny(name, dtype=torch.float64)
    gone = [3, 8, 13, 18, 23, 28, 33, 38]
    wanting(monkeypatch, [i for i in range(40) if i not in gone])
    found = hidden_of(model)
    with torch.no_grad():
        for path in found.writers:
            layer = model.get_submodule(path)
            layer.weight[(slice(None), gone) if isinstance(layer, nn.Embedding) else gone] = 0
        for path in found.norms:
            model.get_submodule(path).variance_epsilon = 0.0
            model.get_submodule(path).eps = 0.0
    small, done = narrowed(model, batches(model), 0.8)
    added = stream_of(model).norm_offset
    for path in found.norms:
        before, after = model.get_submodule(path).weight, small.get_submodule(path).weight
        scale = (after + added) / (before[list(done.kept.kept)] + added)
        # What the table of Gemma takes over, the norm before its tied head gives back.
        same = name == "gemma3_text" and path == "model.norm"
        wanted = torch.full_like(scale, 1.0 if same else (40 / 32) ** 0.5)
        torch.testing.assert_close(scale, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(outputs(small), outputs(model), rtol=1e-4, atol=1e-4)


def tokens_of(model, data, path):
    """Return what a norm gets and gives, per fold."""
    runs = runs_at(model, [path], data)[path]
    gets, gives = (torch.cat(each) for each in zip(*((*x, y) for x, y in runs), strict=True))
    # Sequences alternate between the folds.
    return [(gets[f::2].flatten(0, 1), gives[f::2].flatten(0, 1)) for f in range(2)]


@pytest.mark.parametrize(
    ("name", "path", "readers"),
    [
        ("mistral", "model.layers.1.post_attention_layernorm", ["gate_proj", "up_proj"]),
        ("qwen2", "model.layers.2.input_layernorm", ["q_proj", "k_proj", "v_proj"]),
        ("mistral", "model.norm", ["lm_head"]),
        ("bert", "bert.encoder.layer.0.attention.output.LayerNorm", ["intermediate.dense"]),
        ("bert", "bert.encoder.layer.0.output.LayerNorm", ["query", "key", "value"]),
        ("mpnet", "encoder.layer.1.attention.LayerNorm", ["intermediate.dense"]),
        ("distilbert", "transformer.layer.0.sa_layer_norm", ["ffn.lin1"]),
        ("opt", "model.decoder.layers.1.self_attn_layer_norm", ["q_proj", "k_proj", "v_proj"]),
        ("gpt_neox", "gpt_neox.layers.1.post_attention_layernorm", ["dense_h_to_4h"]),
        ("nemotron", "model.layers.1.post_attention_layernorm", ["up_proj"]),
        ("falcon", "transformer.h.1.input_layernorm", ["query_key_value", "dense_h_to_4h"]),
    ],
)
@torch.no_grad()
def test_the_weights_and_errors_are_those_of_brute_force(name, path, readers):
    """Solve min |V x' + c − (W x + b)|² with damping towards W_K, token by token, and judge it."""
    damp = 0.01
    model = tiny(name, dtype=torch.float64)
    data = batches(model)
    done = narrow(model, data, 0.8, damp=damp)
    kept = list(done.kept.kept)
    source = next(s for s in hidden_of(model).sources if s.module == path)
    assert all(p.endswith(reader) for p, reader in zip(source.readers, readers, strict=True))
    layers = [model.get_submodule(p) for p in source.readers]
    weight = torch.cat([layer.weight for layer in layers])
    biased = layers[0].bias is not None
    bias = torch.cat([layer.bias for layer in layers]) if biased else 0.0
    gamma, beta = done.weights[path]
    norm = model.get_submodule(path)

    def narrow_norm(h):
        h = h[:, kept]
        if isinstance(norm, nn.LayerNorm):
            scale = gamma + 1 if type(norm).__name__.endswith("1P") else gamma
            return nn.functional.layer_norm(h, (len(kept),), scale, beta, norm.eps)
        single = h.float()  # as the norms of llama do
        scale = (single.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
        return gamma * (single * scale).double()

    def fit(x, y):
        mean, goal = (x.mean(0), y.mean(0)) if biased else (torch.zeros(()), torch.zeros(()))
        x, y = x - mean, y - goal
        gram = x.T @ x
        ridge = damp * gram.diagonal().mean() * torch.eye(len(kept), dtype=x.dtype)
        start = weight[:, kept]
        new = start + torch.linalg.solve(gram + ridge, x.T @ (y - x @ start.T)).T
        return new, goal - mean @ new.T if biased else torch.zeros(())

    folds = [(narrow_norm(h), x @ weight.T + bias) for h, x in tokens_of(model, data, path)]
    energy = sum((x @ weight.T).square().sum() for _, x in tokens_of(model, data, path))
    held_out = 0.0
    for ours, (x, y) in zip(folds, reversed(folds), strict=True):
        new, offset = fit(*ours)
        held_out += (x @ new.T + offset - y).square().sum()
    x, y = (torch.cat(parts) for parts in zip(*folds, strict=True))
    new, offset = fit(x, y)
    row = next(row for row in done.rows if row.name == path)
    assert row.holdout_error == pytest.approx(float(held_out / energy), rel=1e-4)
    error = (x @ new.T + offset - y).square().sum() / energy
    assert row.error == pytest.approx(float(error), rel=1e-4)
    solved = torch.cat([done.weights[p][0] for p in source.readers])
    torch.testing.assert_close(solved, new, rtol=1e-4, atol=1e-5)
    if biased:
        solved = torch.cat([done.weights[p][1] for p in source.readers])
        torch.testing.assert_close(solved, offset, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
@torch.no_grad()
def test_features_stay_by_their_share_of_the_energy(name):
    model = tiny(name, dtype=torch.float64)
    data = batches(model)
    shares = []
    for path in hidden_of(model).norms:
        h = torch.cat([h for h, _ in tokens_of(model, data, path)])
        shares.append(h.square().sum(0) / h.square().sum())
    best = sum(shares).topk(24).indices.sort().values.tolist()
    assert list(narrow(model, data, 24 / hidden_of(model).size).kept.kept) == best


@pytest.mark.parametrize("name", NARROWABLE)
def test_reconstruction_is_nearer_to_the_dense_model_than_slicing(name):
    model = tiny(name)
    data = batches(model, count=12)
    held_out = tiny_inputs(model, batch=16, tokens=16, seed=99)
    wanted, distance = outputs(model, held_out), {}
    for mode in ("none", "auto"):
        small, done = narrowed(model, data, 0.8, mode=mode)
        got = outputs(small, held_out)
        kept = range(wanted.shape[-1]) if got.shape == wanted.shape else done.kept.kept
        distance[mode] = float((got - wanted[..., list(kept)]).square().mean())
    assert distance["auto"] < distance["none"]


@pytest.mark.parametrize("mode", ["none", "bias", "linear", "affine"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_every_mode(name, mode):
    model = tiny(name)
    small, done = narrowed(model, batches(model), 0.8, mode=mode)
    assert torch.isfinite(outputs(small)).all()
    assert small.state_dict().keys() == model.state_dict().keys()
    expected = mode if name == "bert" else {"affine": "linear", "bias": "none"}.get(mode, mode)
    read = [row for row in done.rows if row.path.split(",")[0] not in ("norm only", "sliced")]
    assert {row.path.split(",")[0] for row in read} == {expected}


def test_infinite_damp_slices_readers():
    model = tiny("mistral")
    done = narrow(model, batches(model), 0.8, damp=math.inf)
    kept = list(done.kept.kept)
    path = "model.layers.0.mlp.up_proj"
    dense = model.get_submodule(path).weight
    assert torch.equal(done.weights[path][0], dense[:, kept])


def test_the_first_token_alone_counts_for_what_reads_it_alone():
    """The pooler of BERT reads token 0: what stands further on must not change its solution."""
    model = tiny("bert")
    row = {}
    for tokens in (1, 5):
        data = [tiny_inputs(model, batch=8, tokens=tokens, seed=seed) for seed in range(6)]
        seen = {}
        collect = hidden_size.collect

        def spy(*args, collect=collect, seen=seen, **settings):
            bank = collect(*args, **settings)
            seen["bank"] = dict(bank)  # which lets go of what is solved
            return bank

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hidden_size, "collect", spy)
            narrow(model, data, 0.8)
        row[tokens] = seen["bank"]
    first = "bert.encoder.layer.2.output.LayerNorm[0]"
    for tokens, bank in row.items():
        assert bank[first].tokens.sum() == 48 and bank["classifier"].tokens.sum() == 48
        assert bank["bert.encoder.layer.2.output.LayerNorm"].tokens.sum() == 48 * tokens


def test_padding_does_not_count():
    model = tiny("bert")
    data = batches(model)
    padded = []
    for batch in data:
        filler = torch.full((8, 5), 7)
        padded.append(
            {
                "input_ids": torch.cat([batch["input_ids"], filler], 1),
                "attention_mask": torch.cat([batch["attention_mask"], 0 * filler], 1),
            }
        )
    plain, masked = (narrow(model, each, 0.8) for each in (data, padded))
    assert plain.kept == masked.kept
    for path, (weight, _) in plain.weights.items():
        torch.testing.assert_close(masked.weights[path][0], weight, rtol=1e-3, atol=1e-4)
