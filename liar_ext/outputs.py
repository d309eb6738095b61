"""Run a model for its outputs alone, and tell how far two outputs are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the key-value cache off while the context is open."""
    training, use_cache = model.training, getattr(model.config, "use_cache", None)
    model.eval()
    if use_cache is not None:
        model.config.use_cache = False
    try:
        yield
    finally:
        model.train(training)
        if use_cache is not None:
            model.config.use_cache = use_cache


def output_divergence(
    dense: Mapping[str, Tensor], pruned: Mapping[str, Tensor], mask: Tensor | None = None
) -> tuple[float, int]:
    """Return the summed divergence of ``pruned`` from ``dense`` outputs, and of how many rows.

    With logits: ``KL(p ‖ q) = Σ p (log p − log q)`` in nats, p the dense model's distribution and
    q the pruned one's, per token or per sequence. Without: ``½ |h − h'|² / |h|²`` of the last
    hidden state, which has the same meaning to second order but for its scale.

    Parameters
    ----------
    dense, pruned : mapping of str to Tensor
        Outputs of a transformers model: ``logits`` ``(batch, tokens, vocabulary)`` or ``(batch,
        classes)``, else ``last_hidden_state``.
    mask : Tensor, optional
        ``(batch, tokens)``: zero where a token is padding and does not count.
    """
    key = "logits" if dense.get("logits") is not None else "last_hidden_state"
    p, q = dense[key], pruned[key]
    if mask is not None and p.dim() == 3 and mask.shape == p.shape[:2] and not mask.all():
        p, q = p[mask.bool()], q[mask.bool()]
    p, q = p.flatten(0, -2).float(), q.flatten(0, -2).float()
    if key == "logits":
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        total = functional.kl_div(q, p, reduction="sum", log_target=True)
    else:
        total = 0.5 * ((p - q).square().sum(-1) / p.square().sum(-1)).sum()
    return float(total), len(p)
