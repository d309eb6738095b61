"""Sequences beside those of text: written by the model itself, or of random tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import blake2b

import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import FOLDS, Sequences, in_turns
from liar_ext.calibration.documents import Documents
from liar_ext.calibration.taps import replaced
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

SELF = "self"  # the source that stands for text of the model's own
NO_TEXT = -1  # the source of what comes beside, where texts count from 0
RANDOM_TOKENS = 0.25  # of all sequences; docs/quality.md shows the effect
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

    Weights are copied into its layout if there is memory, in bfloat16 if the CPU computes in it.
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
    finally:
        model.generation_config = own


def _drawn(_: Tensor, logits: Tensor) -> Tensor:
    """Leave each row of logits one token, drawn by the softmax: where a uniform number falls.

    ``generate()`` itself draws a number for each token of the vocabulary, which takes longer.
    """
    below = logits.float().softmax(-1).cumsum(-1)
    total = below[:, -1:]
    if not total.isfinite().all():
        raise InputError(
            "text: the model gave probabilities that are not finite while it wrote its calibration "
            "text; load it in a wider dtype, or calibrate on given text alone, self_text=0"
        )
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


def document_prefix(tokenizer) -> list[int]:
    """Return the special tokens with which the tokenizer begins a document, such as BOS."""
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer("a", verbose=False)["input_ids"]
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at]
    return []


def count_beside(sequences: int, fraction: float) -> int:
    """Return how many sequences make a fraction of all beside that many of text, rounded."""
    return round(sequences * fraction / (1 - fraction))


def of_no_text(input_ids: Tensor) -> Sequences:
    """Return full sequences that come beside those of text, and take turns in going to folds."""
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    return Sequences(inputs, in_turns(len(input_ids)), torch.full((len(input_ids),), NO_TEXT))


def seed_of(rows: Iterable[Sequence[int] | Tensor], seed: int) -> int:
    """Return a seed for what comes beside sequences, so that other ones have something else."""
    digest = blake2b(str(seed).encode(), digest_size=7)
    for row in rows:
        digest.update(torch.as_tensor(row).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


def fraction_of(asked: float | str, causal: bool, written: bool) -> float:
    """Return the fraction of random tokens: of "auto" a quarter for models that write no text."""
    if asked != "auto":
        return float(asked)
    return RANDOM_TOKENS if causal and not written else 0.0


def random_sequences(
    rows: Sequence[Sequence[int]],
    tokenizer,
    fraction: float,
    seed: int,
    vocab_size: int | None = None,
) -> list[tuple[int, list[int]]]:
    """Return copies of some rows, evenly spread, with random tokens, after the row each is of.

    They are ``fraction`` of all. Special tokens stay, others are drawn from those below
    ``vocab_size``. The draw depends on the rows, so that other text has others beside it.
    """
    count = count_beside(len(rows), fraction)
    if not count:
        return []
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    known = sorted({*tokenizer.get_vocab().values()} - special)
    plain = torch.tensor([each for each in known if vocab_size is None or each < vocab_size])
    fixed = torch.tensor(sorted(special), dtype=torch.long)
    generator = torch.Generator().manual_seed(seed_of(rows, seed))
    copies = []
    for step in range(count):
        index = (2 * step + 1) * len(rows) // (2 * count)
        ids = torch.tensor(rows[index])
        drawn = plain[torch.randint(len(plain), ids.shape, generator=generator)]
        copies.append((index, torch.where(torch.isin(ids, fixed), ids, drawn).tolist()))
    return copies
