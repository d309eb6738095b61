"""All measures of a model, beside the dense one."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bench.quality.choices import Questions, read_questions
from bench.quality.continuation import Continuations
from bench.quality.texts import Texts, digest_of
from bench.quality.windows import HeldOut


@dataclass
class Judges:
    """What models with one tokenizer are judged by."""

    windows: dict[str, HeldOut]  # by text
    questions: Questions | None
    prompts: torch.Tensor  # to continue
    dtype: torch.dtype  # that models are judged in
    continuations: Continuations | None = None
    dense: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, options: argparse.Namespace, texts: Texts, tokenizer) -> Judges:
        """Return the judges that the options ask for."""
        questions = None
        if options.questions is not None:
            questions = Questions(
                read_questions(options.questions, tokenizer, options.question_count)
            )
        return cls(
            texts.windows(tokenizer, seq_len=options.seq_len, samples=options.eval_samples),
            questions,
            texts.prompts(tokenizer, options.prompts),
            getattr(torch, options.eval_dtype),
        )

    @property
    def digest(self) -> str:
        """A digest of all that models are judged by."""
        questions = [] if self.questions is None else self.questions.questions
        return digest_of(
            str(self.dtype),
            [[name, len(text.windows)] for name, text in self.windows.items()],
            *[ids for text in self.windows.values() for ids in text.windows],
            [[each.before, each.choices, each.answer] for each in questions],
            self.prompts,
        )

    def start(self, dense: nn.Module) -> None:
        """Take the dense model, which is cast, to judge others beside it."""
        dense.to(self.dtype)
        self.continuations = Continuations(self.prompts, dense)
        self.dense = {name: text.judge(dense) for name, text in self.windows.items()}

    def judge(
        self, model: nn.Module, known: dict[str, dict[str, float]] | None = None
    ) -> dict[str, Any]:
        """Return all measures of a model, which is cast, after :meth:`start`.

        ``texts``, ``choices`` and ``continuation`` are what the judges say; what they say of the
        texts may be ``known``. ``summary`` is the mean over the texts of
        ``log(perplexity / dense)``.
        """
        model.to(self.dtype)
        texts = {}
        for name, text in self.windows.items():
            found = known[name] if known else text.judge(model)
            dense = self.dense[name]["perplexity"]
            texts[name] = {
                "tokens": text.tokens,
                "dense": dense,
                **found,
                "log_ratio": math.log(found["perplexity"] / dense),
            }
        return {
            "texts": texts,
            "choices": None if self.questions is None else self.questions.judge(model),
            "continuation": self.continuations.judge(model),
            "summary": sum(text["log_ratio"] for text in texts.values()) / len(texts),
        }
