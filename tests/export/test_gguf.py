"""GGUF files: what llama.cpp computes with them is what the folder computes."""

from __future__ import annotations

import re
import subprocess
from functools import partial

import gguf
import numpy as np
import pytest
import torch
import transformers
from covers import cover
from folders import byte_level, change, equal_plan, make_plan, pruned
from gguf_files import logits_agree, save
from tiny import tiny

from liar_ext import InputError, cli
from liar_ext.checkpoint import load_model
from liar_ext.export import export as export_checked
from liar_ext.export import llama_cpp
from liar_ext.export.gguf import interleave
from liar_ext.export.llama_cpp import run_file
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.sites import get_consumer_bias, sites
from liar_ext.models.slicing import apply_plan

pytestmark = pytest.mark.usefixtures("quick_workers")
export = partial(export_checked, check=False)  # which these tests do themselves
FAMILIES = "llama mistral qwen2 qwen3 smollm3 gemma3_text gpt2 gpt_neox".split()
UNEQUAL = "llama mistral qwen2".split()
MORE = {"gemma3_text": {"query_pre_attn_scalar": 4}}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@cover(1, name=FAMILIES, layers=["dense", "equal", "unequal"])
def test_llama_cpp_computes_what_the_folder_does(name, layers, tmp_path):
    if layers == "dense":
        model, plan = tiny(name, **MORE.get(name, {})), None
    else:
        model = tiny(name, **MORE.get(name, {}))
        kinds = ("mlp",) if name.startswith("gpt") else ("attn", "mlp")
        plan = (equal_plan if layers == "equal" else make_plan)(model, kinds)
        apply_plan(model, plan)
    folder = save(model, tmp_path / "model", plan)
    if layers == "unequal" and name not in UNEQUAL:
        with pytest.raises(InputError, match="those of this model differ; prune with --uniform"):
            export(folder, "gguf")
        return
    done = export(folder, "gguf")
    kind = {"mistral": "llama", "gemma3_text": "gemma3", "qwen2": "llama"}.get(name, name)
    kind = kind.replace("_", "")
    kind = "deci" if layers == "unequal" else kind
    assert f"Architecture {kind}" in done.notes[0] and "no tokenizer" in done.notes[-1]
    logits_agree(model, done.paths[0])


@pytest.mark.parametrize(
    ("name", "layers"),
    [*((name, "equal") for name in FAMILIES[:5]), *((name, "unequal") for name in UNEQUAL)],
)
def test_a_smaller_hidden_size(name, layers, tmp_path):
    model = tiny(name)
    sites_of = {"equal": lambda model: {}, "unequal": lambda model: make_plan(model).sites}[layers]
    hidden = SitePlan(40, tuple(range(3, 35)))
    plan = Plan(model.config.model_type, "auto", sites_of(model), hidden=hidden)
    apply_plan(model, plan)
    done = export(save(model, tmp_path / "model", plan), "gguf")
    logits_agree(model, done.paths[0])


@cover(1, name=["llama", "mistral", "qwen2", "qwen3"], plan_of=[equal_plan, make_plan])
def test_consumer_biases_are_written_where_the_architecture_has_them(name, plan_of, tmp_path):
    model, plan = pruned(name, plan_of, bias=True)
    assert all(get_consumer_bias(model, site) is not None for site in sites(model))
    folder = save(model, tmp_path / "model", plan)
    if name == "qwen3":
        with pytest.raises(InputError, match="has no bias in|; prune with --uniform-layers"):
            export(folder, "gguf")
        return
    done = export(folder, "gguf")
    logits_agree(model, done.paths[0])


def test_biases_in_some_layers_only(tmp_path):
    model = tiny("llama")
    cut = {"0.mlp", "2.attn"}
    plan = Plan(
        "llama",
        "auto",
        {
            site.name: SitePlan(site.units, tuple(range(1, site.units)), True)
            for site in sites(model)
            if site.name in cut
        },
    )
    apply_plan(model, plan)
    for site in sites(model):
        if site.name in cut:
            torch.nn.init.normal_(get_consumer_bias(model, site))
    done = export(save(model, tmp_path / "model", plan), "gguf")
    logits_agree(model, done.paths[0])


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}),
        ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
        ("smollm3", {"num_hidden_layers": 5}),  # with a layer without rotary embedding
        ("qwen2", {"num_attention_heads": 10, "num_key_value_heads": 5}),  # all of its heads
        ("gpt_neox", {"use_parallel_residual": True}),
        ("gpt_neox", {"use_parallel_residual": False}),
    ],
)
def test_what_a_config_may_say(name, fields, tmp_path):
    model = tiny(name, **fields)
    done = export(save(model, tmp_path / "model"), "gguf")
    assert f"Architecture {name.replace('_', '')}:" in done.notes[0]
    logits_agree(model, done.paths[0])
    if "rope_parameters" in fields:  # the test would see it
        with pytest.raises(AssertionError):
            logits_agree(tiny("llama"), done.paths[0])


def test_gemma3_with_a_layer_that_attends_to_all(tmp_path):
    model = tiny("gemma3_text", num_hidden_layers=7, sliding_window=8, query_pre_attn_scalar=4)
    done = export(save(model, tmp_path / "model"), "gguf")
    logits_agree(model, done.paths[0])
    model.config.sliding_window = 9  # the test would see it
    model = type(model)(model.config).eval()
    model.load_state_dict(load_model(tmp_path / "model")[0].state_dict())
    with pytest.raises(AssertionError):
        logits_agree(model, done.paths[0])


def test_every_tensor_is_that_of_the_model(tmp_path):
    model, plan = pruned("qwen2", make_plan, bias=True)
    (path,) = export(save(model, tmp_path / "model", plan), "gguf").paths
    found = {each.name: each for each in gguf.GGUFReader(path).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, 3)
    for name, parameter in model.named_parameters():
        each = found.pop(names.get_name(name, (".weight", ".bias")))
        wanted = parameter.detach()
        if "q_proj" in name or "k_proj" in name:
            wanted = interleave(wanted, 4)
        assert torch.equal(torch.tensor(each.data), wanted), name
    assert not found


def test_rows_are_interleaved_head_by_head():
    rows = torch.arange(8).unsqueeze(1)
    assert interleave(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_sizes_are_one_number_or_one_per_layer(tmp_path):
    for plan_of in (equal_plan, make_plan):
        model, plan = pruned("llama", plan_of)
        folder = save(model, tmp_path / plan_of.__name__, plan)
        (path,) = export(folder, "gguf").paths
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        kind = fields["general.architecture"]
        sizes = [site.d_in for site in sites(model, ("mlp",))]
        assert fields[f"{kind}.feed_forward_length"] == (sizes if kind == "deci" else sizes[0])
        heads = [site.sizes["heads"] for site in sites(model, ("attn",))]
        assert fields[f"{kind}.attention.head_count"] == (heads if kind == "deci" else heads[0])
        assert fields[f"{kind}.rope.freq_base"] == 10000 and fields["general.name"] == folder.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_of_the_weights(dtype, tmp_path):
    model = tiny("llama", dtype=dtype)
    folder = save(model, tmp_path / "model")
    name = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    (path,) = export(folder, "gguf").paths
    tensors = {each.name: each for each in gguf.GGUFReader(path).tensors}
    for each in tensors.values():
        assert each.tensor_type.name == (name if len(each.shape) > 1 else "F32"), each.name
    each = tensors["blk.0.ffn_up.weight"]
    weight = model.model.layers[0].mlp.up_proj.weight.detach().float()
    assert np.array_equal(gguf.quants.dequantize(each.data, each.tensor_type), weight.numpy())
    logits_agree(load_model(folder, "float32")[0], path, tolerance=0.1)
    (wide,) = export(folder, "gguf", tmp_path / "wide.gguf", quantize="f32").paths
    logits_agree(load_model(folder, "float32")[0], wide)


def test_llama_cpp_runs_with_any_number_of_threads(tmp_path, monkeypatch):
    """In processes of its own, which read it before anything else does."""
    monkeypatch.setattr(llama_cpp, "subprocess", subprocess)
    done = export(save(tiny("llama"), tmp_path / "model"), "gguf")
    for threads in ("", "4,2", "many", "0"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert run_file(done.paths[0], np.array([[3, 4, 5]]))["nll"].shape == (1, 2)


def test_a_weight_out_of_range_of_f16_is_refused(tmp_path):
    for value in (1e6, torch.nan):
        model = tiny("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 4] = value
        folder = save(model, tmp_path / f"model{value}")
        with pytest.raises(InputError, match="blk.1.ffn_up.weight has values up to .* give"):
            export(folder, "gguf", quantize="f16")
        assert not folder.with_name(f"{folder.name}.gguf").exists()


def test_quantising_says_which_matrices_stay(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 48, "head_dim": 8}
    folder = save(tiny("llama", **sizes), tmp_path / "model")
    done = export(folder, "gguf", quantize="q8_0")
    note = "3 of 22 matrices stay F16 (ffn_down.weight): their widths (48) aren't multiples of 32"
    assert note in done.notes[-1], done.notes
    types = {each.name: each.tensor_type.name for each in gguf.GGUFReader(done.paths[0]).tensors}
    assert types["blk.0.ffn_up.weight"] == "Q8_0" and types["blk.0.ffn_down.weight"] == "F16"
    logits_agree(load_model(folder)[0], done.paths[0], tolerance=0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["model", "model.gguf"]


def test_quantising_needs_a_quantiser_and_a_type_of_its(tmp_path, monkeypatch):
    folder = save(tiny("llama"), tmp_path / "model")
    for wrong in ("int3", 8):
        found = f"must be one of f32, f16, bf16, q4_0, .* got '{wrong}'"
        with pytest.raises(InputError, match=found):
            export(folder, "gguf", quantize=wrong)
    monkeypatch.setattr("liar_ext.export.llama_cpp.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="put llama-quantize on the PATH, or pip install"):
        export(folder, "gguf", quantize="q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_transformers_reads_the_file_back(tmp_path):
    # Of qwen2 it doesn't read the size of a head.
    square = {"num_attention_heads": 10, "num_key_value_heads": 5}
    for name, kinds, fields in (("llama", ("attn", "mlp"), {}), ("qwen2", ("mlp",), square)):
        model = tiny(name, **fields)
        plan = equal_plan(model, kinds)
        apply_plan(model, plan)
        (path,) = export(save(model, tmp_path / name, plan, byte_level()), "gguf").paths
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
        for (ours, a), (theirs, b) in zip(
            model.state_dict().items(), again.state_dict().items(), strict=True
        ):
            assert ours == theirs and torch.equal(a, b), ours


def test_fewer_heads_of_an_architecture_that_has_all(tmp_path):
    for name in ("gpt2", "gpt_neox"):
        model = tiny(name)
        kept = {site.name: SitePlan(4, (0, 2)) for site in sites(model, ("attn",))}
        plan = Plan(name, "head", kept)
        apply_plan(model, plan)
        with pytest.raises(InputError, match="here 16 and 32; prune with --sites mlp"):
            export(save(model, tmp_path / name, plan), "gguf")


@pytest.mark.parametrize("name", ["bert", "opt", "gemma3", "vit"])
def test_other_families_are_refused(name, tmp_path, capsys):
    folder = save(tiny(name), tmp_path / "model")
    assert cli.main(["export", str(folder), "--to", "gguf"]) == 2
    assert "causal language models of llama, mistral" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_file_is_run_where_the_library_is(tmp_path, monkeypatch):
    folder = save(tiny("llama"), tmp_path / "model")
    assert "Run by llama.cpp: log-likelihoods" in export_checked(folder, "gguf").notes[-1]
    monkeypatch.setattr("liar_ext.export.gguf.interleave", lambda rows, head_dim: rows)
    with pytest.raises(InputError, match="llama.cpp's log-likelihoods differ by up to"):
        export_checked(folder, "gguf", tmp_path / "wrong.gguf")
    assert not (tmp_path / "wrong.gguf").exists()
    monkeypatch.setattr("liar_ext.export.gguf.find_spec", lambda name: None)
    done = export_checked(folder, "gguf", overwrite=True)
    assert "Not run by llama.cpp, whose library isn't here" in done.notes[-1]


def test_another_head_is_refused(tmp_path):
    config = tiny("llama").config
    model = transformers.LlamaForSequenceClassification(config)
    with pytest.raises(InputError, match="LlamaForSequenceClassification"):
        export(save(model, tmp_path / "model"), "gguf")


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation silu, this model gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'dynamic' aren't written",
        ),
        ("qwen3", {"rope_parameters": LLAMA3}, "qwen3 has those with default, linear"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers"),
        ("gemma3_text", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(name, fields, words, tmp_path):
    if name == "gemma3_text":
        fields = {"query_pre_attn_scalar": 4, **fields}
    with pytest.raises(InputError, match=words):
        export(save(tiny(name, **fields), tmp_path / "model"), "gguf")


def tampered(folder, **fields):
    change(folder / "config.json", **fields)
    return folder


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rms_norm_eps": 1e308}, "out of the range of its type"),
        ({"rms_norm_eps": float("nan")}, "llama.cpp can't run model.gguf .*eps"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0, "rope_theta": 9.0}}, "nan"),
        ({"rope_parameters": "x"}, "can't load"),
        ({"liar": "x"}, "version"),
        ({"dtype": ["x"]}, "can't load"),
        ({"num_attention_heads": 3}, "copy the folder again|can't load"),
    ],
)
def test_a_tampered_config_is_refused_in_one_line(fields, words, tmp_path, capsys):
    model, plan = pruned("llama", make_plan)
    folder = tampered(save(model, tmp_path / "model", plan), **fields)
    assert cli.main(["export", str(folder), "--to", "gguf"]) == 2
    error = capsys.readouterr().err
    assert len(re.findall("^error: ", error, re.M)) == 1, error
    assert re.search(words, error) and "Traceback" not in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_context_of_one_token(tmp_path):
    folder = tampered(save(tiny("llama"), tmp_path / "model"), max_position_embeddings=1)
    assert "Run by llama.cpp" in export_checked(folder, "gguf").notes[-1]
