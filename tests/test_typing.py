"""mypy --strict passes on the README's lines and on calls of the public names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
)
CALLS = """
from pathlib import Path

import liar_ext
from liar_ext import Recipe


def tell(stage: str, done: int, total: int | None, seconds_left: float | None) -> None:
    print(stage, done, total, seconds_left)


model, tokenizer = liar_ext.load_model("folder")
texts = [liar_ext.read_documents(Path("text.jsonl"))]
batches = liar_ext.calibration_sequences(texts, tokenizer, samples=16).batches()
report = liar_ext.prune(model, batches, keep=0.8, preset="fast", sites="mlp", progress=tell)
print(report.summary(), report.plan.sites if report.plan else {}, liar_ext.__version__)
liar_ext.save_pruned(model, "pruned", report=report, tokenizer=tokenizer)
found = liar_ext.compress("model", text="text.jsonl", keep=0.5, out=Path("small"), samples=16)
compared = liar_ext.compare_methods("model", "text.jsonl", eval="held_out.txt", seeds=[0])
print(compared["dense"], found.to_json(), liar_ext.Report.load("small").params)
for point in liar_ext.sweep(model, batches, Recipe(), keep=(0.9, 0.8)):
    print(point.to_dict())
liar_ext.calibrate(model, batches).save("bank")
liar_ext.prune(model, bank=liar_ext.MomentBank.load("bank"), keep=liar_ext.Budget(0.8))
print(liar_ext.perplexity(model, batches), Recipe.preset("fast").to_yaml())
print(liar_ext.load_pruned("pruned"), liar_ext.verify_pruned("pruned"))
"""
WRONG = (
    "import liar_ext\nliar_ext.compress('model', text='a.txt', out='b', keep='half', sampels=3)\n"
)
# Which take minutes to read, and say nothing of this package.
OTHERS = "[mypy-torch.*,transformers.*,numpy.*,tqdm.*,jinja2.*]\nfollow_imports = skip\n"


def errors(code: str, folder: Path) -> list[str]:
    """Return what mypy says of a script, without its place."""
    (folder / "script.py").write_text(code, encoding="utf-8")
    (folder / "mypy.ini").write_text(
        f"[mypy]\nmypy_path = {ROOT}\nfollow_imports = silent\n{OTHERS}", encoding="utf-8"
    )
    words = [sys.executable, "-m", "mypy", "--strict", "script.py"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return [line for line in done.stdout.splitlines() if ": error: " in line]


def test_there_is_a_block():
    assert len(README) == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("code", [*README, CALLS], ids=["readme", "calls"])
def test_calls_are_typed(code, tmp_path):
    assert errors(code, tmp_path) == []


@pytest.mark.exhaustive
def test_a_wrong_call_is_seen(tmp_path):
    found = "\n".join(errors(WRONG, tmp_path))
    assert 'Argument "keep"' in found and '"sampels"' in found
