"""What a pruned encoder keeps of the dense one's outputs, against formulas and brute force."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import transformers
from tiny import tiny, tiny_inputs
from torch.nn import functional
from torch.utils.data import DataLoader

import liar_ext
from liar_ext import InputError, encoder_similarity
from liar_ext.measure.embeddings import (
    NEIGHBOURS,
    Evaluator,
    embed,
    pair_quality,
    shared_neighbours,
)
from liar_ext.report.tables import MEASURES


def bert():
    """A tiny BERT without a head."""
    torch.manual_seed(0)
    return transformers.BertModel(tiny("bert").config).eval()


def texts(model, count: int = 14, tokens: int = 9, padded: int = 0):
    """Batches of five; in each the first text ends with padding."""
    batches = []
    for start in range(0, count, 5):
        batch = tiny_inputs(model, batch=min(5, count - start), tokens=tokens, seed=start)
        if padded:
            batch["attention_mask"][0, -padded:] = 0
        batches.append(batch)
    return batches


def other(model):
    """The same model with other weights in each layer."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if name.endswith("output.dense.weight"):
                parameter.mul_(100)
    return changed


def brute_force(x, y, count):
    shared = 0
    for at in range(len(x)):
        near = []
        for each in (x, y):
            cosines = [
                (float(functional.cosine_similarity(each[at], each[to], dim=0)), to)
                for to in range(len(each))
                if to != at
            ]
            near.append({to for _, to in sorted(cosines, reverse=True)[:count]})
        shared += len(near[0] & near[1])
    return shared / (len(x) * count)


@pytest.mark.parametrize(("n", "features", "count"), [(12, 5, 10), (40, 3, 10), (300, 8, 3)])
def test_shared_neighbours_are_those_of_brute_force(n, features, count):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, features, generator=generator, dtype=torch.double)
    y = x + 0.4 * torch.randn(n, features, generator=generator, dtype=torch.double)
    expected = brute_force(x, y, count)
    assert 0 < expected < 1
    assert shared_neighbours(x, y, count) == pytest.approx(expected, abs=1e-12)
    assert shared_neighbours(x, 5 * x, count) == 1.0
    assert shared_neighbours(x, x[:, :1].expand(-1, 2), 1) < 1  # other widths


def test_a_model_is_wholly_like_itself():
    model = bert().train()
    batches = texts(model, padded=2)
    found = encoder_similarity(model, model, batches)
    assert model.training
    facts = {"sequences": 14, "tokens": 14 * 9 - 3 * 2, "seq_len": 9}
    assert found == {"cosine": pytest.approx(1, abs=1e-6), "neighbours": 1.0, **facts}
    evaluator = Evaluator()
    assert evaluator(model, batches) == {"cosine": 1.0, "neighbours": 1.0, **facts}
    assert evaluator(model, batches) == found


def test_cosine_is_that_of_the_mean_over_real_tokens():
    dense = bert().eval()
    pruned = other(dense)
    batches, cosines = texts(dense, padded=3), []
    with torch.no_grad():
        for batch in batches:
            x, y = (model(**batch).last_hidden_state.double() for model in (dense, pruned))
            for a, b, mask in zip(x, y, batch["attention_mask"].bool(), strict=True):
                cosines.append(
                    functional.cosine_similarity(a[mask].mean(0), b[mask].mean(0), dim=0)
                )
    expected = float(torch.stack(cosines).mean())
    assert expected < 0.999
    assert encoder_similarity(pruned, dense, batches)["cosine"] == pytest.approx(expected, rel=1e-5)


def test_few_inputs_have_no_neighbours_to_lose():
    model = bert()
    assert "neighbours" not in encoder_similarity(model, model, texts(model, NEIGHBOURS + 1))
    assert "neighbours" in encoder_similarity(model, model, texts(model, NEIGHBOURS + 2))


def test_other_widths_have_neighbours_alone():
    dense = bert()
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    sizes |= {"hidden_size": 6, "vocab_size": dense.config.vocab_size}
    narrow = transformers.BertModel(transformers.BertConfig(**sizes))
    found = encoder_similarity(narrow, dense, texts(dense))
    assert "cosine" not in found and 0 <= found["neighbours"] <= 1
    with pytest.raises(InputError, match="6 features have no cosine with those of .* 12 inputs"):
        encoder_similarity(narrow, dense, texts(dense, 3))


def test_pooling_is_what_the_folder_says(tmp_path):
    bert().save_pretrained(tmp_path)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(kinds.items())
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    model = type(bert()).from_pretrained(tmp_path)
    batch = tiny_inputs(model, batch=3)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state[:, 0]
    torch.testing.assert_close(embed(model, [batch]), expected)
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode_weightedmean_tokens": true}')
    with pytest.raises(InputError, match="sentence encoder: .* asks for .'weightedmean'"):
        embed(model, [batch])


def test_predictions_of_a_classifier_are_compared():
    config = copy.deepcopy(bert().config)
    config.num_labels = 3
    torch.manual_seed(0)
    dense = transformers.BertForSequenceClassification(config).eval()
    pruned = other(dense)
    with torch.no_grad():
        dense.classifier.weight.normal_()
        pruned.classifier.weight.normal_()
    batches = texts(dense)
    with torch.no_grad():
        p, q = (
            torch.cat([model(**batch).logits.double().log_softmax(-1) for batch in batches])
            for model in (dense, pruned)
        )
    kl = functional.kl_div(q, p, log_target=True, reduction="batchmean")
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    evaluator = Evaluator()
    own, found = evaluator(dense, batches), evaluator(pruned, batches)
    assert found["divergence"] == pytest.approx(float(kl), rel=1e-4)
    assert found["agreement"] == pytest.approx(float(same)) and same < 1
    assert (own["divergence"], own["agreement"]) == (0.0, 1.0)
    assert own["sequences"] == found["sequences"] == 14


@pytest.mark.parametrize("labels", [1, 3])
def test_scores_are_compared_by_their_correlation(labels):
    config = copy.deepcopy(bert().config)
    config.num_labels = labels
    if labels > 1:  # by itself, a lone output is a score
        config.problem_type = "regression"
    torch.manual_seed(0)
    dense = transformers.BertForSequenceClassification(config).eval()
    pruned = other(dense)
    batches = texts(dense)
    with torch.no_grad():
        scores = [torch.cat([m(**each).logits for each in batches]) for m in (dense, pruned)]
    evaluator = Evaluator()
    own, found = evaluator(dense, batches), evaluator(pruned, batches)
    wanted = torch.corrcoef(torch.cat(scores, 1).T).diagonal(labels).mean()
    assert found["correlation"] == pytest.approx(float(wanted), abs=1e-5) and wanted < 0.999
    assert own["correlation"] == pytest.approx(1) and own["sequences"] == 14
    with torch.no_grad():
        pruned.classifier.weight.zero_()  # one score for all, which is no error of the user
    assert evaluator(pruned, batches)["correlation"] == 0
    with pytest.raises(InputError, match="scores correlate if they differ, and those of 1 inputs"):
        Evaluator()(dense, [{name: each[:1] for name, each in batches[0].items()}])


@pytest.mark.parametrize("family", ["vit", "clip", "whisper", "t5", "albert", "mpnet"])
def test_encoders_of_any_inputs_are_judged(family):
    model = tiny(family)
    inputs = tiny_inputs(model, batch=3)
    found = encoder_similarity(model, model, [inputs])
    assert found["sequences"] == 3
    assert found.get("cosine", found.get("agreement")) == pytest.approx(1, abs=1e-6)


def test_a_causal_model_is_judged_by_perplexity():
    model = tiny("llama")
    batch = tiny_inputs(model)
    assert Evaluator()(model, [batch]) == liar_ext.perplexity(model, [batch])


def test_nothing_to_compare_is_refused():
    model = bert()
    with pytest.raises(InputError, match="at least one batch"):
        encoder_similarity(model, model, [])
    classifier = tiny("bert")
    for other in (tiny("roberta"), tiny("bert", num_labels=1), tiny("bert", num_labels=3)):
        with pytest.raises(InputError, match="give the model that was pruned as the dense one"):
            encoder_similarity(classifier, other, [tiny_inputs(classifier)])


def test_what_is_no_number_is_like_nothing():
    x = torch.randn(20, 4)
    assert math.isnan(shared_neighbours(x, x * torch.nan))
    broken = tiny("bert")
    broken.classifier.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match="no output of Bert.*, the dense model, is finite"):
        encoder_similarity(tiny("bert"), broken, [tiny_inputs(broken)])


def test_spearman_shares_the_ranks_of_ties():
    scores = [1.0, 2.0, 2.0, 5.0]
    first = torch.eye(2)[[0, 0, 0, 0]]
    angles = torch.tensor([1.2, 0.3, 0.9, 0.1])
    second = torch.stack([angles.cos(), angles.sin()], 1)
    # Ranks 1, 2.5, 2.5, 4 with 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5.
    found = pair_quality(first, second, ["a", "b", "c", "d"], scores)
    assert found == {"spearman": pytest.approx(4.5 / (4.5 * 5) ** 0.5), "pairs": 4}


def test_recall_counts_own_texts_that_are_nearest():
    first, second = torch.eye(4), torch.eye(4)[[0, 2, 2, 3]]
    found = pair_quality(first, second, ["a", "c", "c", "d"], None)
    # The second text of 1 is far from it; that of 2 is the same as that of 1.
    assert found == {"recall_at_1": 0.75, "pairs": 4}


def test_a_job_reads_inputs_once_that_are_shuffled_anew_every_time():
    dense = bert()
    model, rows = copy.deepcopy(dense), torch.cat([each["input_ids"] for each in texts(dense)])
    loader = DataLoader(rows, batch_size=5, shuffle=True)
    report = liar_ext.prune(model, texts(model, 20), keep=0.5, evaluate_on=loader)
    found = encoder_similarity(model, dense, [rows])
    assert report.evaluation["pruned"]["cosine"] == pytest.approx(found["cosine"])


@pytest.mark.parametrize("head", ["", "classifier"])
def test_a_job_judges_an_encoder(head):
    dense = bert()
    if head:
        dense = transformers.BertForSequenceClassification(dense.config)
    model = copy.deepcopy(dense)
    report = liar_ext.prune(model, texts(model, 20), keep=0.5, evaluate_on=texts(model))
    found = report.evaluation
    assert found["pruned"] == encoder_similarity(model, dense, texts(model))
    assert found["dense"] == Evaluator()(dense, texts(model))
    again = liar_ext.Report.from_dict(report.to_dict()).evaluation
    assert again["pruned"].keys() == found["pruned"].keys()
    for name in ("agreement", "divergence") if head else ("cosine", "neighbours"):
        assert f"\n{name}  " in report.summary()
        assert f"{MEASURES[name]}, 14 inputs of at most 9 tokens" in report.to_markdown()
