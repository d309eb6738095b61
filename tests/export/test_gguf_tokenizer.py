"""Tokenizers in GGUF files: llama.cpp makes of a text the tokens that the folder's makes."""

from __future__ import annotations

import json

import gguf
import pytest
import transformers
from folders import change
from folders import tokenizer as word_level
from llama_cpp_py_sync import Llama
from tiny import tiny
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from liar_ext import InputError
from liar_ext.export import export
from liar_ext.export.gguf_tokenizer import ONE, RULES, THREE

pytestmark = pytest.mark.usefixtures("quick_workers")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
TEXTS = [
    "The quick brown fox doesn't jump; it'll  RUN over 12345.67 lazy dogs\n\n  \tand I'LL stay \n",
    "naïve façade – 日本語, Ελληνικά и русский! 👍🏽 €5 №7 ½ \u00a0x",
    "<s>def f(x):\n    return {'a': x**2}  # <|tool|> x",
    "",
    " lead and trail ",
]
SPLITS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
} | {
    name: [
        pre_tokenizers.Split(Regex(steps[0][1]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    for (steps, _), name in RULES.items()
    if steps[0][0] == "Split"
}
WHOLE = [name for (_, whole), name in RULES.items() if whole]


def byte_level(split, *, ignore_merges=False, bos=False, size=500, suffix=""):
    """Train a byte-level BPE, with two special tokens and one that is added."""
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges, end_of_word_suffix=suffix))
    core.pre_tokenizer = pre_tokenizers.Sequence(split) if len(split) > 1 else split[0]
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        end_of_word_suffix=suffix,
        show_progress=False,
    )
    core.train_from_iterator([*TEXTS * 3, "dogs dogs foxes 12 345 67"], trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.add_tokens(["<|tool|>"])
    fast.chat_template = "{{ messages[0].content }}!"
    return fast


def sentence_pieces(prepend: bool, size=400):
    """Train a BPE that falls back to bytes, as those of Llama 2 (prepend) and Gemma do."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", SPACE)
    core.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prepend else replace
    )
    if not prepend:
        core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    core.train_from_iterator([TEXTS[0], TEXTS[2]] * 3, trainer)
    fields = json.loads(core.to_str())
    fields["added_tokens"] = fields["added_tokens"][:3]
    core = Tokenizer.from_str(json.dumps(fields))
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def exported(tokenizer, folder, rows=None):
    model = tiny("llama", vocab_size=rows or len(tokenizer))
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    done = export(folder, "gguf", check=False)
    return done.paths[0], done.notes


def fields_of(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def same_tokens(tokenizer, path):
    theirs = Llama(str(path), n_ctx=64, n_threads=1)
    for text in TEXTS:
        assert theirs.tokenize(text, parse_special=True) == tokenizer(text).input_ids, text


@pytest.mark.parametrize("name", SPLITS)
def test_tokens_of_a_text(name, tmp_path):
    tokenizer = byte_level(SPLITS[name], ignore_merges=name in WHOLE, bos=name == "llama-bpe")
    path, _ = exported(tokenizer, tmp_path / "model")
    assert fields_of(path)["tokenizer.ggml.pre"] == name
    same_tokens(tokenizer, path)


@pytest.mark.parametrize("prepend", [True, False])
def test_tokens_of_a_text_by_sentence_pieces(prepend, tmp_path):
    tokenizer = sentence_pieces(prepend)
    path, _ = exported(tokenizer, tmp_path / "model")
    assert fields_of(path)["tokenizer.ggml.model"] == "llama"
    same_tokens(tokenizer, path)


def test_special_tokens_template_and_padding_rows(tmp_path):
    tokenizer = byte_level(SPLITS["gpt-2"], bos=True)
    path, notes = exported(tokenizer, tmp_path / "model", rows=len(tokenizer) + 3)
    fields = fields_of(path)
    assert len(notes) == 1
    names = ("bos", "eos", "padding")
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in names] == [1, 2, 0]
    assert fields["tokenizer.ggml.add_bos_token"] and not fields["tokenizer.ggml.add_eos_token"]
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    kind = gguf.TokenType
    assert tokens[-4] == "<|tool|>" and tokens[-1] == f"[PAD{len(tokens) - 1}]"
    assert types[-4:] == [kind.USER_DEFINED, kind.UNUSED, kind.UNUSED, kind.UNUSED]
    assert types[:4] == [kind.CONTROL] * 3 + [kind.NORMAL]


def test_a_special_token_without_a_row_is_left_out_and_told_of(tmp_path):
    tokenizer = byte_level(SPLITS["gpt-2"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    path, notes = exported(tokenizer, tmp_path / "model", rows=len(tokenizer) - 1)
    assert "left out: <image>" in notes[-1]
    assert len(fields_of(path)["tokenizer.ggml.tokens"]) == len(tokenizer) - 1


def test_a_folder_without_tokenizer_gives_a_file_that_takes_ids(tmp_path):
    path, notes = exported(None, tmp_path / "model", rows=61)
    assert "takes token ids, and no text" in notes[-1]
    assert fields_of(path)["tokenizer.ggml.model"] == "none"


def test_transformers_reads_the_tokenizer_back(tmp_path):
    tokenizer = byte_level(SPLITS["gpt-2"])
    path, _ = exported(tokenizer, tmp_path / "model")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in TEXTS:
        assert again(text).input_ids == tokenizer(text).input_ids


def changed(tokenizer, **steps):
    for name, step in steps.items():
        setattr(tokenizer.backend_tokenizer, name, step)
    return tokenizer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (word_level, "WordLevel, not BPE"),
        (
            lambda: changed(byte_level(SPLITS["gpt-2"]), normalizer=normalizers.Lowercase()),
            "the normalisation Lowercase",
        ),
        (
            lambda: changed(
                byte_level(SPLITS["gpt-2"]),
                pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True),
            ),
            "adds a space in front",
        ),
        (
            lambda: byte_level([pre_tokenizers.Split(Regex("a+"), "isolated"), *SPLITS["gpt-2"]]),
            "splits text by",
        ),
        (
            lambda: byte_level(
                [pre_tokenizers.Split(Regex(THREE[1]), "removed"), SPLITS["qwen2"][1]]
            ),
            "splits text in the way Removed",
        ),
        (lambda: byte_level(SPLITS["gpt-2"], suffix="</w>"), "where a word begins or ends"),
        (
            lambda: changed(sentence_pieces(True), normalizer=normalizers.Replace("a", "b")),
            "with a replacement of",
        ),
        (
            lambda: changed(sentence_pieces(False), pre_tokenizer=pre_tokenizers.Whitespace()),
            "the step Whitespace",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(make, words, tmp_path):
    with pytest.raises(InputError, match=words):
        exported(make(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_that_cannot_read_is_refused(tmp_path):
    byte_level(SPLITS["gpt-2"]).save_pretrained(tmp_path / "model")
    change(tmp_path / "model/tokenizer_config.json", model_max_length={})
    with pytest.raises(InputError, match="the tokenizer can't read text"):
        exported(None, tmp_path / "model", rows=600)


def test_the_rules_are_those_of_transformers():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert ONE[1] == PRETOKENIZE_REGEX and THREE[1] == PRETOKENIZE_REGEX.replace(
        r"|\p{N}|", r"|\p{N}{1,3}|"
    )
