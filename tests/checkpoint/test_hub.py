"""What ``push_to_hub`` sends is a folder that loads again, here and where liar_ext is not.

The hub is a folder, the cache that huggingface_hub fills when it downloads: what would be sent is
written there, and every process that reads it is offline.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import fresh_workers
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
hub = {"cache_dir": Path(sys.argv[2], "hub")}
for path in sorted(Path(sys.argv[2]).glob("*.pt")):
    inputs, expected, auto = torch.load(path, weights_only=False)
    loader, name = getattr(transformers, auto), f"me/{path.stem}"

    def check(model):
        with torch.no_grad():
            assert torch.equal(model.eval()(**inputs).logits, expected), path
        return model

    model = check(loader.from_pretrained(name, **code, **hub))
    words = transformers.AutoTokenizer.from_pretrained(name, **hub)
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


def send(name: str, layers: str, hub: Hub, home: Path) -> None:
    """Prune a tiny model, and send it as it is in memory and as it is loaded."""
    model = tiny(name)
    equal = {"uniform_layers": True, "kinds": ("mlp",)} if layers == "equal" else {}
    report = prune(model, batches(model), 0.7, **equal)
    inputs, words, folder = tiny_inputs(model), tokenizer(), home / f"{name}-{layers}"
    expected = (dict(inputs), outputs(model, inputs), FAMILIES[name])
    save_pruned(model, folder, report.plan, report=report, tokenizer=words)
    for source, some in (("memory", model), ("loaded", load_pruned(folder))):
        repository = f"{name}-{layers}-{source}"
        torch.save(expected, home / f"{repository}.pt")
        some.push_to_hub(f"me/{repository}")
        words.push_to_hub(f"me/{repository}")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    hub = Hub(home / "hub")

    def call(name):
        return lambda _, *given, **named: getattr(hub, name)(*given, **named)

    def no_card(*_, **__):
        raise LocalEntryNotFoundError("there is no model card")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("create_repo", "create_commit"):
            patch.setattr(huggingface_hub.HfApi, name, call(name))
        patch.setattr(huggingface_hub.ModelCard, "load", no_card)
        torch.manual_seed(0)
        for name in FAMILIES:
            for layers in ("equal", "unequal"):
                send(name, layers, hub, home)
    return hub


def test_the_loader_goes_along_where_it_is_needed(hub) -> None:
    assert len(hub.sent) == 8
    for name, files in hub.sent.items():
        assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= files
        assert ("liar_loader.py" in files) == ("unequal" in name)


@pytest.mark.parametrize("way", ["without", "with"])
def test_what_was_sent_loads_again(way, hub) -> None:
    """In a process that has the hub's cache, no network, and liar_ext or not."""
    home = hub.cache.parent
    done = fresh_workers.run_script(ELSEWHERE, way, home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) == 8
    for folder in (home / way).iterdir():
        fields = json.loads((folder / "config.json").read_text())
        assert ("auto_map" in fields) == ("unequal" in folder.name)
        assert "me/" not in json.dumps(fields.get("auto_map", {}))  # it needs no hub any more
