from __future__ import annotations

import gc
import os
import shutil
import string
import tempfile
import weakref
from typing import TYPE_CHECKING

# Tiny models gain nothing from threads, and two processes with two OpenMP threads each spin against
# each other. Tests of threading set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where transformers copies the code of a folder before it runs it; gone when the tests end.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()

import forked  # noqa: F401  (says what a fork begins with)
import pytest
import torch
from tiny import VOCAB, tiny

from liar_ext.calibration.taps import Moments

# Tests of operators need no models, and take seconds less without.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Files that take half a minute or more, in `make test` or in `make test-all`.
LONG = (
    *("test_simulated_gpu.py", "test_wheel.py", "test_pages.py", "test_ops.py", "test_fuzz.py"),
    *("test_verify.py", "test_ranks.py", "test_decoder_families.py", "test_encoder_families.py"),
    "test_lm_eval.py",
)


def pytest_collection_modifyitems(items):
    """Begin with the long files, so that no process has one left when the others are done."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish():
    """Let the garbage collector pass over what stays: torch, transformers and the tests."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, within the vocabulary of the tiny models."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = string.ascii_lowercase + string.digits + " .\n"
    vocabulary = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2}
    vocabulary |= {character: 3 + i for i, character in enumerate(characters)}
    assert len(vocabulary) < VOCAB
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]"
    )


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory, tokenizer):
    """A tiny Llama with its tokenizer, saved as an ordinary model folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Calibration and held-out text of random words, as files."""
    folder = tmp_path_factory.mktemp("texts")
    generator = torch.Generator().manual_seed(3)
    draw = torch.randint(0, 26, (2, 6000), generator=generator).tolist()
    paths = []
    for name, letters in zip(("calibration.txt", "held_out.txt"), draw, strict=True):
        text = "".join(string.ascii_lowercase[i] for i in letters)
        words = (text[at : at + 5] for at in range(0, len(text), 5))
        (folder / name).write_text(" ".join(words))
        paths.append(folder / name)
    return paths


@pytest.fixture(scope="module")
def quick_workers():
    """Let the workers of ``verify`` and of llama.cpp be forked from one process.

    test_verify.py and test_gguf.py start them.
    """
    import fresh_workers

    from liar_ext.export import llama_cpp, verify

    with pytest.MonkeyPatch.context() as patch:
        for module in (llama_cpp, verify):
            patch.setattr(module, "subprocess", fresh_workers)
        yield


@pytest.fixture
def always_saving(monkeypatch):
    """With a clock that stands still it is always time to save."""
    from liar_ext.system.checkpoint_store import Checkpoint

    monkeypatch.setattr(Checkpoint.__init__, "__defaults__", (lambda: 0.0,))
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def watch_sums(monkeypatch):
    """Give a function that returns the bytes of Gram matrices alive after each `module.collect`."""

    def watch(module) -> list[int]:
        made, held = weakref.WeakValueDictionary(), []
        zeros, collect = Moments.zeros, module.collect

        def counted(*args, **settings):
            moments = zeros(*args, **settings)
            made[len(made), id(moments)] = moments
            return moments

        def watched(*args, **settings):
            bank = collect(*args, **settings)
            held.append(sum(moments.gram.nbytes for moments in made.values()))
            return bank

        monkeypatch.setattr(Moments, "zeros", counted)
        monkeypatch.setattr(module, "collect", watched)
        return held

    return watch


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Give pruned tiny models, each saved once: model, plan and folder. Copy what you change."""
    from functools import cache

    from folders import make_plan, pruned

    from liar_ext import save_pruned

    @cache
    def save(name="llama", plan_of=make_plan, **settings):
        model, plan = pruned(name, plan_of, **settings)
        folder = tmp_path_factory.mktemp("saved") / "model"
        save_pruned(model, folder, plan)
        return model, plan, folder

    return save
