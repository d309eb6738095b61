from __future__ import annotations

import string
from contextlib import nullcontext
from copy import copy, deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import outputs, tiny, tiny_inputs
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from liar_ext import InputError
from liar_ext.calibration import texts
from liar_ext.calibration.batches import Sequences, probe_batches
from liar_ext.calibration.documents import Pair, block_spans, cut_blocks, cut_pieces


def draw(*sources, **settings) -> Sequences:
    """Return sequences of text alone."""
    return texts.calibration_sequences(*sources, **{"random_tokens": 0.0, **settings})


def test_no_document_stands_in_both_folds(tokenizer):
    documents = [letter * 30 for letter in "abcdefghij"]
    drawn = draw([documents], tokenizer, samples=20, seq_len=8)
    letters = [set(row.tolist()) for row in drawn.input_ids]
    for letter in tokenizer("abcdefghij")["input_ids"]:
        folds = {int(f) for row, f in zip(letters, drawn.fold, strict=True) if letter in row}
        assert len(folds) <= 1, "a document that stands in both folds voids the certificate"


@pytest.mark.parametrize(
    "also", [("", ""), ("", " \n\n "), ("\u00dc", "\u00fc"), ("\u00e9", "e\u0301")]
)
def test_copies_of_documents_stand_in_one_part(tokenizer, also):
    """Alike but for white space, case and the form of Unicode, if at all."""
    documents, copies = ([3 * f"{10 * letter}{each}" for letter in "abcdfghij"] for each in also)
    sources = [[*documents, *copies], documents[:4]]
    drawn = draw(sources, tokenizer, samples=16, seq_len=8, certify=4, judge=4)
    places: dict[int, set] = {}
    for row, fold in zip(drawn.input_ids, drawn.fold.tolist(), strict=True):
        for letter in set(row.tolist()):
            places.setdefault(letter, set()).add(fold)
    for name in ("certification", "judging"):
        for letter in getattr(drawn, name).input_ids.unique().tolist():
            places.setdefault(letter, set()).add(name)
    letters = tokenizer("abcdfghij")["input_ids"]
    found = [places[letter] for letter in letters if letter in places]
    assert all(len(each) == 1 for each in found)
    assert set.union(*found) == {0, 1, "certification", "judging"}
    assert drawn.notes == ()
    (note,) = draw([3 * ["abcdefgh " * 40]], tokenizer, samples=2, seq_len=8).notes
    assert note.startswith("A calibration text of 1 document was cut into"), "3 are one"


def test_a_lone_document_is_cut_into_blocks_with_gaps(tokenizer):
    paragraphs = [f"{index:03} " * 25 for index in range(260)]
    text = "\n\n".join(paragraphs)
    parts = cut_blocks(text, 2, 8, len(text))
    assert [len(part) for part in parts] == [8, 8]
    places = sorted((text.index(b), fold) for fold, part in enumerate(parts) for b in part)
    blocks = {text.index(block): block for part in parts for block in part}
    assert [fold for _, fold in places] == [0, 1] * 8
    for (at, _), (following, _) in zip(places, places[1:], strict=False):
        assert blocks[at] in text and set(blocks[at].split("\n\n")) <= set(paragraphs)
        assert text[at + len(blocks[at]) : following].strip("\n") in paragraphs, "one left out"
    drawn = draw([[text]], tokenizer, samples=8, seq_len=8)
    assert drawn.notes == (
        "A calibration text of 1 document was cut into 16 blocks of consecutive paragraphs, 8 "
        "for each of 2 parts, with a gap between them: held-out errors are those on the same "
        "document. Give more documents.",
    )


@pytest.mark.parametrize("text", ["x" * 1000, "word " * 200, "a line\n" * 150])
def test_blocks_of_a_text_without_paragraphs_have_gaps_too(text):
    (first,), (second,) = cut_blocks(text, 2, 8, len(text))
    assert text.startswith(first) and text.endswith(second)
    lost = len(text) - len(first) - len(second)
    assert 0 < lost <= len(text) / 2 / 8 + 16
    assert len(first) > 400 and len(second) > 400


@pytest.mark.parametrize("turn", [1, -1], ids=["alone first", "alone last"])
def test_a_lone_document_that_another_text_holds_stands_in_one_part(tokenizer, turn):
    documents = [2000 * letter for letter in "abcdefgh"]
    sources = [["a " * 2000], documents][::turn]
    drawn = draw(sources, tokenizer, samples=64, seq_len=8, certify=32)
    rows = [drawn.input_ids[drawn.fold == fold] for fold in (0, 1)]
    (letter,) = tokenizer("a")["input_ids"]
    parts = [int((each == letter).any()) for each in (*rows, drawn.certification.input_ids)]
    assert sum(parts) == 1
    assert drawn.notes == ("A calibration text that is in another one was left out.",)


def test_lone_documents_that_are_copies_are_cut_once(tokenizer):
    text = "abcdefgh " * 400
    both = draw([[text], [text.replace(" ", "\n")]], tokenizer, samples=16, seq_len=8)
    assert torch.equal(both.input_ids, draw([[text]], tokenizer, samples=16, seq_len=8).input_ids)


def test_a_lone_document_gives_an_encoder_many_sequences(tokenizer):
    words = " ".join(f"{index:04}" for index in range(400))
    drawn = draw([[words]], tokenizer, samples=16, seq_len=24, packed=False)
    assert len(drawn) == 16 and len({tuple(row) for row in drawn.input_ids.tolist()}) == 16
    assert cut_pieces("aa bb ccccccc d", 5) == ["aa bb", "cccc", "ccc d"]
    assert cut_pieces(words, 99) != [words] and " ".join(cut_pieces(words, 99)) == words


def test_halves_are_what_they_were(tokenizer):
    text = "a" * 50 + " " + "b" * 50
    settings = {"samples": 8, "seq_len": 10, "lone": "halves"}
    drawn = draw([[text]], tokenizer, **settings)
    a, b = tokenizer("ab")["input_ids"]
    assert (drawn.input_ids[drawn.fold == 0] == a).all()
    assert not (drawn.input_ids[drawn.fold == 1] == a).any()
    assert drawn.notes == (
        "A calibration text of one document was cut into two halves, one for each fold.",
    )


def test_certification_shares_no_document_with_the_folds(tokenizer):
    documents = [letter * 60 for letter in string.ascii_lowercase]
    drawn = draw([documents[:10], documents[10:]], tokenizer, samples=8, seq_len=8, certify=6)
    third = drawn.certification
    assert len(drawn) == 8 and len(third) == 6 and third.fold.tolist() == [0, 1] * 3
    seen = set(drawn.input_ids.flatten().tolist()) & set(third.input_ids.flatten().tolist())
    assert seen <= set(tokenizer("\n")["input_ids"])
    assert draw([documents], tokenizer, seq_len=8).certification is None
    alone = draw(["".join(documents).split("  ")], tokenizer, samples=8, seq_len=8, certify=4)
    letters = [set(part.input_ids.flatten().tolist()) for part in (alone, alone.certification)]
    assert not letters[0] & letters[1] and len(alone.certification) == 4
    with pytest.raises(InputError, match="too short: .* and for certify"):
        draw([["ab" * 30] * 2], tokenizer, seq_len=32, certify=90)
    both = draw([documents], tokenizer, samples=8, seq_len=8, certify=4, judge=6)
    parts = both, both.certification, both.judging
    assert [len(part) for part in parts] == [8, 4, 6]
    whose = [set(part.input_ids.flatten().tolist()) - seen for part in parts]
    assert not whose[0] & whose[1] and not whose[0] & whose[2] and not whose[1] & whose[2]
    short = draw([documents], tokenizer, samples=8, seq_len=8, certify=900)
    assert short.notes == (
        f"The text gave {len(short.certification)} of 900 sequences to certify with.",
    )


@pytest.mark.parametrize(
    "numbers",
    [
        {"samples": 1},
        {"seq_len": 1},
        {"certify": 1},
        {"certify": -2},
        {"judge": 1},
    ],
)
def test_bad_numbers_of_a_draw(tokenizer, numbers):
    with pytest.raises(InputError, match=f"must be at least 2.*{next(iter(numbers))}"):
        draw([["ab" * 300] * 9], tokenizer, **numbers)


@pytest.mark.parametrize("packed", [True, False])
def test_of_much_text_only_a_part_is_tokenised(tokenizer, packed, monkeypatch):
    read = []

    class Counting:
        pad_token_id = 0

        def __call__(self, text, **settings):
            read.append(sum(map(len, text if isinstance(text, list) else [text])))
            return tokenizer(text, **settings)

    monkeypatch.setattr(texts, "ENOUGH", 2000)
    documents = [letter * 500 for letter in string.ascii_lowercase] * 20
    settings = {"samples": 8, "seq_len": 8, "packed": packed}
    assert len(draw([documents], Counting(), **settings)) == 8
    assert sum(read) < 2 * 2600
    read.clear()
    assert len(texts.evaluation_sequences(documents, Counting(), seq_len=8, samples=8)) == 8
    assert sum(read) < 8600


@pytest.fixture(scope="session")
def with_bos(tokenizer):
    """The tokenizer as Gemma's and Llama's are: a document begins with BOS."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", bos_token="[BOS]")


def test_windows_begin_as_the_tokenizer_begins_a_document(tokenizer, with_bos):
    documents = [letter * 60 for letter in "abcd"]
    drawn = draw([documents], with_bos, samples=8, seq_len=10)
    windows = texts.evaluation_sequences(documents, with_bos, seq_len=10)
    for sequences in (drawn, windows):
        assert sequences.bos == "[BOS]" and sequences.input_ids.shape[1] == 10
        assert (sequences.input_ids[:, 0] == 1).all() and (sequences.input_ids[:, 1:] != 1).all()
    text = with_bos("\n\n".join(documents), add_special_tokens=False)["input_ids"]
    assert windows.input_ids[:, 1:].flatten().tolist() == text[: len(windows) * 9]
    without = texts.evaluation_sequences(documents, tokenizer, seq_len=10)
    assert without.bos == "" and without.input_ids[0].tolist() == text[:10]


@pytest.mark.parametrize(
    ("name", "positions"), [("llama", 64), ("gpt2", 64), ("opt", 64), ("bert", 64), ("roberta", 63)]
)
def test_sequences_fit_the_positions_of_the_model(tokenizer, name, positions):
    model, short = tiny(name), copy(tokenizer)
    texts.check_seq_len(model, tokenizer, positions)
    outputs(model, tiny_inputs(model, tokens=positions))
    with pytest.raises(InputError, match=f"has {positions} positions, got seq_len {positions + 1}"):
        texts.check_seq_len(model, tokenizer, positions + 1)
    short.model_max_length = positions
    with nullcontext() if "bert" in name else pytest.raises(InputError):  # it joins no documents
        texts.check_seq_len(model, short, 512)


def test_sources_contribute_evenly(tokenizer):
    long, short = [i * "c" + 400 * "a" for i in range(10)], [i * "c" + 40 * "b" for i in range(4)]
    drawn = draw([long, short], tokenizer, samples=8, seq_len=10)
    b = tokenizer("b")["input_ids"][0]
    of_b = (drawn.input_ids == b).any(1)
    assert int(of_b.sum()) == 4
    assert drawn.fold.tolist() == [0] * 4 + [1] * 4
    assert drawn.source.tolist() == of_b.long().tolist()
    assert torch.cat([batch["source"] for batch in drawn.batches(3)]).equal(drawn.source)


def test_the_seed_decides(tokenizer):
    documents = [letter * 37 for letter in "abcdefghijklmnop"]
    draws = [draw([documents], tokenizer, samples=6, seq_len=9, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0].input_ids, draws[1].input_ids)
    assert not torch.equal(draws[0].input_ids, draws[2].input_ids)


def test_encoders_get_padded_documents(tokenizer):
    drawn = draw([["abc", "de", "f", "ghij"]], tokenizer, samples=4, seq_len=3, packed=False)
    assert drawn.input_ids.shape == (4, 3)
    assert drawn.tokens == 3 + 2 + 1 + 3
    for batch in drawn.batches(3):
        assert len(set(batch["fold"].tolist())) == 1


def test_short_documents_count_by_their_tokens(tokenizer):
    """A hundred sentences of four tokens are no hundred sequences of forty."""
    documents = [f"{index:04}" for index in range(400)]
    drawn = draw(
        [documents[:200], documents[200:]], tokenizer, samples=20, seq_len=40, packed=False
    )
    assert drawn.tokens == 800 and len(drawn) == 200
    assert drawn.fold.bincount().tolist() == [100, 100]
    firsts = drawn.input_ids[:, 0] == drawn.input_ids[0, 0]
    assert 0 < firsts.sum() <= len(firsts)
    long = [str(index) * 500 for index in range(1, 9)] * 3
    few = draw([long], tokenizer, samples=16, seq_len=40, packed=False)
    assert few.tokens == 640 and len(few) == 16


LETTERS = string.ascii_lowercase


def lengths_by_fold(drawn: Sequences) -> list[list[int]]:
    lengths = drawn.attention_mask.sum(1)
    return [sorted(lengths[drawn.fold == fold].tolist()) for fold in (0, 1)]


def test_a_sixteenth_of_the_tokens_of_short_documents_fills_whole_sequences(tokenizer):
    """Else an encoder that is given sentences never sees the positions that pages have."""
    short = [4 * letter for letter in LETTERS for _ in range(400)]
    drawn = draw([short], tokenizer, samples=64, seq_len=32, packed=False)
    for own in lengths_by_fold(drawn):
        assert own == 240 * [4] + 2 * [32], "64 of 1,024 tokens"
    long = drawn.input_ids[drawn.attention_mask.sum(1) == 32]
    ends = tokenizer("\n")["input_ids"][0]
    for row in long:  # six documents and a half, one after another
        assert (row == ends).nonzero().flatten().tolist() == [4, 9, 14, 19, 24, 29]
    firsts = drawn.attention_mask[drawn.fold == 0].sum(1).tolist()
    assert firsts[:2] != [32, 32], "they are mixed in, as several texts are drawn from in turn"


def test_a_sixteenth_of_the_tokens_of_long_documents_is_in_short_pieces(tokenizer):
    pages = [200 * f"{letter}{letter}{letter} " for letter in LETTERS for _ in range(4)]
    drawn = draw([pages], tokenizer, samples=64, seq_len=64, packed=False)
    for own in lengths_by_fold(drawn):
        assert sum(own[:-30]) >= 128 and set(own[:-30]) <= {15, 16} and own[-30:] == 30 * [64]
    pieces = drawn.input_ids[drawn.attention_mask.sum(1) < 64, 0].tolist()
    assert len(set(pieces)) > len(pieces) / 2, "each is of another document"


def test_blank_documents_have_no_pieces(tokenizer):
    """They would be cut for ever."""
    blank = [*LETTERS, *(900 * " " for _ in LETTERS)]
    drawn = draw([blank], tokenizer, samples=64, seq_len=64, packed=False)
    assert drawn.attention_mask.sum(1).unique().tolist() == [1, 64]


def test_an_encoder_reads_no_more_of_a_document_than_its_tokenizer(tokenizer, monkeypatch):
    """Positions that are never used would get most of the tokens."""
    pages = [60 * f"{letter}{number} " for letter in LETTERS for number in range(9)]
    asked = {"samples": 64, "judge": 8, "certify": 12}
    expected = draw([pages], tokenizer, seq_len=8, packed=False, **asked)
    monkeypatch.setattr(tokenizer, "model_max_length", 8)
    fewer = {name: number // 4 for name, number in asked.items()}
    found = draw([pages], tokenizer, seq_len=32, packed=False, **fewer)
    for part in (lambda x: x, lambda x: x.judging, lambda x: x.certification):
        assert torch.equal(part(found).input_ids, part(expected).input_ids)
    assert found.tokens == 16 * 32
    assert draw([pages], tokenizer, seq_len=32, **fewer).input_ids.shape[1] == 32, "joined pages"
    held_out = texts.evaluation_sequences(pages, tokenizer, seq_len=32, packed=False)
    assert held_out.input_ids.shape[1] == 8


@pytest.mark.parametrize("longest", ["128", 1, 0, -4, True, None, [8], float("nan")])
def test_a_tokenizer_with_a_length_that_is_none_is_refused(tokenizer, monkeypatch, longest):
    monkeypatch.setattr(tokenizer, "model_max_length", longest)
    with pytest.raises(InputError, match="cuts texts after .* tokens; set its model_max_length"):
        draw([[*LETTERS]], tokenizer, samples=4, seq_len=8, packed=False)


@pytest.mark.parametrize(("size", "seq_len"), [(300, 24), (100, 32)])
def test_other_lengths_split_no_document_between_the_folds(tokenizer, size, seq_len):
    documents = [letter * size for letter in LETTERS]
    drawn = draw([documents], tokenizer, samples=64, seq_len=seq_len, packed=False)
    own = [set(drawn.input_ids[drawn.fold == fold].flatten().tolist()) for fold in (0, 1)]
    assert not own[0] & own[1] & set(tokenizer(LETTERS)["input_ids"])


def test_little_text_has_no_sequences_of_other_lengths(tokenizer):
    """A lone sequence would be much of it."""
    words = [4 * letter for letter in LETTERS]
    drawn = draw([words], tokenizer, samples=64, seq_len=32, packed=False)
    assert len(drawn) == 26 and drawn.attention_mask.sum(1).eq(4).all()


def test_sequences_of_like_length_share_a_batch_without_more_padding_than_they_need(tokenizer):
    words = ["a" * length for length in (30, 1, 7, 2, 30, 1, 7, 2)]
    drawn = draw([words], tokenizer, samples=8, seq_len=32, packed=False)
    batches = drawn.batches(2)
    lengths = [batch["attention_mask"].sum(1).tolist() for batch in batches]
    for batch, each in zip(batches, lengths, strict=True):
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(each), max(each))
        assert each == sorted(each)
    assert sorted(sum(lengths, [])) == sorted(map(len, words))
    full = draw([["ab " * 400]], tokenizer, samples=8, seq_len=8)
    rows = torch.cat([batch["input_ids"] for batch in full.batches(3)])
    assert torch.equal(rows, full.input_ids)


def test_documents_without_their_list_are_no_sources(tokenizer):
    """Else each character would be a document."""
    with pytest.raises(InputError, match="a source is a list of documents, got text"):
        draw(["ab " * 400, "cd " * 400], tokenizer)


def test_a_short_document_beside_a_long_one_is_a_part_alone(tokenizer):
    with pytest.raises(InputError, match=r"in 2 document\(s\) .*, as each goes to one part alone"):
        draw([["ab " * 4000, "short"]], tokenizer, samples=4, seq_len=64)


def test_a_window_has_room_beside_its_special_tokens(with_bos):
    with pytest.raises(InputError, match="seq_len must exceed 1 special tokens, got 1"):
        texts.evaluation_sequences(["abc" * 20], with_bos, seq_len=1)


@pytest.mark.parametrize("documents", [["abc"], ["abc", "def"]])
def test_too_short_to_calibrate(tokenizer, documents):
    with pytest.raises(InputError, match="too short: .* give more text or a smaller seq_len"):
        draw([documents], tokenizer, samples=4, seq_len=64)
    with pytest.raises(InputError, match="does not fill one window of 64 tokens"):
        texts.evaluation_sequences(documents, tokenizer, seq_len=64)


def test_evaluation_windows_spread_over_the_text(tokenizer):
    text = "".join(letter * 10 for letter in "abcdefgh")
    windows = texts.evaluation_sequences([text], tokenizer, seq_len=10, samples=4)
    assert tokenizer.decode(windows.input_ids[:, 0]).replace(" ", "") == "aceg"


@given(
    pieces=st.lists(st.sampled_from(["word", " ", "\n", "\n\n", "x" * 40, "é. "]), max_size=400),
    parts=st.sampled_from([2, 3]),
    seq_len=st.sampled_from([2, 5]),
)
@settings(max_examples=60, deadline=None)
def test_blocks_follow_one_another_and_never_touch(pieces, parts, seq_len):
    text = "".join(pieces)
    spans = block_spans(text, parts, seq_len)
    assert len(spans) % parts == 0
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    if len(text) < 20 * len(spans):
        return
    for (start, end), (following, _) in zip(spans, spans[1:], strict=False):
        assert start < end < following
        assert following - end <= len(text) / len(spans) / 4 + 2


def test_random_tokens_come_beside_the_text(tokenizer):
    documents = [letter * 40 for letter in "abcdefgh"]
    settings = {"samples": 24, "seq_len": 8, "seed": 3}
    text = draw([documents], tokenizer, **settings)
    drawn = draw([documents], tokenizer, **settings, random_tokens=0.25)
    assert len(text) == 24 and len(drawn) == 32
    assert torch.equal(drawn.input_ids[:24], text.input_ids)
    assert torch.equal(drawn.fold[:24], text.fold)
    assert drawn.source.tolist() == 24 * [0] + 8 * [-1]
    assert drawn.fold[24:].bincount().tolist() == [4, 4]
    plain = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    assert set(drawn.input_ids[24:].flatten().tolist()) <= plain
    assert len(drawn.input_ids[24:].unique()) > 15  # of 64 draws
    again = draw([documents], tokenizer, **settings, random_tokens=0.25)
    assert torch.equal(again.input_ids, drawn.input_ids)
    # Beside other text there are others, so that shards of one seed don't count them twice.
    other = draw(
        [[each[::-1] + "z" for each in documents]], tokenizer, **settings, random_tokens=0.25
    )
    assert not torch.equal(other.input_ids[24:], drawn.input_ids[24:])
    few = draw([documents], tokenizer, **settings, random_tokens=0.25, vocab_size=6)
    assert few.input_ids[24:].max() < 6 <= few.input_ids[:24].max()
    # Sensitivities are measured on text, and on what there is where there is none.
    batches = drawn.batches(4)
    assert sum(len(each["input_ids"]) for each in probe_batches(batches)) >= 8
    on = torch.cat([each["input_ids"] for each in probe_batches(batches)])
    assert all((row == text.input_ids).all(1).any() for row in on)
    alone = [{**each, "source": torch.full_like(each["source"], -1)} for each in batches]
    assert probe_batches(alone)


def of_bert(tokenizer, *reads):
    """Return the tokenizer as BERT's is, whose model may read token types, too."""
    tokenizer = deepcopy(tokenizer)  # other tests share it
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    names = ("[CLS]", "[SEP]")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names],
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask", *reads]
    return tokenizer


@pytest.mark.parametrize("reads", [(), ("token_type_ids",)])
def test_pairs_are_what_the_tokenizer_makes_of_both_texts(tokenizer, reads):
    tokenizer = of_bert(tokenizer, *reads)
    pairs = [Pair(a, b * 9) for a in string.ascii_lowercase for b in string.ascii_lowercase]
    drawn = draw([pairs], tokenizer, samples=64, seq_len=10, packed=False, judge=2)
    held_out = texts.evaluation_sequences(pairs, tokenizer, seq_len=10, packed=False)
    wanted = [tokenizer(*each.texts, truncation=True, max_length=10) for each in pairs]
    assert drawn.input_ids.shape[1] == 10  # and none is of joined or shorter texts
    firsts = [drawn.judging.input_ids, *(drawn.input_ids[drawn.fold == fold] for fold in (0, 1))]
    firsts = [{*rows[:, 1].tolist()} for rows in firsts]  # after [CLS], one letter
    assert all(firsts) and sum(map(len, firsts)) == len(set.union(*firsts))
    for found, whole in ((drawn, False), (drawn.judging, False), (held_out, True)):
        assert found.inputs.keys() == {"input_ids", "attention_mask", *reads}
        for batch in found.batches(3):
            assert {*reads} <= batch.keys()
        rows = [
            {n: row.tolist() for n, row in zip(found.inputs, each, strict=True)}
            for each in zip(*found.inputs.values(), strict=True)
        ]
        assert all(row in [dict(each) for each in wanted] for row in rows)
        assert not whole or rows == [dict(each) for each in wanted]
    assert texts.evaluation_sequences(pairs[:1], tokenizer, packed=False).input_ids.shape[0] == 1
    alike = draw([pairs[:26]], tokenizer, samples=8, seq_len=10, packed=False)  # one first text
    assert {*alike.fold.tolist()} == {0, 1}
    with pytest.raises(InputError, match="1 pair.s. of texts are too few for 2 parts"):
        draw([pairs[:1]], tokenizer, packed=False)


def test_pairs_and_texts_may_lie_in_one_file(tokenizer):
    tokenizer = of_bert(tokenizer, "token_type_ids")
    found = texts.evaluation_sequences(["ab", Pair("a", "b")], tokenizer, packed=False).inputs
    assert found["token_type_ids"].tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]


def test_random_tokens_leave_special_ones_in_their_place(tokenizer):
    words = ["a b", "abc " * 9, "cab"] * 8
    tokenizer = of_bert(tokenizer)
    drawn = draw([words], tokenizer, samples=8, seq_len=12, packed=False, random_tokens=0.5)
    random = drawn.source == -1
    assert 2 * int(random.sum()) == len(drawn)
    special = torch.tensor(tokenizer.all_special_ids)
    for row, mask in zip(drawn.input_ids[random], drawn.attention_mask[random], strict=True):
        ids = row[mask.bool()]
        assert torch.isin(ids[[0, -1]], special).all() and not torch.isin(ids[1:-1], special).any()
    assert drawn.attention_mask[random].sum() < random.sum() * 12  # as long as text is


@pytest.mark.parametrize("fraction", [-0.1, 0.999999, float("nan")])
def test_a_fraction_of_random_tokens_that_cannot_be(tokenizer, fraction):
    with pytest.raises(InputError, match=r"random_tokens must be in \[0, 0.9\], got"):
        draw([["ab" * 300] * 9], tokenizer, random_tokens=fraction)


def test_encoders_are_evaluated_on_documents(tokenizer):
    documents = [character * 4 for character in "abcdefgh"] + ["i" * 40]
    found = texts.evaluation_sequences(documents, tokenizer, seq_len=10, packed=False)
    assert found.attention_mask.sum(1).tolist() == [4] * 8 + [10]
    some = texts.evaluation_sequences(documents, tokenizer, seq_len=10, samples=4, packed=False)
    assert [tokenizer.decode(row[:1]) for row in some.input_ids] == ["a", "c", "e", "g"]
    # Of a lone document an encoder would read the beginning alone.
    lone = texts.evaluation_sequences(["ab " * 40], tokenizer, seq_len=10, packed=False)
    assert lone.input_ids.shape == (4, 10)  # pieces of 40 characters at most
