"""Text that a language model writes itself, to calibrate it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import FOLDS
from liar_ext.calibration.documents import Documents
from liar_ext.calibration.folds import Sequences, of_no_text
from liar_ext.calibration.taps import replaced
from liar_ext.calibration.texts import document_prefix
from liar_ext.models.running import (
    computes_bfloat16,
    device_of,
    evaluating,
    known_tokens,
    predicts_next_token,
)
from liar_ext.system.environment import available_memory
from liar_ext.system.errors import InputError
from liar_ext.system.progress import Bar

SELF = "self"  # the source that stands for it
# Documents are written side by side, as many as have their keys and values in this much memory.
CACHE_BYTES, MOST_ROWS = 2 << 30, 64
# Windows of a fixed length lose the last tokens of a text: one document in so many is to spare.
SPARE = 8
# What separates documents where the tokenizer begins none with a token of its own.
SEPARATOR = "<|endoftext|>"
# What fields of a configuration begin with that name the token of such an input.
OTHER_INPUTS = ("image", "video", "vision", "audio", "boi", "eoi", "boa", "eoa")


def write_documents(
    model: nn.Module,
    tokenizer,
    *,
    documents: int,
    tokens: int,
    seed: int = 0,
) -> Documents:
    """Let a model write documents: each token is drawn from the model's own distribution.

    ``x_t ~ p(· | x_0 … x_{t−1})`` at temperature 1, nothing cut off, from the token that begins a
    document on: text as the model was trained on, without any data.

    Parameters
    ----------
    model, tokenizer
        A causal language model of transformers, which stays as it is, and its tokenizer.
    documents, tokens : int
        How many to write, and tokens of each.
    seed : int
        Of the draw. The same seed, machine and number of threads give the same text.

    Raises
    ------
    InputError
        If the model does not predict the next token, or its outputs are not finite.

    Notes
    -----
    Source: Williams, Chrysostomou and Aletras, "Self-calibration for Language Model Quantization
    and Pruning", NAACL 2025, arXiv:2410.17170.
    """
    ids = _write(model, tokenizer, documents, tokens, seed)
    return Documents(tokenizer.batch_decode(ids, skip_special_tokens=True))


def write_sequences(
    model: nn.Module,
    tokenizer,
    *,
    count: int,
    seq_len: int,
    seed: int = 0,
    written: int | None = None,
) -> Sequences:
    """Let a model write sequences, as :func:`write_documents` does, and leave them tokens.

    They are ``count``, but one at least for each fold, of ``seq_len`` tokens, begin as windows of
    text do, and go to the folds by turns. For an estimate only ``written`` tokens are written. ::

        text = calibration_sequences([read_documents("text.txt")], tokenizer, samples=64)
        both = text.beside(write_sequences(model, tokenizer, count=21, seq_len=512))
    """
    count = max(count, FOLDS)
    prefix = torch.tensor(document_prefix(tokenizer), dtype=torch.long).expand(count, -1)
    tokens = seq_len - prefix.shape[1]
    ids = _write(model, tokenizer, count, min(written or tokens, tokens), seed).cpu()
    ids = ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]
    return of_no_text(torch.cat([prefix, ids], 1))


def enough_documents(sequences: int) -> int:
    """Return how many documents of a sequence's length fill that many sequences."""
    return sequences + max(sequences // SPARE, 4)


@torch.no_grad()
def _write(model: nn.Module, tokenizer, count: int, tokens: int, seed: int) -> Tensor:
    """Return ``(count, tokens)`` tokens that a model writes, each row from the beginning on."""
    if not predicts_next_token(model):
        raise InputError(
            f'text: the source "{SELF}" lets the model write its calibration text, which '
            f"{type(model).__name__} can't; give a text file, a folder or a dataset"
        )
    device = device_of(model)
    start = torch.tensor(_beginning(model, tokenizer), device=device)
    most = min(MOST_ROWS, max(1, CACHE_BYTES // _cached_bytes(model, tokens)))
    rounds = -(-count // most)
    written = []
    cuda = [device] if device.type == "cuda" else []
    bar = Bar(total=count, desc="write")
    fork = torch.random.fork_rng(devices=cuda)
    with fork, bar, evaluating(model), packed(model, -(-count // rounds)):
        torch.manual_seed(seed)
        for some in start.expand(count, -1).tensor_split(rounds):
            written.append(_draw(model, some, tokens))
            bar.update(len(some))
    return torch.cat(written)


def _cached_bytes(model: nn.Module, tokens: int) -> int:
    """Return about how many bytes the keys and values of one document take."""
    config, width = model.config.get_text_config(), next(model.parameters()).element_size()
    heads = getattr(config, "num_attention_heads", None) or 1
    groups = getattr(config, "num_key_value_heads", None) or heads
    each = groups * (getattr(config, "head_dim", None) or -(-config.hidden_size // heads))
    return max(2 * config.num_hidden_layers * each * tokens * width, 1)


@contextmanager
def packed(model: nn.Module, rows: int) -> Iterator[None]:
    """Let linear layers in float32 on an x86 CPU multiply few rows by oneDNN, for the context.

    Their weights are copied into its layout, if a copy fits into half of the memory that is free:
    in bfloat16 where the CPU has instructions for it. Results differ by rounding alone, to that
    type; docs/performance.md says how much faster it is.
    """
    cpu, room = torch.device("cpu"), available_memory() or 0
    every = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    every = [m for m in every if (m.weight.device, m.weight.dtype) == (cpu, torch.float32)]
    known = torch.backends.mkldnn.is_available() and (
        hasattr(torch.ops.mkldnn, "_linear_pointwise")  # no public operator: a torch may lack it
        and "AVX" in torch.backends.cpu.get_cpu_capability()
        and 2 * sum(m.weight.nbytes for m in every) <= room
    )
    with ExitStack() as stack:
        try:
            for module in every if known else ():
                stack.enter_context(replaced(module, _by_onednn(module, rows)))
        except (RuntimeError, MemoryError):  # no memory after all, for which these need not be fast
            stack.close()
        yield


def _by_onednn(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    """Return the forward function of a layer, with its weights in oneDNN's layout."""
    half = computes_bfloat16(layer.weight.device)
    dtype, bias = torch.bfloat16 if half else torch.float32, layer.bias
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype), rows)
    given = weight, None if bias is None else bias.to(dtype), "none", [], ""
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), *given).float()


def _draw(model: nn.Module, start: Tensor, tokens: int) -> Tensor:
    from transformers import GenerationConfig

    # It takes the place of the model's own, which would fill in penalties and ends. Without an end
    # of text a model goes on with the next document, as in training.
    plain = {"do_sample": False, "use_cache": True, "max_new_tokens": tokens, "pad_token_id": 0}
    plain["suppress_tokens"] = _of_other_inputs(model) or None
    own, model.generation_config = model.generation_config, GenerationConfig(**plain)
    try:
        how = {"attention_mask": torch.ones_like(start), "logits_processor": [_drawn]}
        return model.generate(start, **how)[:, start.shape[1] :]
    except FloatingPointError:
        raise InputError(
            f"text: {type(model).__name__} gave probabilities that are not finite while it wrote "
            "its calibration text; load it in a wider dtype, or calibrate on given text alone, "
            "self_text=0"
        ) from None
    finally:
        model.generation_config = own


def _drawn(_: Tensor, logits: Tensor) -> Tensor:
    """Leave each row of logits one token, drawn by the softmax: where a uniform number falls.

    ``generate()`` itself draws a number for each token of the vocabulary, which takes longer.
    """
    below = logits.float().softmax(-1).cumsum(-1)
    total = below[:, -1:]
    if not total.isfinite().all():
        raise FloatingPointError
    # Above 0 and at most the total, so no token of probability 0 is found.
    token = torch.searchsorted(below, (1 - torch.rand_like(total)) * total)
    return torch.full_like(logits, -torch.inf).scatter_(1, token, 0.0)


def _beginning(model: nn.Module, tokenizer) -> list[int]:
    """Return the tokens that a document begins with: the tokenizer's, or what separates two."""
    if prefix := document_prefix(tokenizer):
        return prefix
    config = model.config.get_text_config()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    choices = [tokenizer.get_vocab().get(SEPARATOR), tokenizer.bos_token_id, tokenizer.eos_token_id]
    known = range(known_tokens(model, model.config))
    choices += [config.bos_token_id, *ends]
    return [next((token for token in choices if token in known), 0)]


def _of_other_inputs(model: nn.Module) -> list[int]:
    """Return the tokens that stand for what isn't text, such as an image, and can't be alone."""
    return sorted(
        value
        for name, value in model.config.to_dict().items()
        if name.startswith(OTHER_INPUTS)
        and name.endswith(("token_id", "token_index"))
        and isinstance(value, int)
    )
