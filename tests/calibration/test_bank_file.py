"""The file of a moment bank: what comes back, what adds up, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from tiny import VOCAB, tiny, tiny_inputs

from liar_ext import InputError, MomentBank, calibrate, sites
from liar_ext.calibration import bank as bank_file
from liar_ext.calibration import saved_sums
from liar_ext.system.files import atomic_write


def batches(seed: int = 0, ragged: bool = True) -> list[dict[str, torch.Tensor]]:
    """Return batches of several widths, with masks, folds and sources."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows, tokens in ((3, 9), (2, 5)) if ragged else ((4, 8),):
        ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "fold": torch.arange(rows) % 2}
        found.append(batch | {"source": torch.arange(rows) % 2})
    return found


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def test_everything_comes_back(model, tmp_path):
    data = batches()
    bank = calibrate(model, data)
    bank.save(tmp_path / "bank")
    read = MomentBank.load(tmp_path / "bank")
    assert bank == read and read.source == bank.source
    assert bank != calibrate(model, batches(1))
    assert torch.equal(read.sequences, bank.sequences) and len(read.sequences) == 5
    for kept, given in zip(read.text, data, strict=True):
        assert kept.keys() == given.keys()
        assert all(torch.equal(kept[name], given[name]) for name in given)
    facts = read.source
    assert facts["dtype"] == "float32" and facts["seq_len"] == 9 and facts["sequences"] == 5
    assert facts["sites"]["0.mlp"] == {"unit": "channel", "units": 24, "width": 1, "groups": 1}
    # Of two folds there are two triangles, and no square.
    d = sum(bank[name].d_in ** 2 for name in bank)
    assert (tmp_path / "bank").stat().st_size < 8 * d * 1.2 + 8000


@pytest.mark.parametrize("how", ["no masks", "pictures", "labels", "left out"])
def test_what_is_no_text_is_not_kept(how, tmp_path):
    model = tiny("vit" if how == "pictures" else "llama")
    data = [tiny_inputs(model, batch=4, seed=seed) for seed in range(2)]
    if how == "no masks":
        data = [batch["input_ids"] for batch in data]
    if how == "labels":
        data = [batch | {"labels": batch["input_ids"]} for batch in data]
    bank = calibrate(model, data, keep_text=how != "left out")
    bank.save(tmp_path / "bank")
    read = MomentBank.load(tmp_path / "bank")
    assert len(read.sequences) == 8 and bank == read
    if how == "no masks":
        assert [batch.keys() for batch in read.text] == [{"input_ids", "fold"}] * 2
    else:
        assert read.text is None
        if how == "left out":
            assert not any("text/" in key for key in keys(tmp_path / "bank"))


def keys(path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_the_digest_of_a_sequence_is_that_of_its_tokens(model):
    """Padding, fold and the batch that it stands in don't count; each token does."""
    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.tensor([[1] * 4 + [0] * 2, [1] * 6])
    one = calibrate(model, [{"input_ids": ids, "attention_mask": mask}])
    other = calibrate(model, [ids[1:], ids[:1, :4]])
    assert one.sequences.tolist() == other.sequences.tolist()[::-1]
    assert one.sequences[0] not in calibrate(model, [ids, ids + 1]).sequences


def test_banks_add_up_in_any_order(model, tmp_path):
    parts = [calibrate(model, batches(seed)) for seed in range(3)]
    whole = calibrate(model, [batch for seed in range(3) for batch in batches(seed)])
    one, other = (calibrate(model, batches(seed)) for seed in (0, 1))
    one.merge(parts[1])
    other.merge(parts[0])
    assert one == other
    one.merge(parts[2])
    for name in whole:
        for ours, sums in zip(vars(one[name]).values(), vars(whole[name]).values(), strict=True):
            torch.testing.assert_close(ours, sums, rtol=1e-12, atol=1e-12)
        assert torch.equal(one[name].count, whole[name].count)
    assert one.source["sequences"] == 15 and one.source["tokens"] == whole.source["tokens"]
    assert sorted(one.sequences.tolist()) == sorted(whole.sequences.tolist())
    assert len(one.text) == 6 and torch.equal(one.text[2]["input_ids"], batches(1)[0]["input_ids"])
    for known, why in (
        (one, "15 sequences over the same text"),
        (parts[1], "5 sequences over the"),
    ):
        with pytest.raises(InputError, match=why):
            one.merge(known)


def test_sources_of_texts_keep_their_names(model):
    mine, theirs = batches(0), batches(1)
    theirs[1]["source"][0] = -1  # of random tokens
    one, other = calibrate(model, mine), calibrate(model, theirs)
    one.source["texts"], other.source["texts"] = ["a", "b"], ["b", "c"]
    one.merge(other)
    assert one.source["texts"] == ["a", "b", "c"]
    assert one.text[0]["source"].tolist() == [0, 1, 0]
    assert one.text[2]["source"].tolist() == [1, 2, 1]
    assert one.text[3]["source"].tolist() == [-1, 2]


def test_text_that_one_lacks_is_dropped(model):
    one, other = calibrate(model, batches(0)), calibrate(model, batches(1), keep_text=False)
    one.merge(other)
    assert one.text is None and len(one.sequences) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda: calibrate(tiny("llama", seed=3), batches(1)),
            "got model .*same weights",
        ),
        (lambda: calibrate(tiny("llama").double(), batches(1)), "got dtype float32 and float64"),
        (
            lambda: calibrate(tiny("llama"), batches(1), sites(tiny("llama"), attn_unit="head")),
            "same units at .*--attn-unit",
        ),
        (lambda: calibrate(tiny("llama"), batches(1), sites(tiny("llama"), ["mlp"])), "same sites"),
        (lambda: calibrate(tiny("llama"), batches(0)), "5 sequences over the same text"),
        (
            lambda: calibrate(tiny("llama"), [*batches(1), batches(0)[1]]),
            "2 sequences over",
        ),
    ],
)
def test_what_does_not_add_up_is_refused(model, change, message):
    bank = calibrate(model, batches(0))
    before = bank["0.mlp"].gram.clone(), dict(bank.source)
    with pytest.raises(InputError, match=f"MomentBank.merge: .*{message}"):
        bank.merge(change())
    assert torch.equal(bank["0.mlp"].gram, before[0]) and bank.source == before[1]


def test_other_tokenizers_are_refused_and_unknown_ones_are_not(model):
    one, other, third = (calibrate(model, batches(seed)) for seed in range(3))
    one.source["tokenizer"], other.source["tokenizer"] = "a", "b"
    with pytest.raises(InputError, match="got tokenizer a and b"):
        one.merge(other)
    one.merge(third)


def header_of(path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def put(path, header: dict, body: bytes) -> None:
    """Write a file with a seal that is right: what is wrong has to be found elsewhere."""
    from hashlib import blake2b

    text = json.dumps(header).encode()
    head = struct.pack("<Q", len(text)) + text + body[:-16]
    path.write_bytes(head + blake2b(head, digest_size=16).digest())


@pytest.mark.parametrize("place", ["header", "sums", "text", "seal", "cut"])
def test_a_file_that_was_changed_is_refused(model, place, tmp_path):
    path = tmp_path / "bank"
    calibrate(model, batches()).save(path)
    data = bytearray(path.read_bytes())
    header, body = header_of(path)
    if place == "header":
        data = data.replace(b"float32", b"float64")
    elif place == "cut":
        del data[-3:]
    else:
        name = {"sums": "0.mlp.gram", "text": "text/input_ids", "seal": "file/digest"}[place]
        data[len(data) - len(body) + header[name]["data_offsets"][0]] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"is damaged: .*(not those that were written|deserial)"):
        MomentBank.load(path)


DRAWN = {
    **{"texts": ["a"], "notes": [], "bos": "", "packed": True},
    **{"samples": 8, "seq_len": 9, "seed": 0, "batch_size": 3},
}
SOURCES = [
    {"sequences": True},
    {"tokens": -1},
    {"tokens": 1e3},
    {"seq_len": 2**70},
    {"model": 3},
    {"data": "abc"},
    {"texts": ["a\x1b[2J"]},
    {"relative": "0.mlp"},
    {"sites": {"0.mlp": {}}},
    {"sites": []},
    {"calibrations": [{"texts": []}]},
    {"calibrations": [DRAWN | {"packed": 1}]},
    {"sensitivities": [{"key": "k", "sites": {"0.mlp": float("nan")}}]},
    {"sensitivities": [{"key": "k", "sites": {"0.mlp": -1.0}}]},
    {"sensitivities": {}},
]


@pytest.mark.parametrize("facts", SOURCES, ids=str)
def test_facts_that_no_bank_has_are_refused(model, facts, tmp_path):
    path = tmp_path / "bank"
    calibrate(model, batches()).save(path)
    header, body = header_of(path)
    source = json.loads(header["__metadata__"]["source"]) | facts
    header["__metadata__"]["source"] = json.dumps(source)
    put(path, header, body)
    name = next(iter(facts))
    with pytest.raises(InputError, match=f"is damaged: facts: {name} can't be"):
        MomentBank.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text/input_ids", -5),
        ("text/batches", 0),
        ("text/batches", 2**31 - 1),
        ("text/fold", 2),
        ("text/attention_mask", 7),
    ],
)
def test_text_that_contradicts_itself_is_refused(model, name, value, tmp_path):
    path = tmp_path / "bank"
    calibrate(model, batches()).save(path)
    header, body = header_of(path)
    at = header[name]["data_offsets"][0]
    data = value.to_bytes(4 if header[name]["dtype"] == "I32" else 1, "little", signed=value < 0)
    put(path, header, body[:at] + data + body[at + len(data) :])
    with pytest.raises(InputError, match="MomentBank.load: .*damaged"):
        MomentBank.load(path)


def test_a_file_that_memory_cannot_hold_is_not_read(model, tmp_path, monkeypatch):
    path = tmp_path / "bank"
    calibrate(model, batches()).save(path)
    monkeypatch.setattr(saved_sums, "available_memory", lambda: 1000)
    monkeypatch.setattr(bank_file, "is_sealed", lambda _: pytest.fail("read"))
    with pytest.raises(InputError, match="GiB of memory.*are free"):
        MomentBank.load(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "ordinary file"), ("none", "no file"), ("", "ordinary file")):
        with pytest.raises(InputError, match=message):
            MomentBank.load(tmp_path / name)
    with pytest.raises(InputError, match="can't write .*nothing was left behind"):
        MomentBank({}, {}).save(tmp_path / "none" / "bank")


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as file:
        file.write(b"new")
        with atomic_write(path) as other:  # which leaves the first one's file alone
            other.write(b"newer")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "file"
    code = (
        "import sys, time; from liar_ext.system.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n    file.write(b'half'); file.flush()\n"
        "    print('written', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "written\n"
    with atomic_write(path) as file:  # while the other one lives
        file.write(b"mine")
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(100):  # its lock goes with it
        with atomic_write(path) as file:
            file.write(b"again")
        if len(list(tmp_path.iterdir())) == 1:
            break
        time.sleep(0.01)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"again"
