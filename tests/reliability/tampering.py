"""Ways to damage a saved folder, or to turn it against whoever loads it; drawn by seed."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

EVIL = "open({path!r}, 'w').write('code was run')\nclass PrunedModel: pass\n"
NASTY = [
    *(None, True, 0, -1, 1, 3, 10**9, 10**18, -(10**30), 1.5, 1e308, float("nan"), float("inf")),
    *("", "4", "../..", "/etc/passwd", "\ud800", "a" * 10_000, [], [[]], {}, [1, 2], {"a": None}),
]
Tamper = Callable[[Path, random.Random, Path], str]


class Pickled:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def change_config(folder: Path, change: Callable[[dict], object], name: str = "config.json"):
    fields = json.loads((folder / name).read_text())
    change(fields)
    (folder / name).write_text(json.dumps(fields))


def flip_bytes(folder: Path, random: random.Random, pwned: Path) -> str:
    path = _file(folder, random)
    data = bytearray(path.read_bytes())
    for _ in range(random.choice([1, 1, 4, 64])):
        # Half of them at the front, where headers are.
        end = random.choice([min(64, len(data)), len(data)])
        data[random.randrange(end)] = random.randrange(256)
    path.write_bytes(data)
    return path.name


def cut_file(folder: Path, random: random.Random, pwned: Path) -> str:
    path = _file(folder, random)
    size = random.choice([0, 1, 8, random.randrange(path.stat().st_size)])
    os.truncate(path, size)
    return f"{path.name} to {size} bytes"


def delete_file(folder: Path, random: random.Random, pwned: Path) -> str:
    path = _file(folder, random)
    path.unlink()
    return path.name


def put_nasty_value(folder: Path, random: random.Random, pwned: Path) -> str:
    """Replace one field of a JSON file, at any depth."""
    path = _file(folder, random, "config.json", "config.json", "liar/plan.json", "*.json")
    fields = json.loads(path.read_text())
    part, trail = fields, []
    while True:
        keys = list(part if isinstance(part, dict) else range(len(part)))
        key = random.choice(keys) if keys else None
        trail.append(str(key))
        inner = part[key] if keys else None
        if not isinstance(inner, dict | list) or not inner or random.random() < 0.3:
            break
        part = inner
    value = random.choice(NASTY)
    if key is not None:
        part[key] = value
    path.write_text(json.dumps(fields))
    return f"{path.name} {'.'.join(trail)} = {str(value)[:20]!r}"


def claim_sizes(folder: Path, random: random.Random, pwned: Path) -> str:
    names = "hidden_size intermediate_size vocab_size num_hidden_layers num_attention_heads"
    name = random.choice(f"{names} num_key_value_heads head_dim max_position_embeddings".split())
    value = random.choice([0, -3, 1, 2, 5, 64, 10**4, 10**6, 10**8, 10**12, "32", 2.5, [4]])
    change_config(folder, lambda fields: fields.update({name: value}))
    return f"{name} = {value!r}"


def deepen_json(folder: Path, random: random.Random, pwned: Path) -> str:
    path = _file(folder, random, "*.json")
    depth = random.choice([900, 5_000, 200_000])
    inner = "[" * depth + "]" * depth
    whole = random.random() < 0.5
    path.write_text(inner if whole else f'{{"version": 2, "sites": {inner}}}')
    return f"{path.name}, {depth} deep"


def link_elsewhere(folder: Path, random: random.Random, pwned: Path) -> str:
    path = _file(folder, random)
    target = random.choice(["/dev/zero", "/dev/null", "/etc/passwd", "nowhere", path.name, "."])
    path.unlink()
    path.symlink_to(target)
    return f"{path.name} -> {target}"


def make_pipe(folder: Path, random: random.Random, pwned: Path) -> str:
    path = _file(folder, random)
    path.unlink()
    if random.random() < 0.5:
        os.mkfifo(path)
    else:
        path.mkdir()
    return path.name


def lie_in_header(folder: Path, random: random.Random, pwned: Path) -> str:
    """Weights whose header claims what they don't hold."""
    path = folder / random.choice(["model.safetensors", "liar/fingerprint.safetensors"])
    header = {
        "a": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64 - 1]},
        "b": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]},
        "c": {"dtype": "X9", "shape": ["many"], "data_offsets": [5, 0]},
    }
    which = random.choice([*header, "length", "empty"])
    text = json.dumps({which: header.get(which, {})} if which != "empty" else {}).encode()
    length = random.choice([2**63, 2**40, 10**9]) if which == "length" else len(text)
    path.write_bytes(struct.pack("<Q", length) + text)
    return f"{path.name}: {which}"


def change_tensors(folder: Path, random: random.Random, pwned: Path) -> str:
    """Weights that lack a tensor, have another one, or one of another shape or type."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / random.choice(["model.safetensors", "liar/fingerprint.safetensors"])
    tensors = load_file(path)
    name = random.choice(sorted(tensors))
    how = random.choice(["lack", "rename", "grow", "add", "int", "scalar", "inf", "empty"])
    value = tensors.pop(name)
    changed = {
        "rename": {name + "_": value},
        "grow": {name: torch.cat([value, value])},
        "add": {name: value, "model.layers.7.mlp.up_proj.weight": value.clone()},
        "int": {name: torch.zeros(value.shape, dtype=torch.int32)},
        "scalar": {name: torch.zeros(())},
        "inf": {name: value.clone().fill_(float("inf")) if value.is_floating_point() else -value},
        "empty": {name: value[:0]},
    }
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        facts = file.metadata()
    save_file({**tensors, **changed.get(how, {})}, path, facts)
    return f"{path.name}: {how} {name}"


def change_fingerprint(folder: Path, random: random.Random, pwned: Path) -> str:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = folder / "liar/fingerprint.safetensors"
    with safe_open(path, "pt") as file:
        facts = dict(file.metadata())
    key = random.choice(sorted(facts))
    values = ["", "-1", "float128", "nn", "1" * 5000, "someone/kernel", "forward", "__class__"]
    facts[key] = random.choice(values)
    save_file(load_file(path), path, facts if random.random() < 0.9 else None)
    return f"{key} = {facts[key][:20]}"


def replace_code(folder: Path, random: random.Random, pwned: Path) -> str:
    """Code of a stranger, under every name by which a loader may find it."""
    evil = EVIL.format(path=str(pwned))
    (folder / "evil.py").write_text(evil + "class Config: pass\n")
    how = random.choice(["bytes", "auto_map", "added", "nested", "generate", "repo", "redirect"])
    if how == "bytes":
        (folder / "liar_loader.py").write_text(evil)
    elif how == "auto_map":
        names = ["AutoModelForCausalLM", "AutoConfig", "AutoModel", "AutoTokenizer"]
        name, file = random.choice(names), random.choice(["evil", "liar_loader.evil", "..evil"])
        change_config(folder, lambda f: f.update(auto_map={name: f"{file}.PrunedModel"}))
    elif how == "added":
        (folder / "liar_loader.py").write_text(evil)
        loader = {"AutoModelForCausalLM": "liar_loader.LlamaForCausalLM"}
        change_config(folder, lambda f: f.update(auto_map=loader))
    elif how == "nested":
        change_config(folder, lambda f: f.update(text_config={"auto_map": {"AutoModel": "evil.x"}}))
    elif how == "generate":
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(evil)
    elif how == "repo":
        loader = {"AutoModelForCausalLM": f"{folder}--evil.PrunedModel"}
        change_config(folder, lambda f: f.update(auto_map=loader))
    else:
        fields = json.loads((folder / "config.json").read_text())
        fields["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.x"}
        (folder / "config.5.0.0.json").write_text(json.dumps(fields))
        change_config(folder, lambda f: f.update(configuration_files=["config.5.0.0.json"]))
    return how


def pickle_weights(folder: Path, random: random.Random, pwned: Path) -> str:
    """Weights, or other files, that run code when they are read."""
    name = random.choice(["pytorch_model.bin", "adapter_model.bin", "model.safetensors"])
    if random.random() < 0.8:
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Pickled(pwned)))
    if name == "adapter_model.bin":
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "."}')
    return name


def change_index(folder: Path, random: random.Random, pwned: Path) -> str:
    """A weights index that names files elsewhere, none, or something else than files."""
    weights = folder / "model.safetensors"
    outside = folder.parent / "outside.safetensors"
    shutil.copy(weights, outside)
    weights.rename(folder / "model-00001-of-00001.safetensors")
    inside = {"a": "model-00001-of-00001.safetensors"}
    named = [str(outside), "../outside.safetensors", "x/../../outside.safetensors", "gone", "", 7]
    how = random.choice([*({"a": each} for each in named), {}, [], None, inside, "text"])
    index = {"metadata": {}, "weight_map": how}
    text = json.dumps(random.choice([index, index, index, [], {}]))
    (folder / "model.safetensors.index.json").write_text(text)
    return text[:60]


def change_mark(folder: Path, random: random.Random, pwned: Path) -> str:
    layers = ["equal", "unequal", "some", 0, None, {}]
    marks = [{"version": 1, "layers": each} for each in layers]
    value = random.choice([*marks, {}, [], "liar", 1, None, {"version": [1]}, {"version": True}])
    change_config(folder, lambda fields: fields.update(liar=value))
    return str(value)


def change_class(folder: Path, random: random.Random, pwned: Path) -> str:
    names = ["BertModel", "LlamaModel", "AutoModel", "pipeline", "os", "__doc__", "", 3, None, []]
    value = random.choice([*([name] for name in names), [], "LlamaForCausalLM", {"a": 1}])
    change_config(folder, lambda fields: fields.update(architectures=value))
    return str(value)


WAYS: list[Tamper] = [
    *(flip_bytes, cut_file, delete_file, put_nasty_value, put_nasty_value, claim_sizes),
    *(deepen_json, link_elsewhere, make_pipe, lie_in_header, change_tensors, change_fingerprint),
    *(replace_code, replace_code, pickle_weights, change_index, change_mark, change_class),
]


def tampered(
    good: list[Path], count: int, seed: int, work: Path
) -> Iterator[tuple[str, Path, Path]]:
    """Yield what was done, to which copy, and the file that exists once its code has run."""
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        way, source = WAYS[number % len(WAYS)], good[number // len(WAYS) % len(good)]
        home = work / f"{number:05}"
        shutil.copytree(source, home / "pruned")
        pwned = home / "PWNED"
        what = way(home / "pruned", draw, pwned)
        yield f"{number} {source.name} {way.__name__}: {what}", home / "pruned", pwned
        shutil.rmtree(home)


def _file(folder: Path, random: random.Random, *patterns: str) -> Path:
    """Choose a file that a loader reads."""
    matching = folder.rglob(random.choice(patterns or ("*",)))
    found = sorted(path for path in matching if path.is_file())
    return random.choice([path for path in found if "report" not in path.name])
