"""A model with fewer tokens computes what the whole model does for those that stay."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from covers import some
from tiny import MORE, TINY, VOCAB, batches, outputs, tiny, tiny_inputs

from liar_ext import load_pruned, prune, save_pruned
from liar_ext.system.errors import InputError
from liar_ext.vocabulary.keep import needed_tokens, slice_tokens, token_parameters

IMAGES = ("vit", "dinov2", "dinov2_swiglu", "dinov3_vit", "dinov3_vit gated")
IMAGES += ("clip_vision_model", "siglip image classes", "siglip_vision_model")
# Tied heads and others, biases of heads, two stacks, images, experts, tables of other sizes.
QUICK = "llama gpt2 bert roberta albert t5 bart marian whisper llava gemma4 opt clip".split()
FAMILIES = [name for name in {**TINY, **MORE} if name not in IMAGES]


def has_text(model) -> bool:
    return any(name.endswith("input_ids") for name in tiny_inputs(model))


def kept_tokens(model) -> list[int]:
    """Return the tokens that tests keep: those that the config names, and every other one."""
    known = {at for at in needed_tokens(model) if at < VOCAB}
    return sorted(known | {0, 1, 2} | set(range(0, VOCAB, 2)))


def both_inputs(model, kept: list[int]) -> tuple[dict, dict]:
    """Return inputs of tokens that stay, by their old ids and by the new ones."""
    old, new = tiny_inputs(model), {}
    plain = [at for at in kept if at > 2 and at not in needed_tokens(model)]
    for name, value in old.items():
        new[name] = value
        if name.endswith("input_ids"):
            old[name] = torch.tensor(plain)[value % len(plain)]
            # Images and ends of texts are where they were.
            special = torch.isin(value, torch.tensor(sorted(needed_tokens(model)) or [-1]))
            old[name] = torch.where(special, value, old[name])
            new[name] = torch.searchsorted(torch.tensor(kept), old[name])
    return old, new


@some("family", FAMILIES, *QUICK)
def test_outputs_are_those_of_the_kept_tokens(family, tmp_path):
    model = tiny(family)
    if not has_text(model):
        pytest.skip("reads no text")
    kept = kept_tokens(model)
    old, new = both_inputs(model, kept)
    expected = outputs(model, old)
    if expected.shape[-1] == VOCAB:
        expected = expected[..., kept]
    smaller = copy.deepcopy(model)
    slice_tokens(smaller, kept)
    torch.testing.assert_close(outputs(smaller, new), expected, rtol=1e-5, atol=1e-5)
    # Plain transformers loads it: config and weights agree.
    smaller.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(again, new), expected, rtol=1e-5, atol=1e-5)
    assert again.config.get_text_config().vocab_size == len(kept)
    rows = {again.state_dict()[name].shape[dim] for name, dim in token_parameters(again).items()}
    assert rows == {len(kept)}


def test_tied_weights_stay_tied():
    model = tiny("llama")
    slice_tokens(model, list(range(0, VOCAB, 3)) + [1, 2])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_ids_are_renumbered_everywhere():
    model = tiny("bart")
    config, generation = model.config, model.generation_config
    config.eos_token_id, config.forced_eos_token_id = 10, 10
    config.image_token_index = 20
    generation.eos_token_id = [10, 12]
    generation.suppress_tokens = [10, 11, 30]
    generation.bad_words_ids = [[11], [12, 30]]
    generation.forced_decoder_ids = [[1, 12]]
    generation.lang_to_id = {"<|en|>": 30}
    kept = [0, 1, 2, 10, 12, 20, 30, 31, 32]
    assert needed_tokens(model) <= set(kept)
    slice_tokens(model, kept)
    assert (config.eos_token_id, config.forced_eos_token_id) == (3, 3)
    assert config.image_token_index == 5
    assert generation.eos_token_id == [3, 4]
    assert generation.suppress_tokens == [3, 6]  # what is gone needs no ban
    assert generation.bad_words_ids == [[4, 6]]
    assert generation.forced_decoder_ids == [[1, 4]]  # the first number is a position
    assert generation.lang_to_id == {"<|en|>": 6}
    assert config.vocab_size == len(kept)


def test_a_generation_config_that_nobody_may_change_is_renumbered(tmp_path):
    """transformers loads a temperature without sampling, and refuses to write it if it changed."""
    said = {"do_sample": False, "temperature": 0.6, "eos_token_id": 30}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    model = tiny("llama")
    model.generation_config = transformers.GenerationConfig.from_pretrained(tmp_path)
    slice_tokens(model, [0, 1, 2, 3, 30])
    model.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (written["eos_token_id"], written["temperature"]) == (4, 0.6)


def test_a_token_that_the_config_names_must_stay():
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="names token 2 in its config"):
        slice_tokens(model, [0, 1, 5])
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_positions_that_are_counted_from_padding_keep_its_number():
    model = tiny("roberta", pad_token_id=1)
    model.config.bos_token_id = None
    with pytest.raises(InputError, match="counts positions from its padding token 1"):
        slice_tokens(model, [1, 2, 5])
    slice_tokens(model, [0, 1, 2, 5])
    assert model.roberta.embeddings.word_embeddings.padding_idx == 1


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_a_model_without_tokens_is_refused(family):
    with pytest.raises(InputError, match="in no single vocab_size"):
        token_parameters(tiny(family))


def test_a_head_of_another_number_of_tokens_is_refused():
    model = tiny("mistral")
    model.lm_head = torch.nn.Linear(40, VOCAB + 3, bias=False)
    with pytest.raises(InputError, match="has a table of tokens of another size"):
        slice_tokens(model, [0, 1, 2, 3])


def test_rows_beyond_the_tokenizer_go(tmp_path):
    """Models are padded to a multiple of 64 or more; nothing reads those rows."""
    model = tiny("llama", vocab_size=128)
    slice_tokens(model, list(range(VOCAB)))
    assert model.get_output_embeddings().weight.shape[0] == VOCAB
    assert model.get_output_embeddings().out_features == VOCAB


def test_a_model_that_was_pruned_before(tmp_path):
    model = tiny("llama")
    report = prune(model, batches(model), keep=0.6, schedule="one-pass")
    kept = kept_tokens(model)
    old, new = both_inputs(model, kept)
    expected = outputs(model, old)[..., kept]
    slice_tokens(model, kept)
    save_pruned(model, tmp_path / "out", report=report)
    again = load_pruned(tmp_path / "out")
    torch.testing.assert_close(outputs(again, new), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(again, transformers.LlamaForCausalLM)
