"""A job in one pass against docs/method.md, written a second time in float64, at every site."""

from __future__ import annotations

import copy

import pytest
import torch
from test_layerwise import batches
from tiny import read_by_consumers, tiny

from liar_ext import prune, sites
from liar_ext.models.sites import get_consumer_bias, get_consumer_weight


def tokens_of(model, site, data):
    """Return what the consumer reads by fold, without padding."""
    folds = ([], [])
    for batch, x in zip(data, read_by_consumers(model, data)[site.name], strict=True):
        mask = batch["attention_mask"].bool()
        x = x.reshape(*mask.shape, -1)
        for fold in (0, 1):
            folds[fold].append(x[fold::2][mask[fold::2]])
    return [torch.cat(each) for each in folds]


def fit(weight, bias, x, kept, damp):
    """Return W' and b', affine where there is a bias."""
    gone = [at for at in range(weight.shape[1]) if at not in set(kept)]
    mean = torch.zeros_like(x[0]) if bias is None else x.mean(0)
    left = (x - mean)[:, kept]
    gram = left.T @ left
    gram += damp * gram.diagonal().mean() * torch.eye(len(kept), dtype=gram.dtype)
    pull = torch.linalg.solve(gram, left.T @ (x - mean)[:, gone] @ weight[:, gone].T).T
    new = weight[:, kept] + (0 if damp == float("inf") else pull)
    return new, 0 if bias is None else bias + weight @ mean - new @ mean[kept]


@pytest.mark.parametrize(("name", "damp"), [("llama", "auto"), ("opt", "auto"), ("opt", 0.03)])
@torch.no_grad()
def test_a_job_in_one_pass_is_what_the_method_says(name, damp):
    model = tiny(name, dtype=torch.float64)
    dense, data = copy.deepcopy(model), batches(model)
    assert not all(batch["attention_mask"].all() for batch in data)
    report = prune(model, data, 0.6, schedule="one-pass", allocation="uniform", damp=damp)
    rows = {row.name: row for row in report.sites}
    assert any(0 < row.damp < float("inf") for row in report.sites)
    assert damp == "auto" or {row.damp for row in report.sites} == {damp}
    for site, after in zip(sites(dense), sites(model), strict=True):
        weight, bias = get_consumer_weight(dense, site), get_consumer_bias(dense, site)
        kept, row = site.features(report.plan.sites[site.name].kept), rows[site.name]
        folds = tokens_of(dense, site, data)
        new, new_bias = fit(weight, bias, torch.cat(folds), kept.tolist(), row.damp)
        torch.testing.assert_close(get_consumer_weight(model, after), new, rtol=1e-6, atol=1e-9)
        if bias is not None:
            torch.testing.assert_close(get_consumer_bias(model, after), new_bias)
        lost, whole = 0.0, sum(float((x @ weight.T).square().sum()) for x in folds)
        for here, other in (folds, folds[::-1]):
            fitted, offset = fit(weight, bias, here, kept.tolist(), row.damp)
            wanted = other @ weight.T + (0 if bias is None else bias)
            lost += float((other[:, kept] @ fitted.T + offset - wanted).square().sum())
        assert row.holdout_error == pytest.approx(lost / whole, rel=1e-6), site.name
