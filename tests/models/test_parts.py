"""Models of several parts, or of blocks that repeat: what is summed, compared, timed and said."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import make_plan, pruned
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from tiny import batches, outputs, read_by_consumers, tiny, tiny_inputs
from torch import nn
from transformers import GenerationConfig

from liar_ext import (
    Budget,
    InputError,
    Plan,
    apply_plan,
    calibrate,
    kl_divergence,
    load_pruned,
    prune,
    reconstruct,
    save_pruned,
    score,
    site_divergences,
    verify_pruned,
)
from liar_ext.calibration.divergence import collect_gradients
from liar_ext.checkpoint import load_model
from liar_ext.export import uniform
from liar_ext.integrations.linear_grams import calibrate_linears
from liar_ext.measure.latency import measure_latency
from liar_ext.measure.speed import Settings, run_once
from liar_ext.models.plan import SitePlan
from liar_ext.models.running import complete_inputs
from liar_ext.models.sites import sites
from liar_ext.reconstruction.layerwise import reconstruct_layerwise
from liar_ext.report.page import write_page
from liar_ext.report.pictures import KINDS, kept
from liar_ext.report.report import Report
from liar_ext.selection.allocation import probe_plan

PARTS = ["clip", "bart", "t5", "whisper"]
SHORT = {"latency_prompt": 6, "latency_new_tokens": 4}


@pytest.mark.parametrize("name", ["albert", "albert one", *PARTS])
def test_every_run_counts_and_the_padding_of_each_part_does_not(name: str) -> None:
    model = tiny(name)
    inputs = tiny_inputs(model, batch=4, tokens=8)
    masks = {part: None for part in ("vision", "encoder")}
    if "input_ids" in inputs:
        inputs["attention_mask"][1, -3:] = 0
        masks |= dict.fromkeys(("", "text", "encoder"), inputs["attention_mask"])
    if "decoder_input_ids" in inputs:
        inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
        inputs["decoder_attention_mask"][2, -2:] = 0
        masks["decoder"] = inputs["decoder_attention_mask"]
    bank = calibrate(model, [inputs])
    seen = read_by_consumers(model, [inputs])
    for site in sites(model):
        mask, gram, count = masks[site.part.name], 0, 0
        for x in seen[site.name]:
            x = x.reshape(4, -1, site.d_in).double()
            x = x.flatten(0, 1) if mask is None else x[mask.bool()]
            gram, count = gram + x.T @ x, count + len(x)
        got = bank[site.name]
        assert got.tokens.sum() == count
        torch.testing.assert_close(
            got.pooled()[0].tril(), torch.as_tensor(gram).tril(), rtol=1e-5, atol=1e-5
        )


def test_a_decoder_reads_the_labels_or_the_text_shifted_by_one() -> None:
    model = tiny("t5")
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    labels = torch.tensor([[3, 4, -100, -100]] * 2)
    text = complete_inputs(model, {"input_ids": ids, "attention_mask": mask})
    assert text["decoder_input_ids"].tolist() == [[0, 5, 6], [0, 8, 9]]
    assert text["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    asked = complete_inputs(model, {"input_ids": ids}, {"labels": labels})
    assert asked["decoder_input_ids"].tolist() == [[0, 3, 4, 0]] * 2
    assert asked["decoder_attention_mask"].tolist() == [[1, 1, 1, 0]] * 2
    given = {"input_ids": ids, "decoder_input_ids": ids}
    assert complete_inputs(model, given, {"labels": labels}) == given
    stock = model.prepare_decoder_input_ids_from_labels(labels=labels)
    assert torch.equal(stock, asked["decoder_input_ids"])
    assert complete_inputs(tiny("bert"), {"input_ids": ids}) == {"input_ids": ids}


@pytest.mark.parametrize(
    ("name", "lacking"), [("clip", "pixel_values"), ("whisper", "decoder_input_ids")]
)
def test_a_batch_that_lacks_an_input_is_refused(name: str, lacking: str) -> None:
    model = tiny(name)
    data = [{k: v for k, v in each.items() if k != lacking} for each in batches(model, 2)]
    with pytest.raises(InputError, match=f"give batches with {lacking}, too"):
        prune(model, data, 0.6)


def test_text_alone_is_enough_for_an_encoder_decoder() -> None:
    model = tiny("bart")
    data = [{"input_ids": each["input_ids"]} for each in batches(model, 3)]
    report = prune(model, data, 0.6)
    assert {site.removed for site in report.plan.sites.values()} != {()}


@pytest.mark.parametrize("name", ["albert", *PARTS])
def test_a_sensitivity_is_that_of_pruning_the_site_alone(name: str) -> None:
    model = tiny(name)
    at = sites(model)
    data = [tiny_inputs(model, batch=4, tokens=10, seed=seed) for seed in range(2)]
    bank = calibrate(model, data, at)
    scores = score(model, bank, at, "wifv")
    plan = probe_plan(at, scores, Budget(0.7), model_type=model.config.model_type)
    weights, _ = reconstruct(model, bank, plan, mode="linear", damp=1e-2)
    got = site_divergences(model, data[:1], plan, weights)
    for site_name in (at[0].name, at[len(at) // 2].name, at[-2].name):
        alone = copy.deepcopy(model)
        apply_plan(
            alone,
            replace(plan, sites={site_name: plan.sites[site_name]}),
            {site_name: weights[site_name]},
        )
        want = kl_divergence(alone, model, data[:1])
        assert want > 0 and got[site_name] == pytest.approx(want, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("name", ["albert", "t5"])
def test_the_fisher_information_of_every_run(name: str) -> None:
    """By a mask on each unit, and the gradient of each sequence's loss by itself."""
    model = tiny(name)
    inputs = tiny_inputs(model, batch=2, tokens=6)
    labels = torch.randint(3, 60, (2, 6))
    inputs.pop("decoder_input_ids", None)
    at = sites(model)
    got = collect_gradients(model, [{**inputs, "labels": labels}], at)
    for site in (at[0], at[-1]):
        total = torch.zeros(site.units, dtype=torch.float64)
        for row in range(2):
            mask = torch.ones(site.units, requires_grad=True)
            hook = model.get_submodule(site.consumer).register_forward_pre_hook(
                lambda _, args, m=mask, s=site: (args[0] * m.repeat_interleave(s.width),)
            )
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            loss = model(**one, labels=labels[row : row + 1]).loss * 6
            total += torch.autograd.grad(loss, mask)[0].double().square() / 2
            hook.remove()
        torch.testing.assert_close(got[site.name].fisher, total, rtol=1e-3, atol=1e-7)


def test_criteria_of_gradients_need_labels_of_an_encoder_decoder() -> None:
    model = tiny("t5")
    data = batches(model, 2)
    with pytest.raises(InputError, match="is no causal language model and got no labels"):
        prune(model, data, 0.6, criterion="fisher")
    labels = [{**each, "labels": each["decoder_input_ids"]} for each in data]
    prune(model, labels, 0.6, criterion="fisher")


def test_no_job_is_layerwise_where_blocks_cannot_be_run_one_by_one() -> None:
    model = tiny("albert")
    data = batches(model, 2)
    with pytest.raises(InputError, match=r"one pass only, .*=\"one-pass\""):
        prune(model, data, 0.6, schedule="layerwise")
    with pytest.raises(InputError, match="layerwise: this"):
        reconstruct_layerwise(model, data, make_plan(model))
    report = prune(model, data, 0.6)
    assert report.settings["schedule"] == "one-pass"
    assert any("in one pass, not one after the other: this" in each for each in report.warnings)


def test_a_convolution_between_blocks_is_noticed() -> None:
    """DeBERTa v2 has one after its first block, and v3 has none."""
    fields = {"conv_kernel_size": 3}
    report = prune(tiny("deberta-v2", **fields), batches(tiny("deberta-v2"), 2), 0.6)
    assert any("a layer that is in no block" in each for each in report.warnings)
    model = tiny("deberta-v2")
    assert prune(model, batches(model, 2), 0.6).settings["schedule"] == "layerwise"


@pytest.mark.parametrize("name", ["clip", "whisper"])
def test_a_folder_is_verified_with_what_all_parts_read(name: str, tmp_path: Path) -> None:
    model, plan = pruned(name)
    save_pruned(model, tmp_path / "saved", plan)
    assert verify_pruned(tmp_path / "saved")["agrees"]
    weights = tmp_path / "saved" / "model.safetensors"
    for part in {site.part.name for site in sites(model)}:
        tensors = load_file(weights)
        changed = {key: value.clone() for key, value in tensors.items()}
        for key in changed:
            if part in key and ".1." in key and key.endswith(".weight"):
                changed[key] += 0.5
        save_file(changed, weights, {"format": "pt"})
        assert not verify_pruned(tmp_path / "saved")["agrees"]
        save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize("name", [*PARTS, "albert", "dinov3_vit"])
def test_models_are_timed_with_what_they_read(name: str) -> None:
    model = tiny(name)
    found = run_once(model, 2, Settings(prompt_length=6, new_tokens=2), iter(range(99)).__next__)
    assert {what for what, _ in found} == {"encode"}
    budget = Budget(0.8, "latency", latency_phase="prefill", **SHORT)
    table = measure_latency(model, budget, sites(model))
    assert {row.shape for row in table.rows} == {site.shape for site in sites(model)}


@pytest.mark.parametrize("name", ["bart", "clip", "umt5"])
def test_equal_layers_by_zeros(name: str, saved, tmp_path: Path) -> None:
    model, _, folder = saved(name)
    uniform.export(folder, tmp_path / "equal")
    again = type(model).from_pretrained(tmp_path / "equal")
    torch.testing.assert_close(outputs(again.eval()), outputs(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_bias_of_positions_goes_through_t5_whole(attention: str, tmp_path: Path) -> None:
    """Whatever heads a block has, pruned once or twice, copied, pickled, or left half-way."""
    model, kept = tiny("t5"), {}
    model.set_attn_implementation(attention)
    for index, site in enumerate(site for site in sites(model) if site.kind == "attn"):
        kept[site.name] = SitePlan(4, ((1, 3), (0, 2, 3), (2,), (0, 1, 3))[index % 4])
    plan, twice = Plan("t5", "auto", kept), copy.deepcopy(model)
    first = {name: SitePlan(4, tuple(sorted({*site.kept, 3}))) for name, site in kept.items()}
    second = {
        name: SitePlan(len(site.kept), tuple(site.kept.index(unit) for unit in kept[name].kept))
        for name, site in first.items()
    }
    apply_plan(model, plan)
    expected = outputs(model)
    apply_plan(twice, Plan("t5", "auto", first))
    apply_plan(twice, Plan("t5", "auto", second))
    torch.testing.assert_close(outputs(twice), expected)
    calibrate(twice, batches(twice, 2))  # which ends every pass half-way
    torch.testing.assert_close(outputs(copy.deepcopy(twice)), expected)
    torch.testing.assert_close(outputs(pickle.loads(pickle.dumps(twice))), expected)
    save_pruned(twice, tmp_path / "saved", plan)
    torch.testing.assert_close(outputs(load_pruned(tmp_path / "saved")), expected)


@pytest.mark.parametrize(
    "said",
    [
        [3, "position_bias", None],
        [3, "position_bias", [0], 1],
        [3, "position_bias", [0], "1", "table"],
        [3, "position_bias", {}, 1, "table"],
    ],
)
def test_a_config_that_is_damaged_is_told_of(said: list, tmp_path: Path) -> None:
    import json

    model, plan = pruned("t5")
    save_pruned(model, tmp_path / "saved", plan)
    path = tmp_path / "saved" / "config.json"
    fields = json.loads(path.read_text())
    fields["liar"]["head_inputs"]["encoder.block.0.layer.0.SelfAttention"] = said
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="head_inputs must map modules"):
        load_pruned(tmp_path / "saved")


def test_layers_that_read_several_things_have_no_common_gram() -> None:
    for name, site in (("bart", "decoder.0.cross_attn"), ("deberta-v2", "0.attn")):
        model = tiny(name)
        with pytest.raises(InputError, match=f"the producers of {site} must all read the same"):
            calibrate_linears(model, batches(model, 2), sites(model))
    model = tiny("albert")
    bank = calibrate_linears(model, batches(model, 2), sites(model))
    assert bank["0.mlp.in"].tokens.sum() == bank["0.mlp"].tokens.sum() == 2 * 2 * 8 * 16


def test_towers_with_a_tokenizer_are_loaded(tmp_path: Path, tokenizer) -> None:
    model = tiny("clip")
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    loaded, words = load_model(tmp_path / "dense")
    assert len(words("ab")["input_ids"]) == 2
    assert torch.equal(outputs(loaded), outputs(model))


def test_a_report_of_parts_has_a_page(tmp_path: Path) -> None:
    model = tiny("bart")
    report = prune(model, batches(model, 3), 0.6)
    assert "of the attention heads and" in " ".join(report.to_card().split())
    (tmp_path / "liar").mkdir()
    report.save(tmp_path)
    panels = kept(Report.load(tmp_path).sites, Figure).axes
    titles = [panel.get_title(loc="left").partition(":")[0] for panel in panels]
    assert titles == [KINDS["attn"], KINDS["mlp"]]
    assert "decoder.1.cross_attn" in write_page(tmp_path)[0].read_text()


def test_a_graph_has_one_input(saved, tmp_path: Path) -> None:
    onnx = pytest.importorskip("liar_ext.export.onnx")
    *_, folder = saved("clip")
    with pytest.raises(InputError, match="reads pixel_values and input_ids; save a part of it"):
        onnx.export(folder, tmp_path / "graph")


def test_heads_that_time_words_are_the_same_ones_afterwards(tmp_path: Path) -> None:
    model = tiny("whisper")
    named = [[0, 2], [1, 3], [1, 0], [1, 1]]
    model.generation_config = GenerationConfig(alignment_heads=named)
    inputs = tiny_inputs(model)

    def maps(model: nn.Module, heads: list[list[int]]) -> torch.Tensor:
        model.set_attn_implementation("eager")
        seen = model(**inputs, output_attentions=True).cross_attentions
        return torch.stack([seen[block][:, head] for block, head in heads])

    dense = maps(model, named)
    plan = Plan("whisper", "head", {"decoder.1.cross_attn": SitePlan(4, (1, 3))})
    apply_plan(model, plan)
    assert model.generation_config.alignment_heads == [[0, 2], [1, 1], [1, 0]]
    save_pruned(model, tmp_path / "pruned", plan)
    loaded = load_pruned(tmp_path / "pruned")
    found = maps(loaded, loaded.generation_config.alignment_heads)
    assert torch.equal(found, dense[[0, 1, 3]])
    for block, units in ((0, 4), (1, 2)):
        model.generation_config.alignment_heads = [[block, 1]]
        apply_plan(
            model, Plan("whisper", "head", {f"decoder.{block}.cross_attn": SitePlan(units, (0,))})
        )
        assert not hasattr(model.generation_config, "alignment_heads")
