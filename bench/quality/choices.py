"""Judge a model by questions of several choices: ARC-easy, or any file like it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.quality.windows import head_of, hidden_states, log_probabilities
from liar_ext import InputError
from liar_ext.calibration.generated import document_prefix
from liar_ext.models.running import evaluating

BATCH = 16  # questions at a time
PROMPT = "Question: {}\nAnswer:"


@dataclass(frozen=True)
class Question:
    """A question as tokens: what comes before the choices, and each of them."""

    before: list[int]  # with what a text begins with
    choices: list[list[int]]
    lengths: list[int]  # characters of the choices
    answer: int  # index of the right one

    @property
    def size(self) -> int:
        """Tokens in all."""
        return len(self.before) + sum(map(len, self.choices))


def read_questions(path: Path, tokenizer, count: int | None = None) -> list[Question]:
    """Return ``count`` questions, evenly drawn, of a JSON-lines file.

    Each line has ``question``, ``choices``, a list of text, and ``answer``, an index. InputError if
    the file can't be read, or a line is anything else.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"quality: can't read the questions of {path}: {error}") from None
    if count is not None and count < len(lines):
        lines = [lines[index * len(lines) // count] for index in range(count)]
    questions = []
    for line in lines:
        try:
            item = json.loads(line)
            before, choices, answer = item["question"], item["choices"], item["answer"]
            if not (before and all(choices) and answer in range(len(choices))):
                raise ValueError
            questions.append(tokens_of(before, choices, answer, tokenizer))
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"quality: a line of {path} must have question, choices and the index of the "
                f"answer, got {line[:80]}"
            ) from None
    if not questions:
        raise InputError(f"quality: {path} holds no question")
    return questions


def tokens_of(question: str, choices: Sequence[str], answer: int, tokenizer) -> Question:
    """Return a question as lm-eval writes that of ARC, with the choices after a space."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    asked = PROMPT.format(question)
    before = tokens(asked)
    rest = [tokens(f"{asked} {choice}")[len(before) :] for choice in choices]
    return Question(
        [*document_prefix(tokenizer), *before], rest, [len(each) for each in choices], answer
    )


@dataclass(frozen=True)
class Packed:
    """Questions in one batch: all choices of one stand after it in one row, none sees another."""

    ids: Tensor
    positions: Tensor
    allowed: Tensor  # (batch, tokens, tokens): which tokens each may look at
    rows: Tensor  # flat indices of the positions that predict the tokens of choices
    targets: Tensor
    choice: Tensor  # of each target, counted through the batch


def pack(questions: Sequence[Question]) -> Packed:
    """Return the batch of some questions."""
    longest = max(question.size for question in questions)
    ids = torch.zeros(len(questions), longest, dtype=torch.long)
    positions = torch.zeros_like(ids)
    allowed = torch.eye(longest, dtype=torch.bool).repeat(len(questions), 1, 1)
    rows: list[int] = []
    targets: list[int] = []
    choice_of: list[int] = []
    number = 0
    for index, question in enumerate(questions):
        first = at = len(question.before)
        ids[index, :first] = torch.tensor(question.before)
        positions[index, :first] = torch.arange(first)
        allowed[index, :first, :first] = torch.ones(first, first).tril().bool()
        for choice in question.choices:
            end = at + len(choice)
            ids[index, at:end] = torch.tensor(choice, dtype=torch.long)
            positions[index, at:end] = torch.arange(first, first + len(choice))
            allowed[index, at:end, :first] = True
            allowed[index, at:end, at:end] = torch.ones(end - at, end - at).tril().bool()
            predicting = [first - 1, *range(at, end - 1)][: len(choice)]
            rows += [index * longest + place for place in predicting]
            targets += choice
            choice_of += [number] * len(choice)
            number, at = number + 1, end
    return Packed(ids, positions, allowed, *map(torch.tensor, (rows, targets, choice_of)))


class Questions:
    """Questions to judge models by, at least one."""

    def __init__(self, questions: Sequence[Question]) -> None:
        # Of like length together, so that little is padding.
        self.questions = sorted(questions, key=lambda question: question.size)

    @torch.no_grad()
    def log_likelihoods(self, model: nn.Module) -> list[list[float]]:
        """Return ``log q(choice | question)`` of each choice of each question."""
        head, found = head_of(model), []
        with evaluating(model):
            for start in range(0, len(self.questions), BATCH):
                questions = self.questions[start : start + BATCH]
                batch = pack(questions)
                mask = torch.zeros(batch.allowed.shape, dtype=model.dtype)
                mask.masked_fill_(~batch.allowed, torch.finfo(model.dtype).min)
                hidden = hidden_states(
                    model, batch.ids, position_ids=batch.positions, attention_mask=mask[:, None]
                )
                states = hidden.flatten(0, 1)[batch.rows]
                each = torch.cat(
                    [
                        q.gather(1, batch.targets[at : at + len(q), None])[:, 0]
                        for at, q in log_probabilities(head, states)
                    ]
                )
                counts = [len(question.choices) for question in questions]
                sums = torch.zeros(sum(counts), dtype=torch.float64)
                sums.index_add_(0, batch.choice, each.double())
                found += [part.tolist() for part in sums.split(counts)]
        return found

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Return the accuracy, by the likelihood of a choice per character of it."""
        right = 0
        for question, values in zip(self.questions, self.log_likelihoods(model), strict=True):
            per_character = [v / n for v, n in zip(values, question.lengths, strict=True)]
            right += per_character.index(max(per_character)) == question.answer
        return {"accuracy": right / len(self.questions), "questions": len(self.questions)}
