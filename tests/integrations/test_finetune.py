"""Training what was pruned: peft and Trainer, on equal and unequal layers."""

from __future__ import annotations

import copy

import pytest
import torch
from covers import some
from peft import LoraConfig, get_peft_model
from tiny import VOCAB, batches, outputs, tiny
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from liar_ext import prune, save_pruned
from liar_ext.checkpoint import load_model

MODULES = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "value", "output.dense"]}
AUTO = {"llama": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification}


def rows(family, count=8, tokens=12):
    ids = torch.randint(3, VOCAB - 1, (count, tokens), generator=torch.Generator().manual_seed(7))
    labels = [row % 2 for row in range(count)] if family == "bert" else ids
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


@pytest.fixture(scope="module", params=["llama", "bert"])
def family(request):
    return request.param


@pytest.fixture(scope="module", params=["equal", "unequal"])
def once(request, family):
    model = tiny(family)
    equal = request.param == "equal"
    # No config of these two tiny models can tell of fewer heads.
    kinds = ("mlp",) if equal else ("attn", "mlp")
    report = prune(model, batches(model), keep=0.6, uniform_layers=equal, kinds=kinds)
    assert report.plan.sites["0.mlp"].removed
    return model, report, equal


@pytest.fixture
def pruned(once):
    """A pruned model in memory, its report, and whether a stock class builds its layers."""
    return copy.deepcopy(once[0]), *once[1:]


def train(model, folder, family, **settings):
    settings = {"max_steps": 2, "learning_rate": 1e-2, **settings}
    arguments = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **settings
    )
    trainer = Trainer(model, arguments, train_dataset=rows(family))
    trainer.train()
    return trainer


def load(folder, family, equal):
    """Load a folder as somebody without liar_ext would."""
    return AUTO[family].from_pretrained(folder, trust_remote_code=not equal).eval()


@some("saved_by", ["save_pruned", "save_pretrained"], "save_pruned")
def test_lora_is_trained_merged_saved_and_loaded(pruned, family, saved_by, tmp_path):
    model, report, equal = pruned
    before = outputs(model)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=MODULES[family]))
    train(tuned, tmp_path / "run", family)
    trained = outputs(tuned.eval())
    assert not torch.allclose(trained, before, atol=1e-4)
    merged = tuned.merge_and_unload().eval()
    torch.testing.assert_close(outputs(merged), trained, rtol=1e-4, atol=1e-4)
    folder = tmp_path / "merged"
    if saved_by == "save_pruned":
        save_pruned(merged, folder, report.plan, report=report)
    else:
        merged.save_pretrained(folder)
    torch.testing.assert_close(outputs(load(folder, family, equal)), outputs(merged))


def test_checkpoints_of_trainer_resume_and_load(pruned, family, tmp_path):
    model, report, equal = pruned
    save_pruned(model, tmp_path / "pruned", report.plan)
    model, _ = load_model(str(tmp_path / "pruned"))
    trainer = train(model, tmp_path / "run", family, max_steps=4, save_steps=2)
    last = outputs(trainer.model.eval())
    again = load(tmp_path / "run" / "checkpoint-4", family, equal)
    torch.testing.assert_close(outputs(again), last)

    other, _ = load_model(str(tmp_path / "run" / "checkpoint-2"))
    assert not torch.allclose(outputs(other), last, atol=1e-4)
    arguments = copy.copy(trainer.args)
    resumed = Trainer(other, arguments, train_dataset=rows(family))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    torch.testing.assert_close(outputs(resumed.model.eval()), last, rtol=1e-4, atol=1e-4)


def test_adapters_alone_go_back_onto_the_pruned_model(pruned, family, tmp_path):
    model, report, _ = pruned
    save_pruned(model, tmp_path / "pruned", report.plan)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=MODULES[family]))
    train(tuned, tmp_path / "run", family)
    tuned.save_pretrained(tmp_path / "adapters")
    from peft import PeftModel

    again, _ = load_model(str(tmp_path / "pruned"))
    again = PeftModel.from_pretrained(again, tmp_path / "adapters").eval()
    torch.testing.assert_close(outputs(again), outputs(tuned.eval()))


def test_pruned_fine_tuned_and_pruned_again(pruned, family, tmp_path):
    model, report, equal = pruned
    train(model, tmp_path / "run", family)
    model.eval()
    second = prune(model, batches(model), keep=0.7, uniform_layers=equal, kinds=("mlp",))
    assert second.params["after"] < report.params["after"]
    model.save_pretrained(tmp_path / "twice")
    torch.testing.assert_close(outputs(load(tmp_path / "twice", family, equal)), outputs(model))
