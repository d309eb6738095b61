"""Images with text: lines of a file and what is wrong with them, and inputs by a processor."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from calibration.test_media import write_pictures
from seeing import SEEING, TEMPLATE, read_by, seeing_model, seeing_processor, write_examples
from tiny import outputs, tiny
from transformers import CLIPProcessor

from liar_ext import InputError, calibrate, perplexity
from liar_ext.calibration.batches import read_batches
from liar_ext.calibration.documents import check_apart, document_digests, text_digest
from liar_ext.calibration.image_text import (
    Example,
    ImageTextReader,
    holds_images,
    read_examples,
)
from liar_ext.calibration.media import calibration_inputs, decode_image, evaluation_inputs


def write_lines(path, *lines):
    path.write_text(
        "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
    )
    return path


def chat(*parts, answer="abc"):
    content = [{"type": "text", "text": each} if isinstance(each, str) else each for each in parts]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def test_a_line_is_images_with_text_or_a_chat(tmp_path):
    pixels = write_pictures(tmp_path / "sub", 3)
    named = {"type": "image", "path": "sub/01.png"}
    path = write_lines(
        tmp_path / "a.jsonl",
        {"image": "sub/00.png", "text": "a picture"},
        "",
        {"images": ["sub/../sub/02.png", "sub/00.png"], "text": "two"},
        {"images": ["sub/00.png"], "messages": chat({"type": "image"}, named, "what?")},
        {"text": "text alone"},
        {"messages": [{"role": "user", "content": "hello"}]},
    )
    files = read_examples(path)
    found = [[item.content.name for item in each.images] for each in files.items]
    assert found == [["00.png"], ["02.png", "00.png"], ["00.png", "01.png"], [], []]
    assert [each.place[-6:] for each in files.items] == [f"line {n}" for n in (1, 3, 4, 5, 6)]
    assert [each.text for each in files.items] == ["a picture", "two", "", "text alone", ""]
    (first, *_), third = files.items[0].images, files.items[2]
    assert np.array_equal(np.asarray(decode_image(first)), pixels[0])
    assert third.messages[0]["content"][:2] == 2 * [{"type": "image"}]
    # By its images a line is told apart, and a file by its text as well.
    assert files[0] != files[1] and len(set(files)) == 5
    other = read_examples(write_lines(tmp_path / "b.jsonl", {"image": "sub/00.png", "text": "b"}))
    assert other[0] == files[0]
    with pytest.raises(InputError, match="1 of 1 documents are in the calibration text too"):
        check_apart(document_digests(files), other)
    changed = read_examples(write_lines(tmp_path / "b.jsonl", {"image": "sub/00.png", "text": "c"}))
    assert list(changed) == list(other) and text_digest(changed) != text_digest(other)


def test_captioned_pictures_and_datasets(tmp_path, monkeypatch):
    import datasets

    write_pictures(tmp_path / "a", 2)
    (tmp_path / "a/00.txt").write_text("one\n")
    with pytest.raises(InputError, match=r"01.png has no text.*NAME.txt, or give a .jsonl"):
        read_examples(tmp_path / "a")
    (tmp_path / "a/01.txt").write_text("two\n")
    assert [each.text for each in read_examples(tmp_path / "a").items] == ["one", "two"]
    rows = [{"bytes": (tmp_path / f"a/0{n}.png").read_bytes(), "path": None} for n in range(2)]
    made = datasets.Dataset.from_dict({"image": rows, "caption": ["x", "y"]})
    made = made.cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    assert holds_images("org/name")
    assert [each.text for each in read_examples("org/name").items] == ["x", "y"]


def test_which_sources_hold_images(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_pictures(tmp_path / "pictures", 1)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("text")
    said = '{"text": "a line that says \\"image\\": nothing more"}'
    late = write_lines(tmp_path / "late.jsonl", {"text": "a"}, {"image": "a.png", "text": "b"})
    plain = write_lines(tmp_path / "plain.jsonl", said, 'no JSON, but "image"')
    some = (late, tmp_path / "pictures", tmp_path / "pictures/00.png")
    assert all(holds_images(str(each)) for each in some)
    others = (plain, tmp_path / "text", tmp_path / "text/a.txt", tmp_path / "gone.jsonl", "self")
    assert not any(holds_images(str(each)) for each in (*others, "no/such"))
    with pytest.raises(InputError, match="holds no images, which the model reads"):
        read_examples(tmp_path / "text")


WRONG = [
    ("{", "line 2: it is no JSON object; write"),
    ("[" * 100_000, "line 2: it is no JSON object; write"),
    ("[1]", "line 2: it is no JSON object; write"),
    ({"image": "a.png"}, "line 2: it must have a text beside its image"),
    ({"image": "a.png", "text": "  "}, "line 2: it must have a text"),
    ({"image": "a.png", "text": "\ud800"}, "line 2 must be Unicode"),
    ({"image": 3, "text": "a"}, "line 2: it must name an image by its path, got int"),
    ({"images": None, "image": "gone.png", "text": "a"}, "'gone.png', which is no file"),
    ({"image": [3], "text": "a"}, "line 2: it must name an image by its path, got int"),
    ({"image": "", "text": "a"}, "line 2: it names the image '', which is no file below"),
    ({"image": "x" * 5000, "text": "a"}, "the image 'x+...', which is no file"),
    ({"image": "a\0.png", "text": "a"}, "which is no file below"),
    ({"image": "https://host/a.png", "text": "a"}, "which is no file below"),
    ({"image": "../out.png", "text": "a"}, "'../out.png', which is outside of the folder"),
    ({"image": "sub/../../out.png", "text": "a"}, "which is outside of the folder"),
    ({"image": "/etc/passwd", "text": "a"}, "names .* which is outside of the folder"),
    ({"messages": []}, "line 2: 0 of its images are in none of 0 messages; write .* messages"),
    ({"messages": ["a"]}, "line 2: .*; write"),
    ({"messages": [{"content": "a"}]}, "line 2: 'role'; write"),
    ({"messages": [{"role": "user", "content": 3}]}, "line 2: .*; write"),
    ({"messages": chat({"type": "video", "video": "a.mp4"})}, "parts of type text or image"),
    ({"messages": chat({"type": "image"})}, "an image without a path, and it names none"),
    ({"messages": chat("a"), "image": "a.png"}, "1 of its images are in none of 2 messages"),
    ({"messages": chat({"type": "image", "url": "http://host/a"})}, "which is no file below"),
    ({"messages": chat({"type": "image", "image": "../out.png"})}, "outside of the folder"),
]


@pytest.mark.parametrize(("line", "said"), WRONG, ids=[said[:40] for _, said in WRONG])
def test_what_is_wrong_with_a_line(tmp_path, line, said):
    write_pictures(tmp_path, 1)  # outside of the folder of the file
    os.rename(tmp_path / "00.png", tmp_path / "out.png")
    (tmp_path / "in").mkdir()
    write_pictures(tmp_path / "in", 1)
    os.rename(tmp_path / "in/00.png", tmp_path / "in/a.png")
    path = write_lines(tmp_path / "in/a.jsonl", {"image": "a.png", "text": "a"}, line)
    with pytest.raises(InputError, match=said) as caught:
        read_examples(path)
    assert len(str(caught.value)) < 600 and "; " in str(caught.value)


def test_a_picture_that_is_none(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG and nothing else")
    path = write_lines(tmp_path / "a.jsonl", {"text": "a"}, {"image": "a.png", "text": "b"})
    reader = ImageTextReader(seeing_model("llava"), seeing_processor("llava"))
    with pytest.raises(InputError, match="line 2, image 'a.png', can't be read as an image"):
        evaluation_inputs(read_examples(path), reader)


def test_what_shares_a_picture_shares_a_fold(tmp_path):
    write_examples(tmp_path, 8, lines=3)
    files = read_examples(tmp_path / "examples.jsonl")
    assert len(files) == 24 and len(set(files)) == 8
    reader = ImageTextReader(seeing_model("llava"), seeing_processor("llava"))
    for samples, counts in ((12, [6, 6]), (10, [5, 5])):
        drawn = calibration_inputs([files], reader, samples=samples, seed=1)
        assert drawn.fold.bincount().tolist() == counts
        pictures = {
            fold: {bytes(each["pixel_values"].numpy()) for each in batches}
            for fold in (0, 1)
            if (batches := [b for b in drawn.batches() if int(b["fold"]) == fold])
        }
        assert pictures[0].isdisjoint(pictures[1])
    one = read_examples(
        write_lines(tmp_path / "one.jsonl", *4 * [{"image": "00.png", "text": "a"}])
    )
    with pytest.raises(InputError, match="too few for two folds"):
        calibration_inputs([one], reader, samples=4)


@pytest.mark.parametrize("name", SEEING)
def test_inputs_are_those_of_the_processor(name, tmp_path):
    write_examples(tmp_path, 2)
    question = chat({"type": "image"}, "what is this", answer="a dog")
    path = write_lines(
        tmp_path / "a.jsonl",
        {"image": "00.png", "text": "a cat"},
        {"image": "01.png", "messages": question},
        {"text": "no image"},
    )
    model, processor = seeing_model(name), seeing_processor(name)
    files = read_examples(path)
    found = evaluation_inputs(files, ImageTextReader(model, processor)).batches()
    assert [batch["input_ids"].shape[0] for batch in found] == [1, 1, 1]
    first, second = (decode_image(each.images[0]) for each in files.items[:2])
    holder = SEEING[name].placeholder
    by_hand = processor(images=[first], text=[f"{holder}a cat"], return_tensors="pt")
    prompt = TEMPLATE.format(f"{holder}what is this", "a dog")
    chatted = processor(images=[second], text=[prompt], return_tensors="pt")
    for batch, expected in zip(found, (by_hand, chatted), strict=False):
        assert batch.keys() - {"fold", "source"} == expected.keys()
        for key, value in expected.items():
            assert torch.equal(batch[key], value.to(batch[key].dtype)), key
        placeholders = int((batch["input_ids"] == model.config.image_token_id).sum())
        assert placeholders == SEEING[name].tokens
    assert "pixel_values" not in found[2]
    with torch.no_grad():
        for batch in read_batches(found):
            assert model(**batch.inputs).logits.isfinite().all()


def test_sums_hold_the_tokens_of_images(tmp_path):
    """The Gram matrix of a site is that of all tokens, by a hook of this test."""
    write_examples(tmp_path, 4)
    model = seeing_model("llava").double()
    batches = read_by(model, "llava", tmp_path / "examples.jsonl").batches()
    bank, seen = calibrate(model, batches), []
    consumer = model.model.language_model.layers[1].mlp.down_proj
    with torch.no_grad(), _noting(consumer, seen):
        for batch in read_batches(batches):
            model(**batch.inputs)
    rows = torch.cat([x.flatten(0, 1) for x in seen])
    placeholders = sum(int((b["input_ids"] == model.config.image_token_id).sum()) for b in batches)
    assert placeholders == 4 * SEEING["llava"].tokens
    assert len(rows) == bank.source["tokens"] == sum(b["input_ids"].numel() for b in batches)
    gram = bank["1.mlp"].gram.sum(0)
    torch.testing.assert_close(gram.tril(), (rows.T @ rows).tril())


def _noting(module, seen):
    return module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))


def test_perplexity_asks_for_no_placeholder(tmp_path):
    write_examples(tmp_path, 3)
    model = seeing_model("llava")
    batches = read_by(model, "llava", tmp_path / "examples.jsonl").batches()
    found = perplexity(model, batches)
    loss, count = 0.0, 0
    for batch in read_batches(batches):
        ids, logits = batch.inputs["input_ids"][0], outputs(model, batch.inputs)[0].double()
        for at in range(1, len(ids)):
            if ids[at] != model.config.image_token_id:
                loss, count = loss - float(logits[at - 1].log_softmax(-1)[ids[at]]), count + 1
    assert found["tokens"] == count and found["sequences"] == 3
    assert found["perplexity"] == pytest.approx(np.exp(loss / count), rel=1e-5)
    blind = [{"input_ids": batch["input_ids"]} for batch in batches]
    assert perplexity(model, blind)["perplexity"] != pytest.approx(found["perplexity"], rel=1e-5)


def test_what_a_processor_cannot_read(tmp_path):
    write_pictures(tmp_path, 1)
    model, processor = seeing_model("llava"), seeing_processor("llava")
    reader = ImageTextReader(model, processor)

    def refused(**line) -> str:
        path = write_lines(tmp_path / "a.jsonl", {"text": "a"}, line)
        with pytest.raises(InputError) as caught:
            evaluation_inputs(read_examples(path), reader)
        return str(caught.value)

    assert "LlavaProcessor can't read" in refused(image="00.png", text="<image><image> two")
    long = refused(image="00.png", text="abc " * 20)
    assert "a.jsonl line 2 is 84 tokens with its images" in long and "64 positions" in long
    processor.chat_template = None
    assert "line 2" in refused(messages=[{"role": "user", "content": "a"}])
    processor.chat_template = "{{ raise_exception('no such role') }}"
    assert "no such role; change the line" in refused(messages=[{"role": "x", "content": "a"}])


def test_towers_side_by_side_read_a_text_beside_an_image(tmp_path, tokenizer):
    from transformers import CLIPImageProcessorPil

    write_examples(tmp_path, 2)
    model, sizes = tiny("clip"), {"height": 8, "width": 8}
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=sizes)
    reader = ImageTextReader(model, CLIPProcessor(images, tokenizer))
    drawn = evaluation_inputs(read_examples(tmp_path / "examples.jsonl"), reader)
    for batch in read_batches(drawn.batches()):
        assert batch.inputs.keys() >= {"input_ids", "pixel_values"}
        with torch.no_grad():
            assert model(**batch.inputs).image_embeds.isfinite().all()
    assert Example("a", text="b").said == "b"
