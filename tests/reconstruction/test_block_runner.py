from __future__ import annotations

import pytest
import torch
from seeing import seeing_inputs, seeing_model
from tiny import TINY, seen_at, tiny, tiny_inputs

from liar_ext import sites
from liar_ext.reconstruction.block_runner import Blocks, is_chain


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_blocks_run_one_by_one_are_the_model(name):
    model = tiny(name)
    inputs = tiny_inputs(model)
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, -3:] = 0
    every = sites(model)
    _, expected = seen_at(model, [every[-1].path], inputs)[every[-1].path]
    with Blocks(model, every).opened() as blocks:
        hidden = blocks.enter(0, inputs)[0][0]
        for index in range(len(blocks)):
            hidden = blocks.run(index, inputs, hidden).output
    assert torch.equal(hidden, expected[0] if isinstance(expected, tuple) else expected)


@torch.no_grad()
def test_what_the_model_adds_between_blocks_is_added():
    """Qwen3-VL adds features of images to what its first blocks put out."""
    model = seeing_model("qwen3_vl").double()
    inputs, every = seeing_inputs("qwen3_vl"), sites(model)
    assert is_chain(model, every, inputs)
    _, expected = seen_at(model, [every[-1].path], inputs)[every[-1].path]
    with Blocks(model, every).opened() as blocks:
        added = [blocks.enter(index, inputs)[0][0] for index in range(len(blocks))]
        hidden = added[0]
        for index in range(len(blocks)):
            hidden = blocks.run(index, inputs, hidden).output
    assert added[1].any() and not added[2].any()
    assert torch.equal(hidden, expected)
    # What depends on the output is not added.
    second = model.get_submodule(every[-1].path)
    with second.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:])):
        assert not is_chain(model, every, inputs)


@torch.no_grad()
def test_a_block_that_reads_fewer_tokens_ends_a_chain():
    model = tiny("vit")
    every, inputs = sites(model), tiny_inputs(model)
    last = model.get_submodule(every[-1].path)
    assert is_chain(model, every, inputs)
    with last.register_forward_pre_hook(lambda _, args: (args[0][:, :-2], *args[1:])):
        assert not is_chain(model, every, inputs)


@torch.no_grad()
def test_a_sum_is_plain_where_one_of_its_features_rounds_more():
    """GLM-4's experts and shared ones are added first, and the stream may cancel that."""
    for seed in range(3):
        model = tiny("glm4_moe", seed=seed)
        blocks, inputs = Blocks(model, sites(model)), tiny_inputs(model, 1, 60, seed)
        with blocks.opened():
            hidden = blocks.enter(0, inputs)[0][0]
            for index in range(len(blocks)):
                for layer in blocks.layers[index].values():
                    assert blocks.adds_plainly(layer[0], inputs, hidden)
                hidden = blocks.run(index, inputs, hidden).output


@torch.no_grad()
def test_a_run_sees_consumers_replaces_them_and_ends_early():
    model = tiny("llama")
    inputs, site = tiny_inputs(model), next(s for s in sites(model) if s.name == "0.attn")
    consumer = model.get_submodule(site.consumer)
    with Blocks(model, sites(model)).opened() as blocks:
        hidden = blocks.enter(0, inputs)[0][0]
        run = blocks.run(0, inputs, hidden, end="0.attn")
        assert run.output is None and run.seen.keys() == {"0.attn"}
        x, y = run.seen["0.attn"]
        assert torch.equal(consumer(x), y)
        zero = blocks.run(0, inputs, hidden, {"0.attn": lambda x: torch.zeros_like(y)})
        assert (zero.seen["0.attn"][1] == 0).all()
        assert torch.equal(blocks.run(0, inputs, hidden).seen["0.attn"][1], y)


def test_the_model_is_given_back():
    model = tiny("llama")
    block, previous = model.model.layers[1], model.model.layers[1].forward
    block.forward = previous  # as accelerate leaves it
    with pytest.raises(KeyError), Blocks(model, sites(model)).opened():
        raise KeyError
    assert block.forward is previous
    assert "forward" not in vars(model.model.layers[0])
