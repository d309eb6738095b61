"""A saved model is the model, by every loader."""

from __future__ import annotations

import pickle
from pathlib import Path

import fresh_workers
import huggingface_hub
import pytest
import torch
import transformers
from covers import cover, some
from folders import change, equal_plan, make_plan, pruned, read, tokenizer
from safetensors.torch import load_file, save_file
from tiny import CAUSAL, GROUPED, TINY, outputs, tiny, tiny_inputs

from liar_ext import verify_pruned
from liar_ext.checkpoint import load_model, load_pruned
from liar_ext.checkpoint.saving import save_pruned
from liar_ext.checkpoint.stock_config import auto_classes, how_to_load
from liar_ext.models.plan import Plan, SitePlan
from liar_ext.models.sites import get_consumer_bias, sites
from liar_ext.models.slicing import apply_plan
from liar_ext.system.errors import InputError

# Families whose stock class can be built with fewer attention units.
EQUAL_ATTENTION = set(GROUPED) | {"vit", "dinov2", "dinov2_swiglu"}
EQUAL_MLP = set(TINY) - {"dinov2", "dinov2_swiglu"}


@cover(1, kinds=[("attn",), ("mlp",), ("attn", "mlp")], name=TINY)
def test_equal_layers_load_in_plain_transformers(name: str, kinds, tmp_path: Path) -> None:
    model, plan = pruned(name, equal_plan, kinds=kinds)
    folder = tmp_path / "pruned"
    save_pruned(model, folder, plan)
    possible = ("attn" not in kinds or name in EQUAL_ATTENTION) and (
        "mlp" not in kinds or name in EQUAL_MLP
    )
    assert read(folder)["liar"]["layers"] == ("equal" if possible else "unequal")
    if possible:
        assert torch.equal(outputs(type(model).from_pretrained(folder)), outputs(model))
    assert torch.equal(outputs(load_pruned(folder)), outputs(model))


@some("name", TINY, "llama", "gpt2", "bert", "gemma3", "vit")
def test_unequal_layers_load_by_every_loader(name: str, saved) -> None:
    """With `load_pruned`, and where the code of the folder is trusted."""
    model, plan, folder = saved(name, bias=True)
    assert read(folder)["liar"].keys() >= {"version", "layers", "modules"}
    loaded = load_pruned(folder)
    assert isinstance(loaded, type(model)) and not loaded.training
    assert torch.equal(outputs(loaded), outputs(model))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert Plan.load(folder / "liar/plan.json") == plan
    assert torch.equal(outputs(pickle.loads(pickle.dumps(loaded))), outputs(model))
    check_trusted(name, model, folder)


def test_experts_run_in_float64(tmp_path: Path) -> None:
    """transformers' kernel for experts refuses it."""
    model = tiny("mixtral")
    model.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, "float64")
    assert torch.allclose(outputs(loaded), outputs(model).double(), atol=1e-5)


def test_a_loaded_model_generates_by_its_settings(tmp_path: Path) -> None:
    model, plan = pruned("llama", bias=True)
    model.generation_config.repetition_penalty = 1.25
    save_pruned(model, tmp_path / "pruned", plan)
    loaded = load_pruned(tmp_path / "pruned")
    assert loaded.generation_config.repetition_penalty == 1.25
    inputs = tiny_inputs(model)
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(**inputs, **settings), model.generate(**inputs, **settings))


def check_trusted(name: str, model: torch.nn.Module, folder: Path) -> None:
    """Check what transformers' loaders give, which run the code of the folder."""
    named = read(folder)["auto_map"]
    own = {auto for auto, loader in named.items() if loader.endswith(f".{type(model).__name__}")}
    heads = {"AutoModel", "AutoModelForTokenClassification", "AutoModelForSequenceClassification"}
    assert own and (heads & set(named)) >= heads - {
        auto
        for auto in heads
        if type(model.config) not in getattr(transformers, auto)._model_mapping
    }
    for auto in sorted(own | (heads & set(named))):
        name_of_class = named[auto]
        loader = getattr(transformers, auto)
        loaded = loader.from_pretrained(folder, trust_remote_code=True)
        assert f"liar_loader.{type(loaded).__name__}" == name_of_class
        if not isinstance(loaded, type(model)):
            continue  # another head, of which the folder has no weights
        assert not loaded.training
        assert torch.equal(outputs(loaded), outputs(model))
        if name in CAUSAL:
            settings = {**tiny_inputs(model), "max_new_tokens": 5, "do_sample": False}
            assert torch.equal(loaded.generate(**settings), model.generate(**settings))
    if name in CAUSAL:
        assert "AutoModelForCausalLM" in read(folder)["auto_map"]


def test_options_of_a_trusted_load_are_heard(saved) -> None:
    *_, folder = saved("llama")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=True,
        dtype=torch.float64,
        attn_implementation="eager",
        use_cache=False,
    )
    assert loaded.dtype == torch.float64 and loaded.config._attn_implementation == "eager"
    assert loaded.config.use_cache is False


def test_our_loaders_take_no_kernels_of_the_hub(saved, tmp_path: Path, monkeypatch) -> None:
    """Transformers takes them by default from 5.25 on."""
    real, seen = transformers.PreTrainedModel.from_pretrained.__func__, []

    def spied(cls, *given, **options):
        seen.append(options.get("use_kernels"))
        return real(cls, *given, **options)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(spied))
    tiny("llama").save_pretrained(tmp_path)
    load_model(tmp_path)
    load_pruned(saved("llama")[-1])
    assert seen == [False, False]


@some("name", TINY, "llama", "gpt2")
def test_trainer_reads_the_config_of_what_it_resumes(name: str, saved) -> None:
    """It does so without the class of the config, and so without the names of its fields."""
    *_, folder = saved(name)
    transformers.PreTrainedConfig.from_json_file(folder / "config.json")


def test_earlier_folders_say_the_sizes_of_layers_where_later_ones_do_not(tmp_path: Path) -> None:
    model, plan = pruned("gpt2")
    save_pruned(model, tmp_path / "pruned", plan)
    assert "per_layer_config" not in read(tmp_path / "pruned")
    layers = {"per_layer_config": {"0": {"n_head": 2}}}
    earlier = {**layers, "allow_global_per_layer_attribute_access": True}
    change(tmp_path / "pruned/config.json", **earlier)
    assert torch.equal(outputs(load_pruned(tmp_path / "pruned")), outputs(model))


@pytest.mark.parametrize("name", ["phi3", "whisper"])
def test_a_class_that_generates_by_code_of_its_own_is_pickled(name: str, saved) -> None:
    model, _, folder = saved(name)
    script = """
import pickle, sys
import transformers
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(pickle.loads(pickle.dumps(model))) is type(model)
"""
    result = fresh_workers.run_script(script, folder, auto_classes(model)[0])
    assert result.returncode == 0, result.stderr


def test_a_repository_of_the_hub_loads_the_same_way(tmp_path: Path, monkeypatch) -> None:
    """Here from the cache of the hub's client, laid out as a download leaves it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model, plan = pruned("llama")
    repository = tmp_path / "hub" / "models--someone--pruned"
    save_pruned(model, repository / "snapshots" / ("0" * 40), plan)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        "someone/pruned",
        trust_remote_code=True,
        cache_dir=tmp_path / "hub",
        local_files_only=True,
    )
    assert torch.equal(outputs(loaded), outputs(model))


@cover(1, kinds=[("attn",), ("mlp",)], name=TINY)
def test_biases_that_the_plan_adds(name: str, kinds, tmp_path: Path) -> None:
    """Equal where the config has a flag for them; in any case they come back."""
    model, plan = pruned(name, equal_plan, kinds=kinds, bias=True)
    flag = sites(model, kinds)[0].wiring.bias_flag
    had = get_consumer_bias(tiny(name), sites(tiny(name), kinds)[0]) is not None
    folder = tmp_path / "pruned"
    save_pruned(model, folder, plan)
    possible = name in (EQUAL_ATTENTION if kinds == ("attn",) else EQUAL_MLP)
    equal = possible and (had or flag is not None)
    assert read(folder)["liar"]["layers"] == ("equal" if equal else "unequal")
    assert torch.equal(outputs(type(model).from_pretrained(folder)), outputs(model))
    assert torch.equal(outputs(load_pruned(folder)), outputs(model))


def test_a_process_without_liar_ext_loads_equal_layers(tmp_path: Path, monkeypatch) -> None:
    model, plan = pruned("llama", equal_plan, bias=True)
    save_pruned(model, tmp_path / "pruned", plan)
    inputs = tiny_inputs(model)
    torch.save((inputs, outputs(model, inputs)), tmp_path / "expected.pt")
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
inputs, expected = torch.load("expected.pt")
model = AutoModelForCausalLM.from_pretrained("pruned")
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, expected)
assert not any(name.startswith("liar_ext") for name in sys.modules)
"""
    monkeypatch.chdir(tmp_path)
    result = fresh_workers.run_script(script)
    assert result.returncode == 0, result.stderr


def test_head_counts_that_a_config_refuses_are_unequal(tmp_path: Path) -> None:
    """LlamaConfig wants head counts that divide the hidden size; Qwen2Config doesn't care."""
    for name, layers in (("llama", "unequal"), ("qwen2", "equal")):
        model = tiny(name)
        kept = {site.name: SitePlan(4, (0, 1, 3)) for site in sites(model, ("attn",))}
        plan = Plan(name, "auto", kept)
        apply_plan(model, plan)
        save_pruned(model, tmp_path / name, plan)
        assert read(tmp_path / name)["liar"]["layers"] == layers
        assert torch.equal(outputs(load_pruned(tmp_path / name)), outputs(model))


def test_query_heads_of_groups_are_saved(tmp_path: Path) -> None:
    model = tiny("llama")
    kept = {site.name: SitePlan(8, (0, 3, 4, 7)) for site in sites(model, ("attn",), "head")}
    plan = Plan("llama", "head", kept)
    apply_plan(model, plan)
    save_pruned(model, tmp_path / "pruned", plan)
    config = read(tmp_path / "pruned")
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 4)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "pruned")), outputs(model))


def test_tied_weights_stay_tied(saved) -> None:
    *_, folder = saved("llama")
    loaded = load_pruned(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with open(folder / "model.safetensors", "rb") as file:
        assert b"lm_head" not in file.read(1 << 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_can_be_chosen(dtype: torch.dtype, saved) -> None:
    *_, folder = saved("qwen3", dtype=dtype)
    assert load_pruned(folder).dtype == dtype
    assert load_pruned(folder, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("plan_of", [equal_plan, make_plan])
def test_a_loaded_model_can_be_saved_again(plan_of, tmp_path: Path) -> None:
    model, plan = pruned("llama", plan_of)
    save_pruned(model, tmp_path / "one", plan)
    save_pruned(load_pruned(tmp_path / "one"), tmp_path / "two", plan)
    assert torch.equal(outputs(load_pruned(tmp_path / "two")), outputs(model))
    assert read(tmp_path / "one") == read(tmp_path / "two")


@cover(1, plan_of=[equal_plan, make_plan], name=["llama", "bert", "mpnet", "vit", "gemma3"])
def test_verify_proves_and_disproves(name: str, plan_of, tmp_path: Path) -> None:
    model, plan = pruned(name, plan_of)
    folder = tmp_path / "pruned"
    save_pruned(model, folder, plan)
    facts = verify_pruned(folder)
    layers = read(folder)["liar"]["layers"]
    assert facts["agrees"] and facts["layers"] == layers and facts["dtype"] == "float32"
    assert facts["params"] == sum(p.numel() for p in model.parameters())
    stock = "from_pretrained" if layers == "equal" else "from_pretrained(trust_remote_code=True)"
    assert [name.split(".")[-1] for name in facts["loaders"]] == ["load_pruned", stock]
    for result in facts["loaders"].values():
        # Not 0: weights lie at other addresses, where kernels may take other paths.
        assert result["agrees"] and result["max_abs_difference"] < 1e-6 < facts["tolerance"]
        assert result["params"] == facts["params"]
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if key.endswith(".weight") and ".1." in key)
    tensors[key] += 0.5
    save_file(tensors, weights, {"format": "pt"})
    facts = verify_pruned(folder)
    assert not facts["agrees"]
    assert all(result["max_abs_difference"] > 1e-2 for result in facts["loaders"].values())


def test_a_class_that_no_auto_class_builds_loads_with_code(tmp_path: Path) -> None:
    model, plan = pruned("clip_vision_model")
    assert type(model).__name__ == "CLIPVisionModelWithProjection" and not auto_classes(model)
    save_pruned(model, tmp_path / "pruned", plan)
    facts = verify_pruned(tmp_path / "pruned")
    assert facts["agrees"] and len(facts["loaders"]) == 2
    assert "transformers.AutoModel.from_pretrained" in how_to_load(model, plan)


def test_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="doesn't exist; give a model folder"):
        load_pruned(tmp_path / "missing")
    tiny("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match="holds a dense model"):
        load_pruned(tmp_path / "dense")
    with pytest.raises(InputError, match="holds a dense model"):
        verify_pruned(tmp_path / "dense")


def test_what_apply_plan_alone_left_is_refused_with_the_way_to_save_it(tmp_path: Path) -> None:
    """Its config says the dense sizes, of which no loader can know better."""
    model, plan = pruned("llama", equal_plan)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match=r"sliced by save_pruned\(model, folder, plan\)"):
        load_pruned(tmp_path / "saved")
    with pytest.raises(RuntimeError, match="size"):
        type(model).from_pretrained(tmp_path / "saved")
    save_pruned(model, tmp_path / "again", plan)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "again")), outputs(model))


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    model, plan = pruned("llama")
    save_pruned(model, tmp_path / "pruned", plan)
    weights = tmp_path / "pruned" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(InputError, match="lacks model.layers.1.mlp.down_proj.weight"):
        load_pruned(tmp_path / "pruned")


def test_lack_of_memory_is_no_fault_of_the_folder(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB")

    tiny("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="allocate 9 TB") as caught:
        load_model(tmp_path)
    assert not isinstance(caught.value, InputError)


def test_load_model_takes_dense_and_pruned_folders(tmp_path: Path) -> None:
    dense = tiny("qwen2")
    dense.save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    model, words = load_model(tmp_path / "dense", "float64")
    assert type(model) is type(dense) and model.dtype == torch.float64
    assert words("a")["input_ids"] == [2]
    cut, plan = pruned("vit")
    save_pruned(cut, tmp_path / "pruned", plan)
    model, words = load_model(tmp_path / "pruned")
    assert torch.equal(outputs(model), outputs(cut)) and words is None
    for missing in (tmp_path / "nothing", "nothing.gguf"):
        with pytest.raises(InputError, match="doesn't exist"):
            load_model(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no readable config.json"):
        load_model(tmp_path / "empty")
