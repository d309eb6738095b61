"""Task files of lm-eval with questions of several choices, for tests and for the matrix."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def write_choices(folder: Path, name: str, items: Iterable[dict[str, Any]]) -> None:
    """Write a task and its items, which have ``question``, ``choices`` and ``answer``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    text = TASK.format(name=name, file=file)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
