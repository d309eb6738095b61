"""What ``push_to_hub`` sends is a folder that loads again, here and where liar_ext is not.

The hub is a folder, the cache that huggingface_hub fills when it downloads: what would be sent is
written there, and every process that reads it is offline.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from folders import tokenizer
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny import batches, outputs, tiny, tiny_inputs

from liar_ext import load_pruned, prune, save_pruned

COMMIT = "0123456789" * 4
FAMILIES = {"llama": "AutoModelForCausalLM", "bert": "AutoModelForSequenceClassification"}
# Loads what was sent, saves it, and loads that.
ELSEWHERE = """
import sys
from pathlib import Path
if sys.argv[1] == "without":
    sys.modules["liar_ext"] = None
else:
    import liar_ext
import torch, transformers
code = {"trust_remote_code": True} if sys.argv[1] == "without" else {}
for path in sorted(Path(sys.argv[2]).glob("*.pt")):
    inputs, expected, auto = torch.load(path, weights_only=False)
    loader, name = getattr(transformers, auto), f"me/{path.stem}"

    def check(model):
        with torch.no_grad():
            assert torch.equal(model.eval()(**inputs).logits, expected), path
        return model

    model = check(loader.from_pretrained(name, **code))
    words = transformers.AutoTokenizer.from_pretrained(name)
    assert words("a b").input_ids == [2, 3]
    folder = Path(sys.argv[2], sys.argv[1], path.stem)
    model.save_pretrained(folder)
    check(loader.from_pretrained(folder, **code))
    print(path.stem)
"""


class Hub:
    """The two calls of the API that sending makes, into the cache of a hub."""

    def __init__(self, cache: Path):
        self.cache = cache
        self.sent: dict[str, set[str]] = {}

    def create_repo(self, repo_id: str, **_):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations, **_):
        repository = self.cache / f"models--{repo_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(COMMIT)
        for each in operations:
            path = repository / "snapshots" / COMMIT / each.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            with each.as_file() as file:
                path.write_bytes(file.read())
            self.sent.setdefault(repo_id, set()).add(each.path_in_repo)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "home" / "hub")

    def call(name):
        return lambda _, *given, **named: getattr(hub, name)(*given, **named)

    for name in ("create_repo", "create_commit"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, call(name))

    def no_card(*_, **__):
        raise LocalEntryNotFoundError("there is no model card")

    monkeypatch.setattr(huggingface_hub.ModelCard, "load", no_card)
    return hub


def elsewhere(tmp_path: Path, way: str) -> subprocess.CompletedProcess:
    """Run a process that has the hub's cache and no network."""
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    home["HF_MODULES_CACHE"] = str(tmp_path / "modules" / way)
    return subprocess.run(
        [sys.executable, "-c", ELSEWHERE, way, str(tmp_path)],
        capture_output=True, text=True, env=os.environ | home,
    )  # fmt: skip


@pytest.mark.parametrize("layers", ["equal", "unequal"])
@pytest.mark.parametrize("source", ["in memory", "loaded"])
def test_what_push_to_hub_sends_loads_again(source, layers, hub, tmp_path: Path) -> None:
    for family, auto in FAMILIES.items():
        model = tiny(family)
        equal = {"uniform_layers": True, "kinds": ("mlp",)} if layers == "equal" else {}
        report = prune(model, batches(model), 0.7, **equal)
        inputs = tiny_inputs(model)
        torch.save((dict(inputs), outputs(model, inputs), auto), tmp_path / f"{family}.pt")
        if source == "loaded":
            save_pruned(model, tmp_path / "saved" / family, report.plan)
            model = load_pruned(tmp_path / "saved" / family)
        model.push_to_hub(f"me/{family}")
        tokenizer().push_to_hub(f"me/{family}")
        sent = hub.sent[f"me/{family}"]
        assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= sent
        assert ("liar_loader.py" in sent) == (layers == "unequal")
    for way in ("without", "with"):
        done = elsewhere(tmp_path, way)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.split() == sorted(FAMILIES)
        for family in FAMILIES:
            fields = json.loads((tmp_path / way / family / "config.json").read_text())
            assert "me/" not in json.dumps(fields.get("auto_map", {}))  # it needs no hub any more
