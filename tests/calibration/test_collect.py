from __future__ import annotations

import pytest
import torch
from tiny import read_by_consumers, tiny, tiny_inputs

from liar_ext import InputError, Moments, calibrate, sites


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "vit"])
def test_moments_are_those_of_the_consumer_inputs(family):
    model = tiny(family)
    batches = [tiny_inputs(model, batch=3, seed=seed) for seed in range(3)]
    bank = calibrate(model, batches)
    for name, parts in read_by_consumers(model, batches).items():
        x = torch.cat([part.flatten(0, -2) for part in parts]).double()
        gram, total, tokens = bank[name].pooled()
        torch.testing.assert_close(gram, (x.T @ x).tril(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(total, x.sum(0), rtol=1e-5, atol=1e-5)
        assert tokens == len(x)


def test_folds_follow_the_batch_or_alternate():
    model = tiny("llama")
    batch = tiny_inputs(model, batch=6, tokens=5)
    assert all((m.tokens == 15).all() for m in calibrate(model, [batch]).values())
    fold = torch.tensor([0, 1, 1, 1, 1, 1])
    mixed = calibrate(model, [{**batch, "fold": fold}])
    parts = [{key: value[fold == f] for key, value in batch.items()} for f in (0, 1)]
    pure = calibrate(model, [{**p, "fold": fold[fold == f]} for f, p in enumerate(parts)])
    for name, moments in mixed.items():
        assert moments.tokens.tolist() == [5, 25]
        torch.testing.assert_close(moments.gram, pure[name].gram, rtol=1e-4, atol=1e-5)


def test_folds_are_of_sequences_where_the_mlp_gets_flat_tokens():
    model = tiny("opt")
    batch = tiny_inputs(model, batch=4, tokens=6)
    batch["attention_mask"][0, -2:] = 0
    fold = torch.tensor([0, 1, 1, 1])
    moments = calibrate(model, [{**batch, "fold": fold}])
    assert all(m.tokens.tolist() == [4, 18] for m in moments.values())
    alone = calibrate(
        model,
        [
            {**{k: v[:1] for k, v in batch.items()}, "fold": fold[:1]},
            {**{k: v[1:] for k, v in batch.items()}, "fold": fold[1:]},
        ],
    )
    for name, expected in alone.items():
        torch.testing.assert_close(moments[name].gram, expected.gram, rtol=1e-5, atol=1e-5)


def test_padding_does_not_count():
    model = tiny("bert")
    batch = tiny_inputs(model, batch=4, tokens=9)
    batch["attention_mask"][:, 6:] = 0
    short = {key: value[:, :6] for key, value in batch.items()}
    padded, bare = calibrate(model, [batch]), calibrate(model, [short])
    for name, moments in padded.items():
        assert moments.tokens.sum() == 24
        torch.testing.assert_close(moments.gram, bare[name].gram, rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was():
    model = tiny("llama").train()
    model.model.layers[0].eval()  # as of a part that is frozen
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, [tiny_inputs(model)])
    assert [module.training for module in model.modules()] == modes and model.config.use_cache
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    consumers = [model.get_submodule(site.consumer) for site in sites(model)]
    assert not any(consumer._forward_pre_hooks for consumer in consumers)


def test_unusable_batches():
    model = tiny("llama")
    with pytest.raises(InputError, match="each of the 2 folds needs tokens, got 0 sequence"):
        calibrate(model, [])
    with pytest.raises(InputError, match="each of the 2 folds needs tokens, got 1 sequence"):
        calibrate(model, [tiny_inputs(model, batch=1)])
    empty = tiny_inputs(model)
    empty["attention_mask"][:] = 0
    with pytest.raises(InputError, match="batch 1 holds only padding"):
        calibrate(model, [tiny_inputs(model), empty])
    with pytest.raises(InputError, match="fold must be 0 or 1"):
        calibrate(model, [{**tiny_inputs(model), "fold": torch.tensor([0, 2])}])


def test_damaged_weights_are_named():
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(InputError, match=r"NaN or infinity in model.layers.1.mlp.up_proj.weight"):
        calibrate(model, [tiny_inputs(model)])


def test_offloaded_weights_are_named():
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(InputError, match=r"in memory, got model.layers.1.mlp.up_proj.weight on"):
        calibrate(model, [tiny_inputs(model)])


def test_overflowing_rows_are_dropped_and_counted():
    model = tiny("llama", dtype=torch.float16)
    model.model.layers[2].mlp.up_proj.weight.data *= 12000
    bank = calibrate(model, [tiny_inputs(model, batch=4)])
    assert bank["2.mlp"].dropped_rows > 0
    assert torch.isfinite(bank["2.mlp"].gram).all()


def test_sums_that_overflow_are_named(monkeypatch):
    update = Moments.update

    def overflow(self, x, fold, weight=None):
        update(self, x, fold, weight)
        if x.shape[-1] == 24:
            self.gram[fold, 3, 3] = torch.inf

    monkeypatch.setattr(Moments, "update", overflow)
    model = tiny("llama")
    with pytest.raises(InputError, match=r"must be finite, .* at 0\.mlp"):
        calibrate(model, [tiny_inputs(model)])
