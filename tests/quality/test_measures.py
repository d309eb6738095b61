"""What models are judged by, beside closed forms and plain loops on tiny models."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from tiny import VOCAB, tiny
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from bench.quality import choices, continuation, windows
from bench.quality.choices import Question, Questions, read_questions, tokens_of
from bench.quality.continuation import Continuations, greedy, settled
from bench.quality.windows import HeldOut, head_of
from liar_ext.measure.evaluation import perplexity
from liar_ext.system.errors import InputError


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def changed(model: torch.nn.Module, by: float = 0.02) -> torch.nn.Module:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return other


def text(count: int = 3, length: int = 17) -> HeldOut:
    return HeldOut(list(tokens(count, length)), ["ab" * (length - 1)] * count)


@pytest.mark.parametrize("rows", [3, 64])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_windows_beside_plain_logits(name, rows, monkeypatch):
    monkeypatch.setattr(windows, "ROWS", rows * windows.KL_EVERY)
    dense, held_out = tiny(name), text()
    other = changed(dense)
    assert abs(held_out.judge(dense)["kl"]) < 1e-6  # rounding, of fewer rows at a time
    found = held_out.judge(other)
    ids = torch.stack(held_out.windows)
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (dense, other))
    loss = float(cross_entropy(q.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    assert math.isclose(found["perplexity"], math.exp(loss / 48), rel_tol=1e-5)
    assert math.isclose(found["perplexity"], perplexity(other, [ids])["perplexity"], rel_tol=1e-5)
    assert math.isclose(found["bits_per_byte"], loss / math.log(2) / (48 * 2), rel_tol=1e-5)
    divergences = (p.exp() * (p - q)).sum(-1)[:, :: windows.KL_EVERY]
    assert math.isclose(found["kl"], float(divergences.mean()), rel_tol=1e-3) and found["kl"] > 0


def test_bits_per_byte_of_a_model_that_knows_nothing():
    """Uniform over the vocabulary: log2 of its size per token, here of two bytes."""
    model = tiny("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    found = text().judge(model)
    assert math.isclose(found["perplexity"], VOCAB, rel_tol=1e-6)
    assert math.isclose(found["bits_per_byte"], math.log2(VOCAB) / 2, rel_tol=1e-6)


def test_bytes_are_counted_and_not_characters():
    assert HeldOut(list(tokens(1, 3)), ["äö"]).bytes == 4


def test_a_model_that_changes_its_logits_is_refused():
    model = tiny("gemma3_text", final_logit_softcapping=0.01)
    with pytest.raises(InputError, match="does more with its logits than its head"):
        head_of(model)


def plain_greedy(model: torch.nn.Module, prompts: torch.Tensor, steps: int) -> torch.Tensor:
    rows = prompts
    for _ in range(steps):
        with torch.no_grad():
            rows = torch.cat([rows, model(rows).logits[:, -1:].argmax(-1)], 1)
    return rows


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_continuations_beside_a_plain_loop(name, monkeypatch):
    monkeypatch.setattr(continuation, "BATCH", 4)
    dense, prompts = tiny(name).eval(), tokens(10, 6)
    judge = Continuations(prompts, dense, steps=8)
    expected = plain_greedy(dense, prompts, 8)
    assert torch.equal(judge.rows, expected)
    assert judge.judge(dense) == {"equal_tokens": 8.0, "equal_share": 1.0, "kl": 0.0}
    other = changed(dense, 0.03).eval()
    found = judge.judge(other)
    same = (plain_greedy(other, prompts, 8) == expected)[:, 6:]
    equal = [row.index(False) if False in row else 8 for row in same.tolist()]
    assert 0 < sum(equal) < 80  # or this would show nothing
    assert found["equal_tokens"] == sum(equal) / 10
    assert found["equal_share"] == sum(equal) / 80
    with torch.no_grad():
        p, q = (m(expected).logits[:, 5:-1].double().log_softmax(-1) for m in (dense, other))
    assert math.isclose(found["kl"], float((p.exp() * (p - q)).sum(-1).mean()), rel_tol=1e-3)


def test_rows_are_settled_from_any_start():
    model, prompts = tiny("llama").eval(), tokens(3, 5)
    rows = torch.cat([prompts, tokens(3, 6, seed=1)], 1)
    assert torch.equal(settled(model, rows, 5), greedy(model, prompts, 6))


def questions() -> list[Question]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for index in range(9):
        sizes = torch.randint(1, 6, (2 + index % 3,), generator=generator).tolist()
        parts = [tokens(size, seed=index * 10 + i).tolist() for i, size in enumerate(sizes)]
        found.append(Question(tokens(4 + index, seed=index).tolist(), parts, sizes, 0))
    return found


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen2"])
def test_choices_in_one_row_do_not_see_one_another(name, monkeypatch):
    monkeypatch.setattr(choices, "BATCH", 4)
    model, judge = tiny(name).eval(), Questions(questions())
    found = judge.log_likelihoods(model)
    right = 0
    for question, values in zip(judge.questions, found, strict=True):
        expected = []
        for choice in question.choices:
            ids = torch.tensor([[*question.before, *choice]])
            with torch.no_grad():
                q = model(ids).logits[0].double().log_softmax(-1)
            at = len(question.before) - 1
            expected.append(sum(float(q[at + i, token]) for i, token in enumerate(choice)))
        assert values == pytest.approx(expected, abs=1e-4)
        per_character = [e / n for e, n in zip(expected, question.lengths, strict=True)]
        right += per_character.index(max(per_character)) == 0
    assert judge.judge(model) == {"accuracy": right / 9, "questions": 9}


def test_questions_are_drawn_evenly_and_read(tokenizer, tmp_path):
    path = tmp_path / "q.jsonl"
    lines = [
        {"question": f"what is {n}", "choices": ["a b", "c"], "answer": n % 2} for n in range(10)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = read_questions(path, tokenizer, 5)
    assert [tokenizer.decode(each.before).replace(" ", "")[-9] for each in found] != []
    assert len(found) == 5 and [each.answer for each in found] == [0, 0, 0, 0, 0]
    assert [each.lengths for each in found] == [[3, 1]] * 5
    assert len(read_questions(path, tokenizer)) == 10


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[1]",
        '{"question": "a", "choices": ["b"], "answer": 1}',
        '{"question": "a", "choices": ["b", "c"], "answer": -1}',
        '{"question": "a", "choices": ["b", ""], "answer": 0}',
    ],
)
def test_damaged_questions_are_refused(line, tokenizer, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match="must have question, choices and the index"):
        read_questions(path, tokenizer)


def test_a_question_begins_as_the_tokenizer_begins_a_text(tokenizer):
    from tokenizers.processors import TemplateProcessing

    core = copy.deepcopy(tokenizer.backend_tokenizer)
    core.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    with_bos = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="[BOS]")
    plain, begun = (tokens_of("why", ["x", "y z"], 1, each) for each in (tokenizer, with_bos))
    assert begun.before == [1, *plain.before] and begun.choices == plain.choices
