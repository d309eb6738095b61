"""Judge a model by held-out text: perplexity, bits per byte, divergence from the dense model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from liar_ext import InputError
from liar_ext.models.running import evaluating

# Rows of logits at a time: 64 × 262,144 in float32 are 67 MB.
ROWS = 64
# The divergence is taken at every KL_EVERY-th position: a dense head of 262,144 outputs takes more
# time than all layers of such a model before it.
KL_EVERY = 4


@torch.no_grad()
def hidden_states(model: nn.Module, input_ids: Tensor, **inputs) -> Tensor:
    """Return what the head of a language model reads, ``(batch, tokens, hidden)``."""
    output = model.base_model(input_ids=input_ids, use_cache=False, **inputs)
    return output.last_hidden_state


@torch.no_grad()
def head_of(model: nn.Module) -> nn.Module:
    """Return the head, for logits of some positions; InputError if it isn't all there is."""
    head = model.get_output_embeddings()
    ids = torch.arange(3, device=model.device)[None]
    with evaluating(model):
        whole = model(input_ids=ids).logits
        parts = head(hidden_states(model, ids))
    if not torch.allclose(whole, parts, rtol=1e-3, atol=1e-3):
        raise InputError(
            f"quality: {type(model).__name__} does more with its logits than its head; give a "
            "model that doesn't"
        )
    return head


def log_probabilities(head: nn.Module, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield, for runs of rows, where each begins and ``(rows, vocabulary)`` log-probabilities."""
    for start in range(0, len(hidden), ROWS):
        yield start, head(hidden[start : start + ROWS]).float().log_softmax(-1)


class HeldOut:
    """A text to judge models by: token ids of windows, ``(tokens,)`` each.

    ``texts`` is what the predicted tokens of each window say, all but the first.
    """

    def __init__(self, windows: Sequence[Tensor], texts: Sequence[str]) -> None:
        self.windows = windows
        self.tokens = sum(len(window) - 1 for window in windows)
        self.bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
        self.dense_head: nn.Module = nn.Identity()
        self.dense_hidden: list[Tensor] = []

    @torch.no_grad()
    def judge(self, model: nn.Module) -> dict[str, float]:
        """Return a model's ``perplexity``, ``bits_per_byte``, and ``kl`` from the dense model.

        ``exp(L / tokens)``, ``L / (bytes · ln 2)`` with ``L = −Σ log q(token | before)``, and the
        mean of ``KL(p ‖ q)`` in nats over every ``KL_EVERY``-th position, p the dense model's
        prediction. The model that is judged first is the dense one.
        """
        head = head_of(model)
        first = not self.dense_hidden
        loss, lost, rows = 0.0, 0.0, 0
        with evaluating(model):
            for index, ids in enumerate(self.windows):
                hidden = hidden_states(model, ids[None])[0, :-1]
                if first:
                    self.dense_hidden.append(hidden)
                    self.dense_head = head
                compared = self.dense_hidden[index]
                for start in range(0, len(hidden), ROWS):
                    end = min(start + ROWS, len(hidden))
                    logits = head(hidden[start:end]).float()
                    norm = logits.logsumexp(-1, keepdim=True)
                    target = ids[start + 1 : end + 1, None]
                    loss += float((norm - logits.gather(1, target)).double().sum())
                    q = logits[::KL_EVERY] - norm[::KL_EVERY]
                    dense = self.dense_head(compared[start:end:KL_EVERY]).float().log_softmax(-1)
                    lost += float(kl_div(q, dense, reduction="sum", log_target=True))
                    rows += len(dense)
        mean = loss / self.tokens
        return {
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "bits_per_byte": loss / (self.bytes * math.log(2)),
            "kl": lost / rows,
        }
