"""Judge a model by how long it goes on as the dense one does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import DynamicCache

from bench.quality.windows import head_of, hidden_states, log_probabilities
from liar_ext.models.running import evaluating

STEPS = 32  # tokens of the dense model's continuation
BATCH = 16  # prompts at a time


class Continuations:
    """Greedy continuations by the dense model, of ``steps`` tokens each, which are written now.

    Prompts are token ids, ``(prompts, tokens)``.
    """

    def __init__(self, prompts: Tensor, dense: nn.Module, steps: int = STEPS) -> None:
        self.prompt_tokens, self.steps = prompts.shape[1], steps
        self.head = head_of(dense)
        with evaluating(dense):
            written = [
                settled(dense, greedy(dense, rows, steps), self.prompt_tokens)
                for rows in prompts.split(BATCH)
            ]
            self.rows = torch.cat(written)
            self.hidden = [hidden for _, hidden in self._run(dense)]

    @torch.no_grad()
    def judge(self, model: nn.Module) -> dict[str, float]:
        """Return how a model continues the prompts, beside the dense one.

        ``equal_tokens``: the mean number of tokens up to the first that differs, of both models'
        greedy continuations. ``equal_share``: that of ``steps``. ``kl``: the mean of
        ``KL(p ‖ q)`` in nats along the dense model's continuation. One pass over that tells both,
        since a greedy continuation is the same as long as its next token is the most likely one.
        """
        head = head_of(model)
        equal, lost, positions = 0, 0.0, 0
        with evaluating(model):
            for (rows, hidden), dense in zip(self._run(model), self.hidden, strict=True):
                best, states = [], hidden.flatten(0, 1)
                of_dense = log_probabilities(self.head, dense.flatten(0, 1))
                for (_, q), (_, p) in zip(log_probabilities(head, states), of_dense, strict=True):
                    best.append(q.argmax(-1))
                    lost += float(kl_div(q, p, reduction="sum", log_target=True))
                    positions += len(q)
                same = torch.cat(best).view(len(rows), self.steps) == rows[:, self.prompt_tokens :]
                equal += int(same.long().cumprod(1).sum())
        return {
            "equal_tokens": equal / len(self.rows),
            "equal_share": equal / (len(self.rows) * self.steps),
            "kl": lost / positions,
        }

    def _run(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows, and the hidden states that predict their continuation."""
        for rows in self.rows.split(BATCH):
            yield rows, hidden_states(model, rows)[:, self.prompt_tokens - 1 : -1]


@torch.no_grad()
def settled(model: nn.Module, rows: Tensor, start: int) -> Tensor:
    """Return rows whose every token from ``start`` on is the most likely one in one pass.

    Steps with a cache round otherwise than one pass over all rows does, and in bfloat16 two tokens
    are often as likely. Each round mends the first such token of a row, and what follows.
    """
    head, end = head_of(model), rows.shape[1]
    for _ in range(end - start + 1):
        hidden = hidden_states(model, rows)[:, start - 1 : -1].flatten(0, 1)
        best = torch.cat([q.argmax(-1) for _, q in log_probabilities(head, hidden)])
        best = best.view(len(rows), -1)
        wrong = best != rows[:, start:]
        if not wrong.any():
            break
        rows = rows.clone()
        for row in wrong.any(1).nonzero().flatten().tolist():
            place = start + int(wrong[row].int().argmax())
            rows[row, place] = best[row, place - start]
            rows[row : row + 1] = greedy(model, rows[row : row + 1, : place + 1], end - place - 1)
    return rows


@torch.no_grad()
def greedy(model: nn.Module, prompts: Tensor, steps: int) -> Tensor:
    """Return prompts with their greedy continuation, ``(prompts, tokens + steps)``."""
    head, rows, new = model.get_output_embeddings(), prompts, prompts
    # transformers 5.24 renames the argument; the older name warns from then on.
    names = inspect.signature(model.base_model.forward).parameters
    cache = {"cache" if "cache" in names else "past_key_values": DynamicCache(config=model.config)}
    for _ in range(steps):
        output = model.base_model(input_ids=new, use_cache=True, **cache)
        new = head(output.last_hidden_state[:, -1]).argmax(-1)[:, None]
        rows = torch.cat([rows, new], 1)
    return rows
