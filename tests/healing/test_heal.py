"""Healing: held-out loss falls, nothing gets worse, and an interrupted run goes on bit for bit."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from covers import some
from folders import equal_plan, make_plan
from stopping import stop_at
from tiny import VOCAB, tiny

from liar_ext import heal
from liar_ext.calibration.batches import read_batch, read_batches
from liar_ext.healing import heal as run
from liar_ext.healing.training import (
    KLDivergence,
    Teacher,
    Training,
    activation_bytes,
    choose,
    losses,
    mean_loss,
    rates,
)
from liar_ext.models.running import computes_bfloat16
from liar_ext.models.slicing import apply_plan
from liar_ext.report.sections import healing_lines
from liar_ext.system.errors import InputError

STEPS = {"budget": {"steps": 12}, "lr": 1e-2, "bfloat16": False}
NOTHING = {name: torch.zeros(2, 4, dtype=torch.long) for name in ("input_ids", "attention_mask")}


def text(count=6, rows=4, tokens=12, seed=0, padded=False):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(3, VOCAB - 1, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            for row in range(rows):
                mask[row, tokens - 2 * row :] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def pair(name="llama", plan_of=make_plan, **fields):
    """Return a pruned tiny model and its dense one."""
    dense = tiny(name, **fields)
    student = copy.deepcopy(dense)
    apply_plan(student, plan_of(student))
    return student, dense


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("train", ["all", "no-embeddings", "norms", "lora"])
def test_the_held_out_loss_falls(train):
    student, dense = pair()
    before, own = bits(student), bits(dense)
    names = [name for name, _ in student.named_parameters()]
    held = text(2, seed=9)
    found = heal(student, dense, text(), held_out=held, train=train, **STEPS)
    assert found["improved"] and found["after"] < 0.97 * found["before"]
    assert found["after"] == min(loss for _, loss in found["curve"]) or train == "lora"
    assert [tokens for tokens, _ in found["curve"]] == [0, 144, 288, 432, 576]
    assert (found["steps"], found["tokens"]) == (12, 12 * 48)
    assert mean_loss(student, Teacher(dense), [*read_batches(held)]) == pytest.approx(
        found["after"]
    )
    assert same(dense, own)
    # An ordinary model again, trained where it was to be.
    assert [name for name, _ in student.named_parameters()] == names
    assert all(each.requires_grad for each in student.parameters())
    changed = {n for n, value in student.state_dict().items() if not torch.equal(value, before[n])}
    assert ("model.embed_tokens.weight" in changed) == (train == "all")
    assert ("model.layers.0.input_layernorm.weight" in changed) == (train != "lora")
    assert ("model.layers.0.mlp.up_proj.weight" in changed) == (train != "norms")


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_the_divergence_has_the_gradient_of_its_formula(rows, monkeypatch):
    monkeypatch.setattr("liar_ext.healing.training.AT_ONCE", 4 * 7)
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(2, rows, 7, generator=generator)
    value, same = (logits[0].clone().requires_grad_() for _ in range(2))
    weight = torch.rand(rows, generator=generator)
    found = KLDivergence.apply(value, logits[1])
    p, log_q = logits[1].double().softmax(-1), same.double().log_softmax(-1)
    wanted = (p * (p.log() - log_q)).sum(-1)
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-6)
    for each in (found, wanted):
        (weight * each).sum().backward()
    assert torch.allclose(value.grad, same.grad, rtol=1e-5, atol=1e-6)
    assert not KLDivergence.apply(logits[0], logits[1]).requires_grad


@pytest.mark.parametrize("train", ["no-embeddings", "lora"])
def test_a_model_that_is_frozen_as_a_whole_is_trained(train):
    (student, dense), (frozen, _) = pair(), pair()
    frozen.requires_grad_(False)
    for model in (student, frozen):
        heal(model, dense, text(), held_out=text(2, seed=9), train=train, **STEPS)
    assert same(frozen, bits(student)) and not same(frozen, bits(pair()[0]))
    assert not any(each.requires_grad for each in frozen.parameters())


@pytest.mark.parametrize("name", ["llama", "bert", "mpnet"])
def test_the_dense_model_runs_once_for_each_batch(name, monkeypatch):
    student, dense = pair(name)
    runs = []
    dense.register_forward_hook(lambda *_: runs.append(0))
    given, expected = copy.deepcopy(student), copy.deepcopy(student)
    heal(given, dense, text(), held_out=text(2, seed=9), **STEPS)
    assert len(runs) == 6 + 2  # in twelve steps and five measurements
    monkeypatch.setattr("liar_ext.healing.training.OF_OUTPUTS", 0.0)
    heal(expected, dense, text(), held_out=text(2, seed=9), **STEPS)
    assert len(runs) == 8 + 12 + 5 * 2
    assert same(given, bits(expected))


@pytest.mark.parametrize("train", ["no-embeddings", "lora"])
def test_a_run_that_makes_it_worse_is_undone(train, monkeypatch):
    student, dense = pair()
    before, losses = bits(student), iter(range(1, 9))
    monkeypatch.setattr(run.Healing, "loss", lambda self, student: float(next(losses)))
    found = heal(student, dense, text(), held_out=text(2, seed=9), train=train, **STEPS)
    assert not found["improved"] and found["after"] == found["before"]
    assert same(student, before)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_by_default_a_matrix_of_a_decoder_changes_in_proportion_to_its_size(name, monkeypatch):
    """The first step of AdamW is as long as the rate, whatever the gradient is."""
    student, dense = pair(name)
    with torch.no_grad():
        for each in student.parameters():
            each *= 3.0
    monkeypatch.setattr(run, "schedule", lambda done: 1.0)
    monkeypatch.setattr(run.Healing, "measure", lambda self: self.so_far.curve.append([0, 1.0]))
    before, after = bits(student), {}
    monkeypatch.setattr(run.Healing, "finish", lambda self, _: after.update(bits(self.student)))
    how = {"budget": {"steps": 1}, "bfloat16": False, "train": "all"}
    heal(student, dense, text(), held_out=text(1), **how)
    for key, value in before.items():
        if key.endswith("key.bias"):  # which softmax takes no notice of
            continue
        root = value.double().square().mean().sqrt()
        expected = 1e-3 * root if name == "llama" and value.dim() > 1 else 2e-4
        moved = (after[key].double() - value.double()).abs().max()
        assert moved == pytest.approx(float(expected), rel=1e-2), key


@pytest.mark.parametrize(("given", "rate"), [({"train": "lora"}, 2e-4), ({"lr": 0.5}, 0.5)])
def test_adapters_and_a_rate_that_is_given_know_no_sizes(given, rate):
    """Half of the adapters are zeros at first, and would stay so."""
    training = Training({"steps": 1}, **given)
    student, trained = choose(pair()[0], training.train, 0)
    assert {*rates(student, trained, training).values()} == {rate}


def test_gradients_that_are_not_finite_end_it_and_are_told_of(monkeypatch):
    student, dense = pair()
    before = bits(student)
    monkeypatch.setattr(
        run, "losses", lambda *given: losses(*given) * (math.inf if torch.is_grad_enabled() else 1)
    )
    found = heal(student, dense, text(), held_out=text(2, seed=9), **STEPS)
    assert found["diverged"] and not found["improved"] and found["steps"] == 0
    assert same(student, before) and "give a lower --lr" in healing_lines(found)[0]
    monkeypatch.undo()
    assert not heal(student, dense, text(), held_out=text(2, seed=9), **STEPS)["diverged"]


def test_it_goes_back_where_the_held_out_loss_has_clearly_risen(monkeypatch):
    student, dense = pair()
    losses, kept, measure = iter([1.0, 2.0, 0.5, 0.52, 0.6]), [], run.Healing.measure

    def measured(self):
        before = bits(self.student)
        measure(self)
        moving = any(state["exp_avg"].any() for state in self.optimizer.state.values())
        kept.append((before, bits(self.student), self.lr(), moving))

    monkeypatch.setattr(run.Healing, "loss", lambda self, student: next(losses))
    monkeypatch.setattr(run.Healing, "measure", measured)
    found = heal(student, dense, text(), held_out=text(1), **STEPS)
    rates = [STEPS["lr"] / 3**times for times in (0, 1, 1, 1, 2)]
    assert [lr for _, _, lr, _ in kept] == pytest.approx(rates)
    assert found["last_lr"] == pytest.approx(rates[-1]) and found["lr"] == STEPS["lr"]
    before, after, _, moving = kept[3]  # a small rise passes
    assert moving and all(torch.equal(before[name], after[name]) for name in after)
    for at, best in ((1, 0), (4, 2)):
        before, after, _, moving = kept[at]
        assert all(torch.equal(after[name], kept[best][1][name]) for name in after)
        assert not all(torch.equal(before[name], after[name]) for name in after) and not moving
    assert same(student, kept[2][1]) and found["after"] == 0.5


def test_padding_never_counts():
    student, dense = pair()
    batch = read_batch(text(1, padded=True)[0])
    found = losses(student, Teacher(dense)(batch))
    slow = []
    for ids, mask in zip(batch.inputs["input_ids"], batch.mask, strict=True):
        alone = {"input_ids": ids[mask][None]}
        p, q = (model(**alone).logits[0].double().log_softmax(-1) for model in (dense, student))
        slow += (p.exp() * (p - q)).sum(-1).tolist()
    torch.testing.assert_close(found, torch.tensor(slow), rtol=1e-4, atol=1e-6)
    other = {**batch.inputs, "input_ids": batch.inputs["input_ids"].masked_fill(~batch.mask, 5)}
    torch.testing.assert_close(losses(student, Teacher(dense)(read_batch(other))), found)
    told = heal(student, dense, text(padded=True), held_out=text(2), **STEPS)
    assert told["tokens"] == 12 * int(batch.mask.sum())


@pytest.mark.parametrize("padded", [False, True])
def test_encoders_are_compared_by_embeddings_and_hidden_states(padded):
    student, dense = pair("mpnet")
    batch = read_batch(text(1, padded=padded)[0])
    slow = []
    for row, ids in enumerate(batch.inputs["input_ids"]):
        real = slice(None) if batch.mask is None else batch.mask[row]
        alone = {"input_ids": ids[real][None]}
        h, t = (model(**alone).last_hidden_state[0].double() for model in (student, dense))
        cosine = torch.cosine_similarity(h.mean(0), t.mean(0), dim=0)
        slow.append((1 - cosine + (h - t).square().mean()).item())
    found = losses(student, Teacher(dense)(batch))
    torch.testing.assert_close(found, torch.tensor(slow), rtol=1e-4, atol=1e-5)
    held = text(2, seed=9, padded=padded)
    told = heal(student, dense, text(padded=padded), held_out=held, **STEPS)
    assert told["after"] < 0.9 * told["before"]


def test_classifiers_are_compared_by_their_predictions():
    student, dense = pair("bert")
    batch = read_batch(text(1, tokens=9)[0])
    p, q = (model(**batch.inputs).logits.log_softmax(-1) for model in (dense, student))
    torch.testing.assert_close(losses(student, Teacher(dense)(batch)), (p.exp() * (p - q)).sum(-1))
    assert heal(student, dense, text(), held_out=text(2, seed=9), **STEPS)["improved"]


def test_a_single_logit_is_compared_by_its_value():
    student, dense = pair("bert", num_labels=1)
    batch = read_batch(text(1)[0])
    p, q = (model(**batch.inputs).logits.flatten() for model in (dense, student))
    torch.testing.assert_close(losses(student, Teacher(dense)(batch)), (p - q).square())


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("train", "lr"), [("no-embeddings", 1e-2), ("lora", 1e-2), ("no-embeddings", 10.0)]
)
@some("after", [1, 5, 11], 5)
def test_a_resumed_run_has_the_bits_of_a_whole_one(after, train, lr, tmp_path, monkeypatch):
    student, dense = pair()
    whole, settings = copy.deepcopy(student), {**STEPS, "train": train, "accumulate": 2, "lr": lr}
    texts = {"held_out": text(2, seed=9)}
    expected = heal(whole, dense, text(), **texts, **settings)
    assert (expected["last_lr"] < lr) == (lr > 1)
    monkeypatch.setattr(run.Checkpoint, "due", lambda *_: True)
    step, before = run.Healing.step, bits(student)

    def killed(self):
        if self.so_far.steps == after:
            raise Killed
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(run.Healing, "step", killed)
        with pytest.raises(Killed):
            heal(student, dense, text(), **texts, checkpoint=tmp_path / "c", **settings)
    # What the stopped run leaves is its best state, and resuming begins with the model itself.
    student.load_state_dict(before)
    found = heal(student, dense, text(), **texts, checkpoint=tmp_path / "c", **settings)
    assert same(student, bits(whole))
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}


def test_the_memory_for_training_is_that_of_the_weights_dtype(monkeypatch):
    student, dense = (model.double() for model in pair())
    free = 20 * sum(each.numel() for each in student.parameters())  # float64 takes 24
    monkeypatch.setattr("liar_ext.healing.training.available_memory", lambda: free)
    with pytest.raises(InputError, match="training takes"):
        heal(student, dense, text(), held_out=text(1), train="all", **STEPS)


def test_a_resumed_run_stores_activations_as_it_began(tmp_path, monkeypatch):
    student, dense = pair()
    settings = {"held_out": text(1), "checkpoint": tmp_path / "c", **STEPS}
    before = bits(student)
    tight = 12 * sum(each.numel() for each in student.parameters())  # gradients and moments alone
    for free in (tight, 1 << 40):
        student.load_state_dict(before)
        monkeypatch.setattr("liar_ext.healing.training.available_memory", lambda free=free: free)
        assert heal(student, dense, text(), **settings)["gradient_checkpointing"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    student, dense = pair()
    settings = {"held_out": text(2, seed=9), "checkpoint": tmp_path / "c", **STEPS}
    before = bits(student)
    heal(student, dense, text(), **settings)
    student.load_state_dict(before)
    with pytest.raises(InputError, match="lr 0.01, got 0.02"):
        heal(student, dense, text(), **{**settings, "lr": 2e-2})
    for model in (student, dense):
        known, model.config.rms_norm_eps = model.config.rms_norm_eps, 0.5
        with pytest.raises(InputError, match="is of a job with configs"):
            heal(student, dense, text(), **settings)
        model.config.rms_norm_eps = known
    student.model.layers[0].requires_grad_(False)
    with pytest.raises(InputError, match="is of a job with trained"):
        heal(student, dense, text(), **settings)


@pytest.mark.parametrize("saved", [False, True])
def test_an_interrupt_keeps_the_best_state(saved, tmp_path, monkeypatch):
    student, dense = pair()
    stop_at(monkeypatch, run.Healing, "step", 9)
    settings = {"held_out": text(2, seed=9), **STEPS}
    if saved:
        with pytest.raises(KeyboardInterrupt):
            heal(student, dense, text(), checkpoint=tmp_path / "c", **settings)
    else:
        found = heal(student, dense, text(), **settings)
        assert found["interrupted"] and found["improved"] and len(found["curve"]) == 3
    after = mean_loss(student, Teacher(dense), [*read_batches(text(2, seed=9))])
    assert after < mean_loss(pair()[0], Teacher(dense), [*read_batches(text(2, seed=9))])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_float64_and_gradients_are_left_as_they_were(mode, monkeypatch):
    """Nothing improves here, and a gradient that was there stays."""
    losses = iter(range(1, 99))
    monkeypatch.setattr(run.Healing, "loss", lambda self, student: float(next(losses)))
    student, dense = pair(dtype=torch.float64)
    weight = student.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    before = bits(student)
    with mode():
        found = heal(student, dense, text(), held_out=text(2, seed=9), **STEPS)
    assert not found["improved"] and same(student, before)
    assert [each.grad is None for each in student.parameters()].count(False) == 1
    assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize("train", ["no-embeddings", "lora"])
def test_half_precision_is_measured_as_it_is_rounded(train):
    student, dense = pair(dtype=torch.bfloat16)
    buffers = {name: value.dtype for name, value in student.named_buffers()}
    found = heal(student, dense, text(), held_out=text(2, seed=9), train=train, **STEPS)
    assert {each.dtype for each in student.parameters()} == {torch.bfloat16}
    assert {name: value.dtype for name, value in student.named_buffers()} == buffers
    assert found["improved"]
    held = [*read_batches(text(2, seed=9))]
    for each in student.parameters():
        each.data = each.data.float()
    assert mean_loss(student, Teacher(dense), held) == pytest.approx(found["after"], rel=1e-5)


def test_checkpointed_activations_change_no_result():
    results = []
    for recompute in (False, True):
        student, dense = pair()
        settings = {**STEPS, "gradient_checkpointing": recompute}
        hooked = student.model.layers[1].forward = student.model.layers[1].forward
        found = heal(student, dense, text(), held_out=text(2, seed=9), **settings)
        assert found["gradient_checkpointing"] is recompute
        assert "forward" not in vars(student.model.layers[0])
        assert vars(student.model.layers[1])["forward"] is hooked
        results.append(found["after"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_activations_are_stored_if_they_fit(monkeypatch):
    student, dense = pair()
    batch = read_batch(text(1)[0])
    one = activation_bytes(student, batch.select([0]))
    assert activation_bytes(student, batch) == pytest.approx(4 * one, rel=0.2)
    for free, expected in ((4 * one, True), (1 << 40, False), (None, False)):
        monkeypatch.setattr("liar_ext.healing.training.available_memory", lambda free=free: free)
        student = pair()[0]
        settings = {**STEPS, "budget": {"steps": 1}}
        found = heal(student, dense, text(), held_out=text(1), **settings)
        assert found["gradient_checkpointing"] is expected


def test_budgets_end_a_run():
    student, dense = pair()
    settings = {"held_out": text(2, seed=9), "bfloat16": False}
    found = heal(student, dense, text(), budget={"tokens": 100}, **settings)
    assert (found["steps"], found["tokens"], len(found["curve"])) == (3, 144, 4)
    found = heal(student, dense, text(), budget={"minutes": 0.01}, **settings)
    assert found["seconds"] >= 0.6 and found["steps"] > 0 and len(found["curve"]) <= 5


def test_bfloat16_is_used_if_the_hardware_has_it():
    student, dense = pair()
    settings = {**STEPS, "bfloat16": None, "budget": {"steps": 1}}
    found = heal(student, dense, text(), held_out=text(1), **settings)
    known = computes_bfloat16(torch.device("cpu"))
    assert found["precision"] == ("bfloat16" if known else "float32")
    assert not computes_bfloat16(torch.device("meta"))


def test_the_learning_rate_rises_and_falls():
    rates = [run.schedule(at / 100) for at in range(101)]
    assert rates[0] == 0 and rates[30] == max(rates) == 1 and rates[100] < 1e-9
    assert rates[:31] == sorted(rates[:31]) and rates[30:] == sorted(rates[30:], reverse=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": {}}, "budget must be one of tokens, minutes, steps"),
        ({"budget": {"tokens": 1, "steps": 1}}, "budget must be one of"),
        ({"budget": {"tokens": 0}}, "above 0"),
        ({"budget": {"epochs": 1}}, "must be one of"),
        ({"train": "heads"}, "train must be one of"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": "1e-3"}, "lr must be above 0, got '1e-3'"),
        ({"budget": 100}, "above 0, got 100"),
        ({"budget": {"tokens": "5"}}, "budget must be one of"),
        ({"accumulate": 1.5}, "accumulate must be at least 1, got 1.5"),
        ({"seed": "a"}, "seed must be at least 0, got 'a'"),
        ({"epochs": 2}, "there is no keyword epochs"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"held_out": []}, "held-out text"),
        ({"held_out": [NOTHING]}, "heal: batch 0 holds only padding"),
    ],
)
def test_what_cant_be_is_refused(settings, said):
    student, dense = pair()
    with pytest.raises(InputError, match=said):
        heal(student, dense, text(), **{"held_out": text(1), **STEPS, **settings})


def test_models_that_do_not_compare_are_refused():
    student, dense = pair()
    other = tiny("llama", vocab_size=VOCAB + 3)
    before = bits(student)
    with pytest.raises(InputError, match="one shape"):
        heal(student, other, text(), held_out=text(1), **STEPS)
    assert same(student, before)
    with torch.no_grad():
        dense.model.norm.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite"):
        heal(student, dense, text(), held_out=text(1), **STEPS)


def test_offloaded_weights_are_refused():
    student, dense = pair()
    with pytest.raises(InputError, match="some are offloaded"):
        heal(student, dense.to("meta"), text(), held_out=text(1), **STEPS)


def test_lora_without_peft_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    student, dense = pair(dtype=torch.bfloat16)
    with pytest.raises(InputError, match="pip install peft"):
        heal(student, dense, text(), held_out=text(1), train="lora", **STEPS)
    assert student.dtype == torch.bfloat16


def test_a_model_without_norms_to_train_is_refused():
    student, dense = pair()
    student.requires_grad_(False).lm_head.requires_grad_(True)
    with pytest.raises(InputError, match="no weights to train"):
        heal(student, dense, text(), held_out=text(1), train="norms", **STEPS)


def test_a_teacher_is_a_loaded_model_of_its_own():
    student, _ = pair()
    for teacher, got in ((student, "the pruned model itself"), ("folder", "str")):
        with pytest.raises(InputError, match=f"loaded on its own, got {got}"):
            heal(student, teacher, text(), held_out=text(1), **STEPS)


def test_equal_layers_work_as_unequal_ones():
    student, dense = pair(plan_of=equal_plan)
    assert heal(student, dense, text(), held_out=text(2, seed=9), **STEPS)["improved"]
