"""A model that is pruned block by block is the one that is pruned in memory, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import weakref
from dataclasses import replace

import forked
import pytest
import torch
from covers import cover
from safetensors.torch import load_file
from seeing import seeing_inputs, seeing_model
from tiny import batches, outputs, same_weights, tiny
from torch import nn

from liar_ext import InputError, load_pruned, prune, save_pruned, verify_pruned
from liar_ext.checkpoint.block_source import BlockStore
from liar_ext.checkpoint.folder import MARKER_FILE
from liar_ext.job import estimate
from liar_ext.job.planning import describe_streamed
from liar_ext.job.preparing import prepare
from liar_ext.job.pruning import prune_folder
from liar_ext.job.state import Job
from liar_ext.job.streamed import StreamedPasses
from liar_ext.models.recipe import Recipe
from liar_ext.reconstruction.streams import Walk
from liar_ext.reconstruction.walk import LayerwiseSolver
from liar_ext.system.progress import showing_bars

GIB = 2**30
# Tied and untied heads, stacked and transposed layers, norms after the sums, names that the file
# has otherwise, an input for all heads, images, features of images that are added between blocks,
# experts one by one or together in the file.
FAMILIES = (
    "llama qwen2 gpt2 bert gpt_neox gemma3 mpnet vit qwen3_vl mixtral qwen3_moe gpt_oss "
    "llama4_text".split()
)
JOBS = {
    "uniform": {"allocation": "uniform", "schedule": "one-pass"},
    "layerwise": {"allocation": "global", "schedule": "layerwise"},
    "curve": {"allocation": "curve", "schedule": "one-pass"},
}


def dense(family, folder):
    """Return a model and its calibration set, and save its weights in several files."""
    images = family == "qwen3_vl"
    model = seeing_model(family) if images else tiny(family)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    if not images:
        return model, batches(model, 3)
    data = [seeing_inputs(family, seed) for seed in range(8)]
    return model, [{**each, "pixel_values": each["pixel_values"].float()} for each in data]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder of a model whose head has weights of its own."""
    folder = tmp_path_factory.mktemp("dense") / "llama"
    tiny("llama", tie_word_embeddings=False).save_pretrained(folder)
    return folder


def copy_of(model: nn.Module) -> nn.Module:
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def config_of(folder):
    """Return a folder's config; the dtype of its parts is there only if they were loaded."""

    def without_dtype(fields: dict) -> dict:
        return {name: value for name, value in fields.items() if name != "dtype"}

    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8"), object_hook=without_dtype)


def by_blocks(folder, data, out, limit=4 * GIB, **choices):
    recipe = Recipe(**{"keep": 0.6, "tile": 1, **choices})
    store = BlockStore(folder)
    return prune_folder(store, Job(store.model, data, recipe, limit=limit), out)


@cover(1, family=FAMILIES, job=JOBS)
def test_plan_weights_and_report_are_those_of_the_job_in_memory(family, job, tmp_path):
    folder = tmp_path / "dense"
    model, data = dense(family, folder)
    whole = copy_of(model)
    expected = prune(whole, data, keep=0.6, tile=1, **JOBS[job])
    report = by_blocks(folder, data, tmp_path / "pruned", **JOBS[job])
    assert report.plan == expected.plan
    pruned = load_pruned(tmp_path / "pruned")
    assert same_weights(pruned, whole)
    assert torch.equal(outputs(pruned), outputs(whole))
    for ours, theirs in zip(report.sites, expected.sites, strict=True):
        assert (ours.damp, ours.error, ours.path) == (theirs.damp, theirs.error, theirs.path)
        assert ours.sensitivity == theirs.sensitivity
    tokens = "calibration_tokens"
    assert report.settings[tokens] == expected.settings[tokens]
    assert report.params == expected.params
    assert report.loading == expected.loading
    save_pruned(whole, tmp_path / "whole", expected.plan)
    assert config_of(tmp_path / "pruned") == config_of(tmp_path / "whole")
    assert verify_pruned(tmp_path / "pruned")["agrees"]


@pytest.mark.parametrize(
    ("family", "choices"),
    [
        ("mixtral", {"keep": 1.0}),
        ("qwen3_moe", {"schedule": "one-pass"}),
        ("gpt_oss", {"schedule": "layerwise"}),
        ("deepseek_v3", {"schedule": "layerwise", "reconstruct": "none", "allocation": "uniform"}),
        ("lfm2_moe", {"keep": 1.0, "reconstruct": "none"}),
    ],
)
def test_experts_leave_a_model_in_files_as_one_in_memory(family, choices, tmp_path, monkeypatch):
    """Biases of the choice of experts are buffers, which aren't read with the blocks."""
    read, below = [], BlockStore._read_below
    monkeypatch.setattr(BlockStore, "_read_below", lambda s, at: read.append(at) or below(s, at))
    folder = tmp_path / "dense"
    model, data = dense(family, folder)
    if choices.get("reconstruct") == "none":
        choices = {**choices, "schedule": "one-pass"}
    choices = {"keep": 0.6, "tile": 1, **choices, "keep_experts": 0.75}
    whole, texts = copy_of(model), {"evaluate_on": data[1:2]}
    if choices.get("schedule") != "one-pass":
        texts["certify_on"] = data[2:]
    expected = prune(whole, data, **choices, **texts)
    store = BlockStore(folder)
    job = Job(store.model, data, Recipe(**choices), limit=4 * GIB, **texts)
    said = "read twice" if choices["keep"] == 1.0 else "read three times"
    assert said in describe_streamed(job, store)[-1]
    read.clear()
    with showing_bars(True):
        report = prune_folder(store, job, tmp_path / "pruned")
    assert report.plan == expected.plan and report.plan.experts
    # Once for all ways to scale; then for texts before and after, and for what is written.
    assert all(read.count(each) <= 8 for each in store._head)
    pruned = load_pruned(tmp_path / "pruned")
    assert same_weights(pruned, whole)
    assert torch.equal(outputs(pruned), outputs(whole))
    assert report.settings.get("expert_scales") == expected.settings.get("expert_scales")
    for ours, theirs in zip(report.sites, expected.sites, strict=True):
        assert (ours.name, ours.damp, ours.error) == (theirs.name, theirs.damp, theirs.error)
    assert report.params == expected.params
    assert report.evaluation.keys() == expected.evaluation.keys()
    for name, measured in expected.evaluation.items():
        assert report.evaluation[name] == pytest.approx(measured, rel=1e-5), name
    assert verify_pruned(tmp_path / "pruned")["agrees"]


def test_weights_of_another_shape_are_refused_before_a_block_is_read(tmp_path):
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj.weight.data = torch.zeros(40, 20)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match=r"down_proj.weight with shape \(40, 20\), its config"):
        BlockStore(tmp_path / "dense")


def test_a_model_without_its_head_is_read_as_in_memory(tmp_path):
    """Its config names the class with one."""
    model = tiny("llama", tie_word_embeddings=False)
    model.model.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    by_blocks(tmp_path / "dense", batches(model, 2), tmp_path / "pruned", schedule="one-pass")
    assert type(load_pruned(tmp_path / "pruned")).__name__ == "LlamaModel"


def test_equal_layers_load_without_code(llama, tmp_path):
    from transformers import AutoModelForCausalLM

    data = batches(tiny("llama"), 3)
    # Half of the heads divide the hidden size, as transformers demands.
    choices = {"keep": 0.5, "uniform_layers": True, "allocation": "uniform", "tile": 4}
    by_blocks(llama, data, tmp_path / "pruned", **choices)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert not (tmp_path / "pruned" / "liar_loader.py").exists()
    assert same_weights(stock, load_pruned(tmp_path / "pruned"))


@pytest.mark.parametrize("schedule", ["one-pass", "layerwise"])
def test_hidden_states_and_sums_that_do_not_fit_change_nothing(
    llama, schedule, tmp_path, monkeypatch
):
    data = batches(tiny("llama"), 3)
    choices = {"schedule": schedule}
    roomy = by_blocks(llama, data, tmp_path / "roomy", **choices)
    monkeypatch.setattr("liar_ext.job.streamed.room_for_states", lambda *_: 0)
    tight = by_blocks(llama, data, tmp_path / "tight", **choices)
    assert same_weights(load_pruned(tmp_path / "tight"), load_pruned(tmp_path / "roomy"))
    assert roomy.settings["hidden_states_on_disk"] == 0
    assert tight.settings["hidden_states_on_disk"] > 0
    # With the sums of one block at a time, one pass walks twice.
    assert tight.settings["calibrate_passes"] == (2 if schedule == "one-pass" else 1)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_pruned_folder_is_pruned_again(llama, tmp_path):
    data = batches(tiny("llama"), 3)
    by_blocks(llama, data, tmp_path / "once")
    whole = load_pruned(tmp_path / "once")
    expected = prune(whole, data, keep=0.8, tile=1)
    report = by_blocks(tmp_path / "once", data, tmp_path / "twice", keep=0.8)
    assert report.plan == expected.plan
    assert same_weights(load_pruned(tmp_path / "twice"), whole)
    assert len(report.earlier) == 1


@pytest.mark.parametrize("mode", ["bias", "affine", "none"])
def test_biases_that_are_new_are_written(llama, mode, tmp_path):
    data = batches(tiny("llama"), 3)
    whole = tiny("llama", tie_word_embeddings=False)
    prune(whole, data, keep=0.6, tile=1, reconstruct=mode)
    by_blocks(llama, data, tmp_path / "pruned", reconstruct=mode)
    assert same_weights(load_pruned(tmp_path / "pruned"), whole)


def test_held_out_text_is_judged_on_the_way(llama, tmp_path):
    data = batches(tiny("llama"), 4)
    whole = tiny("llama", tie_word_embeddings=False)
    expected = prune(whole, data[:3], keep=0.6, tile=1, evaluate_on=data[3:])
    store, recipe = BlockStore(llama), Recipe(keep=0.6, tile=1)
    job = Job(store.model, data[:3], recipe, evaluate_on=data[3:], limit=4 * GIB)
    report = prune_folder(store, job, tmp_path / "pruned")
    assert report.evaluation == expected.evaluation


@pytest.mark.parametrize("prefetch", [True, False])
def test_one_block_is_in_memory_at_a_time(llama, prefetch, tmp_path, monkeypatch):
    """And with reading ahead two; neither the dense model nor the pruned one is ever whole."""
    alive, most = weakref.WeakSet(), 0
    read = BlockStore._read_below

    def counted(self, path):
        nonlocal most
        tensors = read(self, path)
        if "layers" in path:
            alive.add(next(iter(tensors.values())).untyped_storage())
            most = max(most, len(alive))
        return tensors

    monkeypatch.setattr(BlockStore, "_read_below", counted)
    store = BlockStore(llama, prefetch=prefetch)
    assert all(p.is_meta for n, p in store.model.named_parameters() if "layers" in n)
    assert store.model.lm_head.weight.is_meta
    data, recipe = batches(store.model, 3), Recipe(keep=0.6, tile=1, schedule="layerwise")
    prune_folder(store, Job(store.model, data, recipe, limit=4 * GIB), tmp_path / "pruned")
    assert 1 <= most <= 2 + prefetch  # the one before is dropped while the next comes in
    assert all(p.is_meta for n, p in store.model.named_parameters() if "layers" in n)


@pytest.mark.parametrize("job", JOBS)
def test_one_block_has_sums_and_new_weights_at_a_time(llama, job, tmp_path, monkeypatch):
    """Those of the block before are gone when the next one is summed, or a walk begins."""
    before: list[weakref.ref] = []
    sums, start = StreamedPasses._sums, LayerwiseSolver.start

    def begun(self, *texts):
        assert [each() for each in before] == [None] * len(before)
        start(self, *texts)

    def watched(self, index, group):
        assert [each() for each in before] == [None] * len(before)
        found = sums(self, index, group)
        before[:] = [weakref.ref(each.gram) for each in found.values()]
        return found

    def kept(_, index, weights, rows):
        before.extend(weakref.ref(weight) for weight, _ in weights.values())

    monkeypatch.setattr(StreamedPasses, "_sums", watched)
    monkeypatch.setattr(LayerwiseSolver, "start", begun)
    monkeypatch.setattr("liar_ext.reconstruction.layerwise.keep_block", kept)
    monkeypatch.setattr("liar_ext.job.streamed.room_for_states", lambda *_: 0)
    by_blocks(llama, batches(tiny("llama"), 3), tmp_path / "pruned", **JOBS[job])
    assert before


def test_weights_are_written_as_they_are_solved(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("liar_ext.job.streamed.SHARD_BYTES", 1)
    by_blocks(llama, batches(tiny("llama"), 3), tmp_path / "pruned")
    names = sorted(path.name for path in (tmp_path / "pruned").glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / "pruned/model.safetensors.index.json").read_text())
    pruned = load_pruned(tmp_path / "pruned")
    assert index["metadata"]["total_parameters"] == pruned.num_parameters()
    assert index["metadata"]["total_size"] == sum(
        p.numel() * p.element_size() for p in pruned.parameters()
    )
    assert index["weight_map"]["model.layers.1.mlp.down_proj.weight"] == names[1]


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"criterion": "taylor"}, "--criterion taylor needs the whole model"),
        ({"keep_hidden": 0.9}, "--keep-hidden 0.9 needs the whole model"),
        ({"of": "latency"}, "--of latency needs the whole model"),
        ({"memory": 1 << 20}, "--memory 1048576 needs the whole model"),
    ],
)
def test_what_needs_the_whole_model_is_refused(choices, said, llama, tmp_path):
    with pytest.raises(InputError, match=said):
        by_blocks(llama, batches(tiny("llama"), 3), tmp_path / "pruned", **choices)
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("t5", "it has several stacks of blocks"),
        ("bart", "it has several stacks of blocks"),
        ("albert", "a block runs several times"),
    ],
)
def test_models_that_are_no_single_chain_are_refused(name, reason, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match=f"can't read this .* block by block: {reason}"):
        by_blocks(tmp_path / "dense", batches(model, 2), tmp_path / "pruned", schedule="one-pass")


def test_what_comes_between_two_blocks_is_seen(llama, tmp_path):
    store = BlockStore(llama)
    store.model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    with pytest.raises(InputError, match="changes it before block 1; leave them out"):
        data, recipe = batches(store.model, 3), Recipe(keep=0.6)
        prune_folder(store, Job(store.model, data, recipe, limit=4 * GIB), tmp_path / "pruned")
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_refused_with_what_it_takes(llama, tmp_path):
    with pytest.raises(InputError, match=r"--max-memory must be at least .*GiB.* a shard"):
        by_blocks(llama, batches(tiny("llama"), 3), tmp_path / "pruned", limit=1 << 20)
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("change", ["other", "shorter"])
def test_a_file_that_changes_on_the_way_ends_the_job_with_nothing_left(change, llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    store = BlockStore(model, prefetch=False)
    if change == "other":
        os.utime(model / "model.safetensors", ns=(1, 1))
    else:
        os.truncate(model / "model.safetensors", 5000)
    with pytest.raises(InputError, match="can't read model.layers.0.* was changed after it was"):
        data, recipe = batches(store.model, 3), Recipe(keep=0.6)
        prune_folder(store, Job(store.model, data, recipe, limit=4 * GIB), tmp_path / "pruned")
    assert list(tmp_path.iterdir()) == [model]


def test_a_file_whose_place_another_takes_is_read_on(llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    store = BlockStore(model, prefetch=False)
    (tmp_path / "other").write_bytes(b"other")
    os.replace(tmp_path / "other", model / "model.safetensors")
    expected = tiny("llama", tie_word_embeddings=False).state_dict()
    with store.block(1):
        for name, value in store.tensors(1).items():
            assert torch.equal(value, expected[name])
    store.close()


def test_weights_that_are_not_finite_are_refused_when_they_are_read(tmp_path):
    model = tiny("llama")
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match=r"NaN or infinity in model.layers.2.mlp.up_proj"):
        by_blocks(tmp_path / "dense", batches(model, 3), tmp_path / "pruned")


def test_experts_are_put_together_in_files_without_names(tmp_path, monkeypatch):
    model = tiny("mixtral")
    model.save_pretrained(tmp_path / "dense")
    names = load_file(tmp_path / "dense/model.safetensors").keys()
    assert any(".experts.0.w1." in name for name in names)
    (tmp_path / "room").mkdir()
    store = BlockStore(tmp_path / "dense", room=tmp_path / "room")
    assert [*(tmp_path / "room").iterdir()] == []
    state = model.state_dict()
    with store.block(1) as block:
        for name, value in block.state_dict().items():
            assert torch.equal(value, state[f"model.layers.1.{name}"]), name
    assert all(value.is_meta for value in store.model.model.layers[1].parameters())

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.core_model_loading.offload_weight", full)
    with pytest.raises(InputError, match="No space left on device"):
        BlockStore(tmp_path / "dense", room=tmp_path / "room")
    assert [*(tmp_path / "room").iterdir()] == []


def test_experts_that_a_killed_job_put_together_go_at_the_next_start(tmp_path, monkeypatch):
    tiny("mixtral").save_pretrained(tmp_path / "dense")
    room, mine = tmp_path / "room", tmp_path / "mine"
    for folder in (room, mine):
        folder.mkdir()
    (mine / MARKER_FILE).touch()  # a link of a stranger leads to it
    link = room / ".liar-experts.0123abcd"
    link.symlink_to(mine)

    def killed(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr("transformers.core_model_loading.offload_weight", killed)
        job = forked.fork(lambda: BlockStore(tmp_path / "dense", room=room) and None)
        assert forked.end(job) == -signal.SIGKILL
    (left,) = {*room.iterdir()} - {link}
    assert left.stat().st_mode & 0o077 == 0  # nobody else reads the weights
    BlockStore(tmp_path / "dense", room=room)
    assert [*room.iterdir()] == [link] and [*mine.iterdir()] == [mine / MARKER_FILE]


def test_a_gguf_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="a GGUF file can't be read block by block"):
        BlockStore(tmp_path / "model.gguf")


def test_an_unknown_data_type_is_refused(llama):
    with pytest.raises(InputError, match="dtype must be one of torch, .*, got 'float3'"):
        BlockStore(llama, dtype="float3")


def test_reading_ahead_is_given_up_where_memory_is_short(llama, monkeypatch):
    monkeypatch.setattr(estimate, "process_memory", lambda: 0)
    store = BlockStore(llama)
    job = Job(store.model, batches(store.model, 3), Recipe(keep=0.6), limit=4 * GIB)
    lines, shares = describe_streamed(job, store), prepare(replace(job, walk=Walk(store))).shares
    assert "with reading ahead" in lines[0] and "0 GiB lie in" in lines[2]
    needed = sum(shares.need.values()) - shares.shard + store.block_bytes
    assert "without reading ahead" in describe_streamed(replace(job, limit=needed - 1), store)[0]
