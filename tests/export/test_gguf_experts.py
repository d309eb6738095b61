"""GGUF files of mixtures of experts: llama.cpp computes what the pruned folder does."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from covers import slow
from folders import equal_plan, make_plan
from gguf_files import logits_agree, save
from tiny import tiny
from torch import nn

from liar_ext import InputError
from liar_ext.export import export as export_checked
from liar_ext.export import gguf as exporter
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.sites import SHARED, sites, teams_of
from liar_ext.models.slicing import apply_plan

pytestmark = pytest.mark.usefixtures("quick_workers")
export = partial(export_checked, check=False)  # which these tests do themselves
# Experts in every layer, and the weights of a token's experts as llama.cpp has them.
SETTINGS = {
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": [], "norm_topk_prob": False, "head_dim": 8},
    "qwen3_moe": {"mlp_only_layers": []},
    "olmoe": {"num_key_value_heads": 8},
    "granitemoe": {},
    "glm4_moe": {},
    "ernie4_5_moe": {},
    "dots1": {"num_key_value_heads": 8},
    "hunyuan_v1_moe": {},
}
SIGMOID = ("glm4_moe", "dots1")  # weights far below one another are no ties, but nearly zero
ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 50.0}
ARCHITECTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "glm4_moe": "glm4moe",
    "ernie4_5_moe": "ernie4_5-moe",
    "hunyuan_v1_moe": "hunyuan-moe",
}


def mixture(name: str, **fields) -> nn.Module:
    model = tiny(name, **{**SETTINGS[name], **fields})
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # So that no two experts tie.
        if path.endswith(("gate.weight", "router.weight", "wg.weight")):
            tensor.data.mul_(2 if name in SIGMOID else 5)
        if path.endswith("e_score_correction_bias"):
            tensor.data.normal_(std=0.3)
    return model


def first_experts(model: nn.Module) -> list[str]:
    """Return the layers of experts."""
    return list(teams_of([site for site in sites(model, ("mlp",)) if site.expert is not None]))


def plan_of(model: nn.Module, what: str) -> Plan:
    """Return a plan that keeps three of four experts, half of the channels or heads, or all."""
    kinds = {"channels": ("mlp",), "heads": ("attn",), "all": ("attn", "mlp")}.get(what)
    if model.config.model_type in ("qwen2_moe", "olmoe") and what == "all":
        kinds = ("mlp",)
    plan = equal_plan(model, kinds) if kinds else Plan(model.config.model_type, "auto", {})
    if what in ("experts", "all"):
        experts = {team: SitePlan(4, (0, 2, 3)) for team in first_experts(model)}
        left = {name: site for name, site in plan.sites.items() if not name.endswith(".mlp.3")}
        plan = replace(plan, sites=left, experts=experts)
    return plan


def pruned(name: str, what: str, folder: Path, **fields) -> nn.Module:
    model = mixture(name, **fields)
    plan = plan_of(model, what) if what != "dense" else None
    if plan is not None:
        apply_plan(model, plan)
    save(model, folder, plan)
    return model


CASES = [
    (pytest.param if {name, what} & {"mixtral", "all"} else slow)(name, what)
    for name in SETTINGS
    for what in ("dense", "experts", "channels", "heads", "all")
    if what != "heads" or name not in ("qwen2_moe", "olmoe")
]


@pytest.mark.parametrize(("name", "what"), CASES)
def test_llama_cpp_computes_what_the_folder_does(name: str, what: str, tmp_path: Path) -> None:
    model = pruned(name, what, tmp_path / "model")
    done = export(tmp_path / "model", "gguf")
    architecture = ARCHITECTURES.get(name, name)
    assert f"Architecture {architecture}:" in done.notes[0]
    logits_agree(model, done.paths[0])
    fields = {k: f.contents() for k, f in gguf.GGUFReader(done.paths[0]).fields.items()}
    mlps = sites(model, ("mlp",))
    routed = next(site for site in mlps if site.expert is not None)
    layer = model.get_submodule(routed.consumer.rpartition(".")[0])
    experts, _, width = layer.down_proj.shape
    assert fields[f"{architecture}.expert_count"] == experts == (4 - (what in ("experts", "all")))
    assert fields[f"{architecture}.expert_used_count"] == 2
    own = "expert_" if "moe_intermediate_size" in vars(model.config) else ""
    assert fields[f"{architecture}.{own}feed_forward_length"] == width
    if routed.block:
        assert fields[f"{architecture}.leading_dense_block_count"] == routed.block
        assert fields[f"{architecture}.feed_forward_length"] == mlps[0].d_in
    if name == "qwen2_moe":
        shared = model.model.layers[0].mlp.shared_expert.up_proj.out_features
        assert fields["qwen2moe.expert_shared_feed_forward_length"] == shared
        assert shared == (6 if what in ("channels", "all") else 12)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_head_that_is_the_embedding(name: str, tmp_path: Path) -> None:
    model = pruned(name, "experts", tmp_path / "model", tie_word_embeddings=True)
    (path,) = export(tmp_path / "model", "gguf").paths
    logits_agree(model, path)


@pytest.mark.parametrize("name", SETTINGS)
def test_sixteen_bits_leave_the_router_as_it_is(name: str, tmp_path: Path) -> None:
    model = pruned(name, "all", tmp_path / "model")
    (path,) = export(tmp_path / "model", "gguf", quantize="f16").paths
    tensors = {each.name: each for each in gguf.GGUFReader(path).tensors}
    for each in tensors.values():
        whole = len(each.shape) == 1 or "ffn_gate_inp.weight" in each.name
        kind = "F32" if whole else "F16"
        assert each.tensor_type.name == kind, each.name
    logits_agree(model, path, tolerance=2e-2, share=0.8)
    last = [site for site in sites(model, ("mlp",)) if site.expert is not None][-1]
    down = tensors[f"blk.{last.block}.ffn_down_exps.weight"].data
    assert np.array_equal(down, model.get_parameter(last.consumer).detach().half().numpy())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "glm4_moe"])
def test_experts_are_quantised(name: str, tmp_path: Path) -> None:
    """The router is not, and no note says so."""
    sizes = {"hidden_size": 64, "head_dim": 8, "vocab_size": 64, "intermediate_size": 64}
    if name != "mixtral":
        sizes["moe_intermediate_size"] = 64
    model = pruned(name, "all", tmp_path / "model", **sizes)
    done = export(tmp_path / "model", "gguf", quantize="q8_0")
    assert not any("matrices stay" in note for note in done.notes)
    types = {each.name: each.tensor_type.name for each in gguf.GGUFReader(done.paths[0]).tensors}
    for tensor in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "attn_q"):
        assert types[f"blk.1.{tensor}.weight"] == "Q8_0"
    assert types["blk.1.ffn_gate_inp.weight"] == "F32"
    logits_agree(model, done.paths[0], tolerance=0.2, share=0.8)


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
def test_transformers_reads_the_file_back(name: str, tmp_path: Path) -> None:
    """Of experts it takes the widths of its config by default, whatever the file says."""
    widths = {"qwen2_moe": (1408, 5632), "qwen3_moe": (768, 0)}[name]
    fields = {"moe_intermediate_size": widths[0], "shared_expert_intermediate_size": widths[1]}
    model = pruned(name, "experts", tmp_path / "model", **fields)
    (path,) = export(tmp_path / "model", "gguf").paths
    found = {each.name: torch.tensor(each.data) for each in gguf.GGUFReader(path).tensors}
    layer = model.model.layers[1].mlp
    gate, up = layer.experts.gate_up_proj.chunk(2, 1)
    assert torch.equal(found["blk.1.ffn_gate_exps.weight"], gate)
    assert torch.equal(found["blk.1.ffn_up_exps.weight"], up)
    assert torch.equal(found["blk.1.ffn_gate_inp.weight"], layer.gate.weight)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for each in ours:
        assert torch.equal(ours[each], theirs[each]), each


def test_the_command_runs_what_it_wrote(tmp_path: Path, monkeypatch) -> None:
    pruned("mixtral", "all", tmp_path / "model")
    done = export_checked(tmp_path / "model", "gguf")
    assert "Run by llama.cpp: log-likelihoods" in done.notes[-1]
    right = exporter._experts

    def swapped(model: nn.Module) -> dict:
        """Give what the gates are as ups, and the other way round."""
        found = right(model)
        for path, parts in found.items():
            names, tensors = zip(*parts, strict=True)
            found[path] = list(zip(names, tensors[::-1], strict=True))
        return found

    monkeypatch.setattr(exporter, "_experts", swapped)
    with pytest.raises(InputError, match="llama.cpp's log-likelihoods differ by up to"):
        export_checked(tmp_path / "model", "gguf", tmp_path / "wrong.gguf")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("glm4_moe", {"first_k_dense_replace": 2, "norm_topk_prob": False, "use_qk_norm": False}),
        ("glm4_moe", {"first_k_dense_replace": 0, "n_shared_experts": 2, "attention_bias": True}),
        ("ernie4_5_moe", {"moe_num_shared_experts": 2, "moe_layer_start_index": 2}),
        ("ernie4_5_moe", {"moe_num_shared_experts": 0, "moe_layer_start_index": 0}),
        ("hunyuan_v1_moe", {"rope_parameters": ALPHA, "num_experts_per_tok": [3, 3]}),
    ],
)
def test_what_a_config_may_say_of_experts(name: str, fields: dict, tmp_path: Path) -> None:
    model = pruned(name, "channels", tmp_path / "model", **fields)
    (path,) = export(tmp_path / "model", "gguf").paths
    logits_agree(model, path)


@pytest.mark.parametrize("name", ["glm4_moe", "ernie4_5_moe", "dots1"])
def test_the_bias_of_the_choice_is_written(name: str, tmp_path: Path) -> None:
    """Without it other experts are chosen, which the comparison of logits sees."""
    model = pruned(name, "experts", tmp_path / "model")
    (path,) = export(tmp_path / "model", "gguf").paths
    for key, tensor in model.state_dict().items():
        if key.endswith("e_score_correction_bias"):
            tensor.zero_()
    with pytest.raises(AssertionError):
        logits_agree(model, path)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("qwen2_moe", {"norm_topk_prob": True}, "qwen2moe has norm_topk_prob False, this model"),
        ("qwen3_moe", {"norm_topk_prob": False}, "qwen3moe has norm_topk_prob True, this model"),
        ("olmoe", {"norm_topk_prob": True}, "olmoe has norm_topk_prob False, this model True"),
        ("olmoe", {"num_key_value_heads": 4}, "olmoe has num_key_value_heads 8, this model 4"),
        ("olmoe", {"clip_qkv": 0.5}, "olmoe has clip_qkv None, this model 0.5"),
        (
            "qwen3_moe",
            {"mlp_only_layers": [1]},
            "qwen3moe has experts in every layer, and 1 of this model's 2 layers",
        ),
        ("qwen2_moe", {"head_dim": 4}, "here 32 and 64; prune with --sites mlp"),
        ("mixtral", {"hidden_act": "gelu"}, "llama has activation silu, this model gelu"),
        ("glm4_moe", {"n_group": 2}, "glm4moe has n_group 1, this model 2"),
        ("dots1", {"num_key_value_heads": 4}, "dots1 has num_key_value_heads 8, this model 4"),
        ("dots1", {"first_k_dense_replace": 3}, "after the first ones, and 3 of this model's 3"),
        (
            "ernie4_5_moe",
            {"moe_layer_interval": 2, "num_hidden_layers": 5},
            "the first ones, and 3 of",
        ),
        ("ernie4_5_moe", {"moe_layer_end_index": 1}, "the first ones, and 2 of this model's 3"),
        ("ernie4_5_moe", {"use_bias": True}, "ernie4_5-moe has no bias in down_proj, gate_proj"),
        ("hunyuan_v1_moe", {"num_experts_per_tok": [1, 2]}, "those of this model differ"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(name, fields, words, tmp_path) -> None:
    pruned(name, "dense", tmp_path / "model", **fields)
    with pytest.raises(InputError, match=words):
        export(tmp_path / "model", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", SETTINGS)
def test_layers_of_other_sizes_are_refused(name: str, tmp_path: Path) -> None:
    model = mixture(name)
    last = first_experts(model)[-1]
    plan = Plan(name, "auto", {}, experts={last: SitePlan(4, (0, 2, 3))})
    apply_plan(model, plan)
    with pytest.raises(InputError, match="those of this model differ; prune with --uniform"):
        export(save(model, tmp_path / "experts", plan), "gguf")
    model = mixture(name)
    kept = {
        each: SitePlan(site.units, tuple(range(4 + 4 * site.block)))
        for site in sites(model, ("mlp",))
        if site.expert is not None
        for each in (site.name,)
    }
    plan = Plan(name, "auto", {n: s for n, s in kept.items() if len(s.kept) < s.units})
    apply_plan(model, plan)
    with pytest.raises(InputError, match="those of this model differ; prune with --uniform"):
        export(save(model, tmp_path / "channels", plan), "gguf")


@pytest.mark.parametrize("name", ["glm4_moe", "dots1"])
def test_a_shared_expert_of_a_width_of_its_own_is_refused(name: str, tmp_path: Path) -> None:
    model = mixture(name)
    kept = {
        site.name: SitePlan(site.units, tuple(range(9)))
        for site in sites(model, ("mlp",))
        if site.name.endswith(SHARED)
    }
    plan = Plan(name, "auto", kept)
    apply_plan(model, plan)
    with pytest.raises(InputError, match="here 9 channels and 16; choose another --keep, or"):
        export(save(model, tmp_path / "model", plan), "gguf")


@pytest.mark.parametrize("name", ["gpt_oss", "phimoe", "deepseek_v3", "flex_olmo"])
def test_other_mixtures_are_refused(name: str, tmp_path: Path) -> None:
    folder = save(tiny(name), tmp_path / "model")
    with pytest.raises(InputError, match="causal language models of llama, .*mixtral"):
        export(folder, "gguf")


def test_biases_of_the_attention_output(tmp_path: Path) -> None:
    model = mixture("mixtral")
    plan = make_plan(model, ("attn",), bias=True)
    kept = {name: SitePlan(site.units, (0,), True) for name, site in plan.sites.items()}
    plan = replace(plan, sites=kept)
    apply_plan(model, plan)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.bias)
    (path,) = export(save(model, tmp_path / "model", plan), "gguf").paths
    logits_agree(model, path)
