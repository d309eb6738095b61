"""Diffusion transformers of diffusers: slicing, reconstruction, folders, pipelines, timesteps."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from liar_ext import (
    InputError,
    Plan,
    apply_plan,
    calibrate,
    load_model,
    load_pruned,
    prune,
    reconstruct,
    save_pruned,
    timestep_weights,
    verify_pruned,
)
from liar_ext.calibration.batches import probe_batches, read_batches
from liar_ext.calibration.saved_sums import digest_of
from liar_ext.cli.options import error_lines
from liar_ext.models.layers import layer_of
from liar_ext.models.plan import SitePlan, kind_of
from liar_ext.models.running import output_of
from liar_ext.models.sites import Site, get_consumer_weight, sites
from liar_ext.selection.sensitivity import pruned_site

diffusers = pytest.importorskip("diffusers")

HEADS = {"num_attention_heads": 4, "attention_head_dim": 8}
TEXT = {"joint_attention_dim": 24, "pooled_projection_dim": 16}
# By the name of the row: fields of the config, and what a timestep without any signal is.
TINY: dict[str, tuple[dict, float]] = {
    "DiTTransformer2DModel": (
        {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 3, "sample_size": 8}
        | {"num_embeds_ada_norm": 1000, "norm_num_groups": 4},
        1000.0,
    ),
    "SD3Transformer2DModel": (
        {**HEADS, **TEXT, "in_channels": 4, "out_channels": 4, "num_layers": 3, "sample_size": 8}
        | {"caption_projection_dim": 32, "pos_embed_max_size": 8, "qk_norm": "rms_norm"},
        1000.0,
    ),
    "FluxTransformer2DModel": (
        {**HEADS, **TEXT, "in_channels": 16, "num_layers": 2, "num_single_layers": 2}
        | {"axes_dims_rope": (2, 2, 4), "guidance_embeds": True},
        1.0,
    ),
    "QwenImageTransformer2DModel": (
        {**HEADS, "joint_attention_dim": 24, "in_channels": 16, "out_channels": 4}
        | {"num_layers": 2, "axes_dims_rope": (2, 2, 4)},
        1.0,
    ),
}
JOINT = [name for name in TINY if not name.startswith("DiT")]
rows = pytest.mark.parametrize("name", TINY)


def tiny(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**TINY[name][0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def inputs_of(name: str, samples: int = 4, seed: int = 1, dtype=torch.float32) -> dict:
    """Return inputs of a model's forward as a pipeline gives them, and the weights of samples."""
    generator, last = torch.Generator().manual_seed(seed), TINY[name][1]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(samples, *shape, generator=generator).to(dtype)

    timestep = last * torch.rand(samples, generator=generator)
    if name == "DiTTransformer2DModel":
        labels = torch.randint(1000, (samples,), generator=generator)
        return {
            "hidden_states": drawn(4, 8, 8),
            "timestep": timestep.long(),
            "class_labels": labels,
        }
    text = {"encoder_hidden_states": drawn(5, 24), "timestep": timestep.to(dtype)}
    if name == "SD3Transformer2DModel":
        return {"hidden_states": drawn(4, 8, 8), "pooled_projections": drawn(16), **text}
    if name == "QwenImageTransformer2DModel":
        return {"hidden_states": drawn(16, 16), "img_shapes": [[(1, 4, 4)]] * samples, **text}
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return {
        "hidden_states": drawn(16, 16),
        "pooled_projections": drawn(16),
        "guidance": torch.full((samples,), 3.5, dtype=dtype),
        "img_ids": places,
        "txt_ids": torch.zeros(5, 3),
        **text,
    }


def batches_of(name: str, count: int = 6, dtype=torch.float32) -> list[dict]:
    found = [inputs_of(name, seed=10 + seed, dtype=dtype) for seed in range(count)]
    return [
        {**each, "weight": timestep_weights(each["timestep"], last=TINY[name][1])} for each in found
    ]


@torch.no_grad()
def output(model: nn.Module, name: str, **how) -> Tensor:
    return model(**inputs_of(name, **how)).sample


def half(model: nn.Module, kind: str = "") -> Plan:
    """Keep every other unit of each site of a kind, those of each next block moved by one."""
    kept = {
        site.name: SitePlan(site.units, tuple(range(site.block % 2, site.units, 2)))
        for site in sites(model)
        if kind in site.name
    }
    return Plan(type(model).__name__, "head", kept)


@torch.no_grad()
def zeroed(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of a model in which what the plan removes is read as zero."""
    model = copy.deepcopy(model)
    for site in sites(model, attn_unit="head"):
        if site.name in plan.sites:
            weight = get_consumer_weight(model, site).clone()
            weight[:, site.features(plan.sites[site.name].removed)] = 0
            for path, features, columns in site.reads:
                model.get_submodule(path).weight[:, columns] = weight[:, features]
    return model


def test_sites_are_named_by_stack_and_block():
    def names(name: str) -> list[str]:
        return [site.name for site in sites(tiny(name)) if site.block == 1]

    assert names("DiTTransformer2DModel") == ["1.attn", "1.mlp"]
    both = ["1.attn", "1.mlp", "1.context_mlp"]
    assert names("SD3Transformer2DModel") == names("QwenImageTransformer2DModel") == both
    flux = [f"double.{name}" for name in both] + ["single.1.attn", "single.1.mlp"]
    assert names("FluxTransformer2DModel") == flux
    # The last block of SD3 reads the text and drops it.
    last = [site for site in sites(tiny("SD3Transformer2DModel")) if site.block == 2]
    assert [(site.name, site.shared) for site in last] == [("2.attn", False), ("2.mlp", False)]


@rows
def test_reports_and_exports_know_a_site_by_its_name(name: str):
    assert all(kind_of(site.name) == site.kind for site in sites(tiny(name)))


@rows
@pytest.mark.parametrize("kind", ["", "attn", "mlp"])
def test_slicing_equals_zeroing(name: str, kind: str):
    model = tiny(name, torch.float64)
    plan = half(model, kind)
    sliced = copy.deepcopy(model)
    apply_plan(sliced, plan)
    expected = output(zeroed(model, plan), name, dtype=torch.float64)
    torch.testing.assert_close(
        output(sliced, name, dtype=torch.float64), expected, rtol=0, atol=1e-5
    )
    assert (expected - output(model, name, dtype=torch.float64)).abs().max() > 1e-2
    removed = {site.name: site.unit_params for site in sites(model)}
    expected = sum(removed[n] * len(site.removed) for n, site in plan.sites.items())
    counts = [sum(each.numel() for each in m.parameters()) for m in (model, sliced)]
    assert counts[0] - counts[1] == expected > 0


@torch.no_grad()
def read_by(model: nn.Module, path: str, batches: list[dict]) -> list[Tensor]:
    """Return what a layer reads in each batch, ``(samples, tokens, features)`` float64."""
    seen = []
    layer = model.get_submodule(path)
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].double())):
        for batch in batches:
            model(**{name: value for name, value in batch.items() if name != "weight"})
    return seen


def gram_of(model: nn.Module, site: Site, batches: list[dict]) -> Tensor:
    """Return ``Σ_t w_t x_t x_tᵀ`` over all that reads the units of a site, by definition."""
    gram = torch.zeros(site.d_in, site.d_in, dtype=torch.float64)
    for path, features, columns in site.reads:
        for x, batch in zip(read_by(model, path, batches), batches, strict=True):
            own = x[..., columns]
            part = torch.einsum("s,sti,stj->ij", batch["weight"], own, own)
            gram[features[:, None], features] += part
    return gram


@rows
def test_weights_of_timesteps_reach_the_sums(name: str):
    model, batches = tiny(name, torch.float64), batches_of(name, 3, torch.float64)
    bank = calibrate(model, batches)
    plain = calibrate(model, [{n: v for n, v in b.items() if n != "weight"} for b in batches])
    # Some weights are those of no other: a Gram of another order or mean is another one.
    assert len({round(float(w), 3) for b in batches for w in b["weight"]}) > 6
    for site in sites(model):
        found = bank[site.name].gram.sum(0)
        expected = gram_of(model, site, batches).tril()
        torch.testing.assert_close(found.tril(), expected, rtol=1e-9, atol=1e-9)
        tokens = plain[site.name].tokens.sum() / sum(map(len, (b["weight"] for b in batches)))
        total = torch.cat([b["weight"] for b in batches]).sum() * tokens
        torch.testing.assert_close(bank[site.name].tokens.sum(), total)
    # Tokens are counted, not weighted: those of the image, and of Flux the text beside it.
    assert bank.source["tokens"] == 3 * 4 * (21 if name.startswith("Flux") else 16)


@pytest.mark.parametrize("name", JOINT)
def test_each_layer_that_reads_heads_is_solved_for_its_own_tokens(name: str):
    """The solve of both at once is the one of each by its own Gram: ``W G_:K (G_KK + λ D)⁻¹``."""
    model, batches = tiny(name, torch.float64), batches_of(name, 12, torch.float64)
    site = next(site for site in sites(model) if site.wiring.also)
    kept, damp = (0, 2, 3), 1e-9
    plan = Plan(name, "head", {site.name: SitePlan(4, kept)})
    weights, (row,) = reconstruct(model, calibrate(model, batches, [site]), plan, damp=damp)
    assert row.path.startswith("linear") and weights[site.name][1] is None
    columns = torch.tensor([8 * head + at for head in kept for at in range(8)])
    for run, (path, _, _) in enumerate(site.reads):
        weight = model.get_submodule(path).weight.double()
        gram = sum(
            torch.einsum("s,sti,stj->ij", batch["weight"], x, x)
            for x, batch in zip(read_by(model, path, batches), batches, strict=True)
        )
        expected = weight @ gram[:, columns] @ torch.linalg.inv(gram[columns][:, columns])
        found = weights[site.name][0].view(32, 3, 2, 8)[:, :, run].flatten(1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@rows
@pytest.mark.parametrize("kind", ["attn", "mlp"])
def test_reconstruction_lowers_the_error_of_the_output(name: str, kind: str):
    dense = tiny(name)
    errors = {}
    for mode in ("none", "auto"):
        model = copy.deepcopy(dense)
        how = {"allocation": "uniform", "schedule": "one-pass", "criterion": "wifv"}
        report = prune(model, batches_of(name, 12), 0.5, reconstruct=mode, sites=kind, **how)
        assert all(kind in site and kept.removed for site, kept in report.plan.sites.items())
        errors[mode] = float((output(model, name) - output(dense, name)).square().sum())
    assert errors["auto"] < 0.9 * errors["none"]


@rows
@pytest.mark.filterwarnings("ignore:Layers were solved", "ignore:The cross-validated error")
def test_a_job_saves_and_loads(name: str, tmp_path: Path):
    model = tiny(name)
    report = prune(model, batches_of(name), 0.6, certify_on=batches_of(name, 1))
    assert report.evaluation["certified"]["divergence"] > 0
    if name == "DiTTransformer2DModel":
        assert report.settings["schedule"] == "layerwise"
    expected = output(model, name)
    save_pruned(model, tmp_path / "one", report=report)
    loaded = load_pruned(tmp_path / "one")
    assert not loaded.training and torch.equal(output(loaded, name), expected)
    assert isinstance(loaded, getattr(diffusers, name)) and type(loaded).__name__ == name
    loaded.save_pretrained(tmp_path / "two")
    again = load_pruned(tmp_path / "two")
    assert torch.equal(output(again, name), expected) and again.config.liar == loaded.config.liar
    by_code = diffusers.AutoModel.from_pretrained(str(tmp_path / "two"), trust_remote_code=True)
    assert torch.equal(output(by_code, name), expected)
    with pytest.raises(ValueError, match="expected shape|size mismatch"):
        getattr(diffusers, name).from_pretrained(tmp_path / "one")
    again.train()
    again(**inputs_of(name)).sample.square().mean().backward()
    weights = [again.get_submodule(path).weight for site in sites(again) for path in site.producers]
    assert sum(bool(weight.grad is not None and weight.grad.any()) for weight in weights) > 8
    torch.optim.SGD(again.parameters(), lr=0.1).step()
    trained = output(again.eval(), name)
    assert not torch.equal(trained, expected)
    save_pruned(again, tmp_path / "three", load_plan(tmp_path / "one"))
    assert torch.equal(output(load_pruned(tmp_path / "three"), name), trained)
    card = (tmp_path / "one" / "README.md").read_text()
    assert "library_name: diffusers" in card and "liar verify" not in card


def load_plan(folder: Path) -> Plan:
    return Plan.load(folder / "liar" / "plan.json")


@pytest.mark.filterwarnings("ignore:Layers were solved")
def test_a_pruned_transformer_is_pruned_again(tmp_path: Path):
    """The second plan speaks of the units of the dense model."""
    name = "FluxTransformer2DModel"
    model = tiny(name)
    first = prune(model, batches_of(name), 0.7)
    save_pruned(model, tmp_path / "one", report=first)
    loaded = load_pruned(tmp_path / "one", dtype=torch.float64)
    assert loaded.dtype == torch.float64
    second = prune(loaded, batches_of(name, dtype=torch.float64), 0.7)
    assert len(loaded.config.liar["history"]) == 2 and len(second.earlier) == 1
    for site, kept in second.plan.sites.items():
        assert set(kept.kept) <= set(first.plan.sites[site].kept)
    save_pruned(loaded, tmp_path / "two", report=second)
    again = load_pruned(tmp_path / "two", dtype=torch.float64)
    both = [output(each, name, dtype=torch.float64) for each in (loaded, again)]
    assert torch.equal(*both)


def test_a_folder_keeps_the_dtype(tmp_path: Path):
    name = "QwenImageTransformer2DModel"
    model = tiny(name, torch.bfloat16)
    plan = half(model)
    apply_plan(model, plan)
    save_pruned(model, tmp_path / "one", plan)
    loaded = load_pruned(tmp_path / "one")
    assert loaded.dtype == torch.bfloat16
    both = [output(each, name, dtype=torch.bfloat16) for each in (model, loaded)]
    assert torch.equal(*both)
    assert load_pruned(tmp_path / "one", dtype="float16").dtype == torch.float16


def vae(**sizes) -> nn.Module:
    torch.manual_seed(1)
    kinds = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return diffusers.AutoencoderKL(
        block_out_channels=(4,),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=8,
        **kinds,
        **sizes,
    )


def pipeline_of(name: str, transformer: nn.Module):
    """Return a tiny pipeline without text encoders, and what to call it with."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler
    if name == "DiTTransformer2DModel":
        pipe = diffusers.DiTPipeline(transformer, vae(), diffusers.DDIMScheduler())
        return pipe, {"class_labels": [1]}
    none = ["text_encoder", "tokenizer", "vae"]
    given = {"prompt_embeds": torch.ones(1, 5, 24), "height": 8, "width": 8}
    if name == "QwenImageTransformer2DModel":
        kind, own = diffusers.QwenImagePipeline, {"true_cfg_scale": 1.0, "output_type": "latent"}
        given |= {"prompt_embeds_mask": torch.ones(1, 5, dtype=torch.long), **own}
        # Its autoencoder is one of videos; latents are what the transformer makes.
        given |= {"height": 64, "width": 64}
        parts = dict.fromkeys(none)
    else:
        none += ["text_encoder_2", "tokenizer_2"]
        given |= {"pooled_prompt_embeds": torch.ones(1, 16)}
        parts = {**dict.fromkeys(none), "vae": vae(shift_factor=0.0)}
        kind = diffusers.FluxPipeline
        if name == "SD3Transformer2DModel":
            kind, given["guidance_scale"] = diffusers.StableDiffusion3Pipeline, 1.0
            parts |= dict.fromkeys(["text_encoder_3", "tokenizer_3"])
    return kind(transformer=transformer, scheduler=flow(), **parts), given


def image(pipe, given: dict) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    return torch.as_tensor(pipe(**{"output_type": "np", **how, **given}).images[0])


@rows
@pytest.mark.filterwarnings("ignore:Layers were solved")
def test_a_pipeline_runs_with_the_loaded_transformer(name: str, tmp_path: Path):
    dense = tiny(name)
    pipe, given = pipeline_of(name, dense)
    before = image(pipe, given)
    model = copy.deepcopy(dense)
    report = prune(model, batches_of(name), 0.6)
    save_pruned(model, tmp_path / "pruned", report=report)
    pipe.transformer = load_pruned(tmp_path / "pruned")
    after = image(pipe, given)
    assert after.shape == before.shape and after.isfinite().all() and not after.equal(before)
    pipe.save_pretrained(tmp_path / "pipeline")
    # The index names the code in the folder of the transformer.
    with pytest.raises(ValueError, match="trust_remote_code"):
        type(pipe).from_pretrained(tmp_path / "pipeline")
    none = {part: None for part, there in pipe.components.items() if there is None}
    again = type(pipe).from_pretrained(tmp_path / "pipeline", trust_remote_code=True, **none)
    assert image(again, given).equal(after)


@pytest.mark.exhaustive
def test_a_pipeline_loads_without_liar_ext(tmp_path: Path):
    name = "DiTTransformer2DModel"
    model = tiny(name)
    plan = half(model)
    apply_plan(model, plan)
    save_pruned(model, tmp_path / "pruned", plan)
    pipe, given = pipeline_of(name, load_pruned(tmp_path / "pruned"))
    pipe.save_pretrained(tmp_path / "pipeline")
    torch.save(image(pipe, given), tmp_path / "image.pt")
    code = """
    import sys, torch
    sys.modules["liar_ext"] = None
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("pipeline", trust_remote_code=True)
    pipe.save_pretrained("again")
    for folder in ("pipeline", "again"):
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        how = {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
        found = pipe([1], num_inference_steps=2, **how).images[0]
        assert torch.as_tensor(found).equal(torch.load("image.pt"))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=tmp_path)


def test_weights_of_timesteps_are_those_of_obs_diff():
    """``min + (max − min) / ln T · ln(1 + s)`` for s = T − 1, ..., 0, the noisiest step first."""
    steps, low, high = 25, 0.8, 1.2
    expected = [low + (high - low) / math.log(steps) * math.log(1 + s) for s in range(steps)][::-1]
    found = timestep_weights(torch.linspace(1000, 0, steps))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert float(found[0]) == high and float(found[-1]) == low
    torch.testing.assert_close(timestep_weights(torch.linspace(1, 0, steps), last=1.0), found)
    with pytest.raises(InputError, match="give last=1 for Flux"):
        timestep_weights(torch.tensor([1001.0]))


def test_batches_of_diffusion_transformers():
    name = "FluxTransformer2DModel"
    (batch,) = read_batches(batches_of(name, 1))
    some = batch.select([2, 0])
    assert list(some.inputs) == list(batch.inputs) and len(some) == 2
    assert some.inputs["img_ids"] is batch.inputs["img_ids"]
    assert some.weight.tolist() == batch.weight[[2, 0]].tolist()
    qwen = [inputs_of("QwenImageTransformer2DModel", 2)]
    (batch,) = read_batches(qwen)
    assert batch.select([1]).inputs["img_shapes"] == [[(1, 4, 4)]]
    assert [len(each["hidden_states"]) for each in probe_batches(qwen * 2)] == [2, 2]
    # Other shapes, and other weights, are another calibration set.
    other = [{**qwen[0], "img_shapes": [[(1, 2, 8)]] * 2}]
    weighted = [{**qwen[0], "weight": torch.ones(2)}]
    assert len({digest_of(each) for each in (qwen, other, weighted)}) == 3
    for weight in (torch.ones(3), torch.zeros(2)):
        with pytest.raises(InputError, match="weight must be a finite number above 0"):
            list(read_batches([{**qwen[0], "weight": weight}]))
    with pytest.raises(InputError, match="holds no input"):
        list(read_batches([{"img_ids": torch.zeros(4, 3)}]))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"of": "flops"}, "only prunable parameters"),
        ({"of": "kv_cache"}, "only prunable parameters"),
        ({"rescale": True}, "without rescale and evaluate_on"),
        ({"keep_hidden": 0.5}, "norms get their scale and shift from the timestep"),
        ({"keep_blocks": 0.5}, "two streams"),
        ({"schedule": "layerwise"}, "one pass only, a block passes on two streams"),
        ({"criterion": "taylor"}, "has no head"),
        ({"evaluate_on": []}, "without rescale and evaluate_on"),
    ],
)
def test_what_does_not_apply_is_refused(choices: dict, message: str):
    name = "SD3Transformer2DModel"
    model = tiny(name)
    before = output(model, name)
    with pytest.raises(InputError, match=message):
        prune(model, batches_of(name, 2), 0.5, **choices)
    assert torch.equal(output(model, name), before)


@pytest.mark.parametrize("choices", [{"reconstruct": "affine"}, {"preset": "flap"}])
@pytest.mark.filterwarnings("ignore:Layers were solved")
def test_layers_that_share_units_keep_their_biases(choices: dict):
    """The forms with a bias are for the others."""
    name = "FluxTransformer2DModel"
    dense = tiny(name)
    model = copy.deepcopy(dense)
    report = prune(model, batches_of(name), keep=0.6, **choices)
    for site in sites(dense):
        same = [
            torch.equal(dense.get_submodule(path).bias, model.get_submodule(path).bias)
            for path, _, _ in site.reads
        ]
        assert all(same) == (site.shared or not report.plan.sites[site.name].removed)


def test_jobs_from_a_bank_and_with_progress():
    name = "SD3Transformer2DModel"
    dense, batches = tiny(name), batches_of(name)
    one, other = copy.deepcopy(dense), copy.deepcopy(dense)
    steps = []
    prune(one, batches, preset="fast", keep=0.6, progress=lambda *step: steps.append(step))
    bank = calibrate(dense, batches)
    assert bank.text is None
    prune(other, bank=bank, preset="fast", keep=0.6)
    assert steps and torch.equal(output(one, name), output(other, name))


@pytest.mark.parametrize("name", JOINT)
def test_a_probe_of_a_site_is_that_site_pruned(name: str):
    """For a while all layers that read its units read the others as zero, and give them back."""
    model = tiny(name, torch.float64)
    before = output(model, name, dtype=torch.float64)
    for site in sites(model):
        plan = half(model, site.name)
        kept = site.features(plan.sites[site.name].kept)
        weight = get_consumer_weight(model, site)[:, kept].clone()
        with pruned_site(model, site, plan, (weight, None)):
            found = output(model, name, dtype=torch.float64)
        expected = output(zeroed(model, plan), name, dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        assert torch.equal(output(model, name, dtype=torch.float64), before)
    assert not torch.equal(found, before) or name.startswith("Qwen")  # which drops its last text


def test_what_is_compared_is_the_prediction_of_each_sample():
    name = "SD3Transformer2DModel"
    model = tiny(name)
    kind, rows = output_of(model, model(**inputs_of(name)))
    assert (kind, rows.shape) == ("sample", (4, 4 * 8 * 8))


def test_layers_that_share_units_gain_no_bias():
    model = tiny("SD3Transformer2DModel")
    plan = Plan("SD3Transformer2DModel", "head", {"0.attn": SitePlan(4, (0, 1), bias=True)})
    with pytest.raises(InputError, match="the consumer of 0.attn has no bias"):
        apply_plan(model, plan)
    site = sites(model)[0]
    assert layer_of(model, site).bias is None
    torch.testing.assert_close(
        get_consumer_weight(model, site).view(32, 4, 2, 8)[:, :, 1].flatten(1),
        model.get_submodule("transformer_blocks.0.attn.to_add_out").weight,
    )


def test_folders_are_refused_where_only_text_is_known(tmp_path: Path):
    name = "DiTTransformer2DModel"
    model = tiny(name)
    pipe, _ = pipeline_of(name, model)
    pipe.save_pretrained(tmp_path / "pipeline")
    plan = half(model)
    apply_plan(model, plan)
    save_pruned(model, tmp_path / "pruned", plan)
    for folder in ("pipeline", "pipeline/transformer", "pruned"):
        with pytest.raises(InputError, match="of diffusers; in Python, liar_ext.prune") as refused:
            load_model(tmp_path / folder)
        assert len(error_lines(refused.value).splitlines()) == 2
    with pytest.raises(InputError, match="no output of it; in Python"):
        verify_pruned(tmp_path / "pruned")
    with pytest.raises(InputError, match="holds a dense model"):
        load_pruned(tmp_path / "pipeline" / "transformer")
