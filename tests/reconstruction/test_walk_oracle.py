"""A walk over tiny models against docs/method.md, written down a second time in float64.

The second version knows nothing of the first: it slices by zeroing, reads activations by plain
hooks, keeps every token, and fits by least squares on them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from covers import cover
from test_layerwise import batches, plan_for
from tiny import tiny

from liar_ext import prune, reconstruct_layerwise, sites

DAMP = 0.01
# What a layer's output is compared in: the input of the norm after the sum or before it, or the
# stream. Tokens count relative to it where there is a norm.
NORMS = {
    "bert": {"attn": "attention.output.LayerNorm", "mlp": "output.LayerNorm"},
    "roberta": {"attn": "attention.output.LayerNorm", "mlp": "output.LayerNorm"},
    "distilbert": {"attn": "sa_layer_norm", "mlp": "output_layer_norm"},
    "mpnet": {"attn": "attention.LayerNorm", "mlp": "output.LayerNorm"},
    "gemma3_text": {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
    "exaone4": {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
}
ROOT_MEAN_SQUARE = ("gemma3_text", "exaone4")  # of which norms are, the others subtract a mean
PLAIN = ["llama", "opt", "gpt_neox", "falcon_new"]  # the last adds in place


def with_outliers(model):
    """Let the MLPs give one feature that is far larger than all others, for a few tokens."""
    for site in sites(model):
        if site.kind == "mlp":
            weight = model.get_submodule(site.consumer).weight
            weight.data[0] *= 30
    return model


def seen_at(model, site, batch):
    """Return the consumer's input and output, and what reaches the stream, of one batch."""
    found = {}
    path = site.path
    norm = NORMS.get(model.config.model_type, {}).get(site.kind)

    def consumer(module, args, output):
        found["x"], found["y"] = args[0], output

    def before(module, args, kwargs):
        found["before"] = args[0] if args else kwargs["hidden_states"]

    def after(module, args, output):
        found["after"] = output[0] if isinstance(output, tuple) else output

    block = model.get_submodule(path)
    hooks = [
        model.get_submodule(site.consumer).register_forward_hook(consumer),
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after),
    ]
    if norm:
        take = lambda module, args: found.update(sum=args[0])  # noqa: E731
        hooks.append(model.get_submodule(f"{path}.{norm}").register_forward_pre_hook(take))
    getattr(model, "base_model", model)(**batch)
    for hook in hooks:
        hook.remove()
    shape = found["after"].shape
    plain = found["after"] if site.kind == "mlp" else found["before"] + found["y"].view(shape)
    return found["x"].flatten(0, -2), (found["sum"] if norm else plain).reshape(-1, shape[-1])


def solve(weight, bias, folds, kept, damp, affine):
    """Return W', b' of the share with the least error on the fold that was not fitted; and it."""
    gone = [at for at in range(weight.shape[1]) if at not in set(kept)]

    def fit(x, r, w, share):
        w = w[:, None]
        mean = (w * x).sum(0) / w.sum() if affine else torch.zeros_like(x[0])
        offset = share * (w * r).sum(0) / w.sum() if affine else torch.zeros_like(r[0])
        x, r = x - mean, share * r - offset
        wanted = x[:, gone] @ weight[:, gone].T + r
        gram = x[:, kept].T @ (w * x[:, kept])
        ridge = damp * gram.diagonal().mean() * torch.eye(len(kept), dtype=gram.dtype)
        new = weight[:, kept] + torch.linalg.solve(gram + ridge, x[:, kept].T @ (w * wanted)).T
        return new, bias + weight @ mean - new @ mean[kept] + offset

    def error(new, x, r, w):
        left = x @ weight.T + bias + r - (x[:, kept] @ new[0].T + new[1])
        return float((w * left.square().sum(1)).sum())

    def held_out(share):
        return sum(error(fit(*folds[at], share), *folds[1 - at]) for at in (0, 1))

    low, middle, high = (held_out(share) for share in (0.0, 0.5, 1.0))
    curvature, slope = 2 * (low - 2 * middle + high), 4 * middle - 3 * low - high
    share = min(max(-slope / (2 * curvature), 0.0), 1.0) if curvature > 1e-12 * high else 0.0
    energy = sum(float((w * (x @ weight.T).square().sum(1)).sum()) for x, _, w in folds)
    every = (torch.cat(each) for each in zip(*folds, strict=True))
    return *fit(*every, share), held_out(share) / energy


@torch.no_grad()
def walked(model, data, plan):
    """Return weights and held-out errors of METHOD's section on layerwise reconstruction."""
    pruned, found = copy.deepcopy(model), {}
    for site in sites(model):
        rows = {0: [], 1: []}
        for batch in data:
            mask = batch["attention_mask"].flatten().bool()
            (_, dense), (x, reached) = (seen_at(each, site, batch) for each in (model, pruned))
            weight = mask.double()
            if model.config.model_type in NORMS:
                whole = model.config.model_type in ROOT_MEAN_SQUARE
                mean = 0 if whole else reached.mean(1, keepdim=True)
                weight = weight / ((reached - mean).square().mean(1) + 1e-6)
            fold = (torch.arange(len(batch["input_ids"])) % 2).repeat_interleave(
                batch["input_ids"].shape[1]
            )
            for each in (0, 1):
                here = (fold == each) & mask
                rows[each].append((x[here], (dense - reached)[here], weight[here]))
        folds = [tuple(map(torch.cat, zip(*rows[each], strict=True))) for each in (0, 1)]
        consumer = pruned.get_submodule(site.consumer)
        bias = consumer.bias
        start = torch.zeros(site.d_out, dtype=torch.float64) if bias is None else bias.clone()
        kept = site.features(plan.sites[site.name].kept).tolist()
        affine = bias is not None
        new, new_bias, error = solve(consumer.weight.data, start, folds, kept, DAMP, affine)
        found[site.name] = new, new_bias if affine else None, error
        consumer.weight.data = torch.zeros_like(consumer.weight).index_copy(
            1, torch.tensor(kept), new
        )
        if bias is not None:
            consumer.bias.data = new_bias
    return found


@cover(1, outliers=[False, True], name=[*NORMS, *PLAIN])
@torch.no_grad()
def test_a_walk_is_what_the_method_says(name, outliers):
    model = tiny(name, dtype=torch.float64)
    model = with_outliers(model) if outliers else model
    data = batches(model)
    plan = plan_for(model, data)
    weights, rows = reconstruct_layerwise(model, data, plan, damp=DAMP)
    errors = {row.name: row.holdout_error for row in rows}
    for site, (weight, bias, error) in walked(model, data, plan).items():
        assert errors[site] == pytest.approx(error, rel=1e-6), site
        assert torch.allclose(weights[site][0], weight, rtol=1e-6, atol=1e-8), site
        if bias is not None:
            assert torch.allclose(weights[site][1], bias, rtol=1e-6, atol=1e-8), site


@pytest.mark.parametrize("name", [*NORMS, *PLAIN, "gemma4_text_whole"])
@torch.no_grad()
def test_a_walk_that_removes_nothing_is_the_identity(name):
    model = with_outliers(tiny(name, dtype=torch.float64))
    for buffer in model.buffers():
        buffer.mul_(0.7 if buffer.shape == (1,) else 1)  # what Gemma 4 scales each block by
    data = batches(model)
    before = copy.deepcopy(model.state_dict())
    prune(model, data, keep=1.0, schedule="layerwise")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
