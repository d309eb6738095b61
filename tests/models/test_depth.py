"""Models without some of their blocks."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from covers import some
from tiny import MORE, TINY, outputs, same_weights, tiny

from liar_ext import InputError, Plan, load_pruned, save_pruned
from liar_ext.models.plan import SitePlan, sites_left
from liar_ext.models.registry import FAMILIES
from liar_ext.models.slicing import apply_plan
from liar_ext.models.whole import count_blocks_kept, stack_of

# What is said of those whose blocks can't leave: why, and of which model.
BOUND = {
    "t5": "several stacks",
    "albert": "a block runs several times",
    "gemma4_text": "keys and values of others",
    "qwen3_moe": "other layers in block 1",
}


# Kinds of blocks that differ: what they return, images beside text, experts, layers of two kinds.
QUICK = "llama gpt2 bert vit gemma3 mixtral granitemoe lfm2 bamba qwen3_5 cohere2".split()
QUICK += ["nemotron_h"]


def plan_of(model: torch.nn.Module, kept: tuple[int, ...]) -> Plan:
    count = len(stack_of(model)[1])
    return Plan(model.config.model_type, "auto", {}, blocks=SitePlan(count, kept))


def silence(block: torch.nn.Module) -> None:
    """Let a block give the hidden states that it reads."""
    forward = block.forward

    def silent(*args, **kwargs):
        hidden, output = args[0] if args else kwargs["hidden_states"], forward(*args, **kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    block.forward = silent


@some("name", sorted({**TINY, **MORE}), *QUICK, *BOUND)
def test_every_family_loses_a_block_or_says_why_not(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    before = outputs(model)
    try:
        count = len(stack_of(model)[1])
        # Some models need a block of each kind.
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or [0] * count
        spare = [at for at in range(count) if kinds.count(kinds[at]) > 1]
        gone = (spare or [kinds.index(next(k for k in kinds if k != "full_attention"))])[-2:][0]
        kept = tuple(index for index in range(count) if index != gone)
        apply_plan(model, plan := plan_of(model, kept))
    except InputError as error:
        family = FAMILIES[model.config.model_type].name
        assert str(error).startswith("blocks: ") and repr(family) in str(error)
        assert BOUND.get(name, "") in str(error)
        assert same_weights(model, tiny(name)) and torch.equal(outputs(model), before)
        return
    assert name not in BOUND
    dense = tiny(name)
    silence(stack_of(dense)[1][gone][1])
    # The last bits of some kernels depend on where weights lie in memory.
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(outputs(model), outputs(dense), **close)
    save_pruned(model, tmp_path / "one", plan)
    stock = type(model).from_pretrained(tmp_path / "one").eval()
    save_pruned(load_pruned(tmp_path / "one"), tmp_path / "two", plan)
    for loaded in (stock, load_pruned(tmp_path / "two")):
        assert same_weights(loaded, model)
        torch.testing.assert_close(outputs(loaded), outputs(model), **close)


def test_a_block_without_cache_is_not_the_first() -> None:
    """From transformers 5.25 on the first block's cache counts tokens, and that of an MLP can't."""
    model = tiny("nemotron_h")
    with suppress(InputError):
        apply_plan(model, plan_of(model, (1, 2, 3, 4)))
    model(torch.tensor([[5, 6, 7]]))  # the model as it was, if that was refused
    model = tiny("nemotron_h")
    apply_plan(model, plan_of(model, (0, 1, 2, 3)))
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)


def test_kinds_of_blocks_move_with_them(tmp_path: Path) -> None:
    """Of sliding and full attention, and of layers without positions."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    model = tiny("gemma3_text", num_hidden_layers=4, layer_types=kinds, sliding_window=3)
    dense = copy.deepcopy(model)
    silence(dense.model.layers[0])
    apply_plan(model, plan_of(model, (1, 2, 3)))
    assert model.config.layer_types == kinds[1:]
    torch.testing.assert_close(outputs(model), outputs(dense))
    model = tiny("smollm3", num_hidden_layers=4, no_rope_layers=[1, 0, 1, 1])
    apply_plan(model, plan_of(model, (0, 1, 3)))
    assert model.config.no_rope_layers == [1, 0, 1]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert [layer.self_attn.use_rope for layer in model.model.layers] == [1, 0, 1]
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)


def test_a_plan_is_checked_before_a_block_leaves() -> None:
    model = tiny("llama")
    weight = {"dense.0.mlp": (torch.zeros(3, 3), None)}
    site = {"2.mlp": SitePlan(24, tuple(range(8)))}
    for plan, weights, message in (
        (Plan("llama", "auto", {}, blocks=SitePlan(4, (0, 1))), {}, "3 blocks, the plan counts 4"),
        (plan_of(model, (0, 2)), weight, "weight of 0.mlp must have shape"),
        (Plan("llama", "auto", site, blocks=SitePlan(3, (0, 2))), {}, "no site 2.mlp"),
    ):
        with pytest.raises(InputError, match=message):
            apply_plan(model, plan, weights)
        assert same_weights(model, tiny("llama")) and len(model.model.layers) == 3
    with pytest.raises(InputError, match="0.3 of 3 blocks is less than one; raise keep_blocks"):
        count_blocks_kept(model, 0.3)


def test_blocks_leave_before_layers_are_unequal() -> None:
    model = tiny("llama")
    plan = Plan("llama", "auto", {"0.mlp": SitePlan(24, tuple(range(8)))})
    apply_plan(model, plan)
    model.config.liar = {"layers": "unequal"}
    with pytest.raises(InputError, match="unequal already; remove blocks first"):
        stack_of(model)


def test_sites_are_numbered_as_they_are_once_blocks_are_gone() -> None:
    model = tiny("llama")
    eight = SitePlan(24, tuple(range(8)))
    plan = Plan("llama", "auto", {"1.mlp": eight}, blocks=SitePlan(3, (0, 2)))
    apply_plan(model, plan)
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [24, 8]
    # Heads of the dense model leave, then a block, then channels: one plan.
    first = Plan("llama", "kv_group", {f"{at}.attn": SitePlan(4, (at, 3)) for at in range(3)})
    fewer = Plan("llama", "auto", {}, blocks=SitePlan(3, (1, 2)))
    last = Plan("llama", "kv_group", {"1.mlp": eight, "0.attn": SitePlan(2, (1,))})
    whole = last.after(fewer.after(first))
    assert whole.sites == {
        "0.attn": SitePlan(4, (3,)),
        "1.attn": SitePlan(4, (2, 3)),
        "1.mlp": eight,
    }
    assert whole.blocks == SitePlan(3, (1, 2))
    assert Plan.from_json(whole.to_json()) == whole and '"version": 4' in whole.to_json()
    odd = {f"{'9' * 5000}.mlp": eight, "decoder.1.mlp": eight, "": eight}  # as a stranger's plan
    assert sites_left(odd, whole.blocks) == {}
    again = Plan("llama", "auto", {}, blocks=SitePlan(2, (1,)))
    both = again.after(whole)
    assert both.blocks == SitePlan(3, (2,)) and set(both.sites) == {"0.attn", "0.mlp"}
