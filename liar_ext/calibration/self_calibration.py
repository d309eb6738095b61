"""Text that a language model writes itself, to calibrate it on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liar_ext.bars import Bar
from liar_ext.data.documents import Documents
from liar_ext.data.texts import document_prefix
from liar_ext.errors import InputError
from liar_ext.models.running import device_of, predicts_next_token

SELF = "self"  # the source that stands for it
# Documents are written side by side, as many as have their keys and values in this much memory.
CACHE_BYTES, MOST_ROWS = 2 << 30, 64
# Windows of a fixed length lose the last tokens of a text: one document in so many is to spare.
SPARE = 8
# What separates documents where the tokenizer begins none with a token of its own.
SEPARATOR = "<|endoftext|>"


@torch.no_grad()
def write_documents(
    model: nn.Module,
    tokenizer,
    *,
    documents: int,
    tokens: int,
    seed: int = 0,
    progress: bool = False,
) -> Documents:
    """Let a model write documents: each token is drawn from the model's own distribution.

    ``x_t ~ p(· | x_0 … x_{t−1})`` at temperature 1, nothing cut off, from the token that begins a
    document on. What comes out has the kinds of text that the model was trained on, about as often,
    and needs no data.

    Parameters
    ----------
    model : nn.Module
        A causal language model of transformers; it is as it was afterwards.
    tokenizer
        Its tokenizer.
    documents : int
        How many to write.
    tokens : int
        Tokens of each.
    seed : int
        Of the draw. The same seed, machine and number of threads give the same text.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Documents

    Raises
    ------
    InputError
        If the model does not predict the next token, or its outputs are not finite.

    Notes
    -----
    Source: Williams, Chrysostomou and Aletras, "Self-calibration for Language Model Quantization
    and Pruning", NAACL 2025, arXiv:2410.17170.
    """
    if not predicts_next_token(model):
        raise InputError(
            f'text: the source "{SELF}" lets the model write its calibration text, which '
            f"{type(model).__name__} can't; give a text file, a folder or a dataset"
        )
    device = device_of(model)
    start = torch.tensor(_beginning(model, tokenizer), device=device)
    rows = min(MOST_ROWS, max(1, int(CACHE_BYTES // _cache_bytes(model, tokens))), documents)
    written: list[str] = []
    training = model.training
    cuda = [device] if device.type == "cuda" else []
    bar = Bar(total=documents, desc="write", disable=not progress)
    with torch.random.fork_rng(devices=cuda), bar:
        torch.manual_seed(seed)
        model.eval()
        try:
            while len(written) < documents:
                count = min(rows, documents - len(written))
                ids = _draw(model, start.expand(count, -1), tokens)
                written += tokenizer.batch_decode(ids, skip_special_tokens=True)
                bar.update(count)
        finally:
            model.train(training)
    return Documents(written)


def enough_documents(sequences: int) -> int:
    """Return how many documents of a sequence's length fill that many sequences."""
    return sequences + max(sequences // SPARE, 4)


def _draw(model: nn.Module, start: Tensor, tokens: int) -> Tensor:
    """Return ``tokens`` tokens after each row of ``start``."""
    from transformers import GenerationConfig

    # In the place of the model's own: what a configuration that is passed leaves open, such as
    # penalties and ends, is taken from there. Without an end of text a model goes on with the next
    # document, as in training.
    own, model.generation_config = (
        model.generation_config,
        GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=tokens,
            pad_token_id=0,
            use_cache=True,
        ),
    )
    try:
        ids = model.generate(start, attention_mask=torch.ones_like(start))
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise InputError(
            f"text: {type(model).__name__} gave probabilities that are not finite while it wrote "
            "its calibration text; load it in a wider dtype, or give text"
        ) from None
    finally:
        model.generation_config = own
    return ids[:, start.shape[1] :]


def _beginning(model: nn.Module, tokenizer) -> list[int]:
    """Return the tokens that a document begins with: the tokenizer's, or what separates two."""
    prefix = document_prefix(tokenizer)
    if prefix:
        return prefix
    vocabulary = tokenizer.get_vocab()
    config = model.config.get_text_config()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    choices = [
        vocabulary.get(SEPARATOR),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        config.bos_token_id,
        *ends,
    ]
    return [next((token for token in choices if token is not None), 0)]


def _cache_bytes(model: nn.Module, tokens: int) -> float:
    """Return the bytes of one document's keys and values, at most."""
    config = model.config.get_text_config()
    width = next(model.parameters()).element_size()
    return max(2 * config.num_hidden_layers * config.hidden_size * tokens * width, 1)
