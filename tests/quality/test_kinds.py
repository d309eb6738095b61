"""The bench of other kinds of models reads weights as they were written."""

from __future__ import annotations

import struct
import sys

import numpy as np
import pytest
import torch
from test_docs import ROOT
from tiny import tiny
from transformers import Dinov2Config, Dinov2Model


@pytest.fixture
def kinds_models(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import kinds_models

    yield kinds_models
    sys.modules.pop("kinds_models")


def variables(state: dict[str, torch.Tensor], models) -> dict[str, np.ndarray]:
    """Return the weights of transformers as CTranslate2 stacks and names them."""
    found: dict[str, np.ndarray] = {}
    back = {"weight": "weight", "bias": "bias"}
    for stack in ("encoder", "decoder"):
        for index in range(2):
            at = f"model.{stack}.layers.{index}"
            for name, parts in models.ATTENTION.items():
                for kind in back:
                    rows = [state.get(f"{at}.{part}.{kind}") for part in parts]
                    if rows[0] is None and rows[-1] is None:
                        continue
                    like = next(row for row in rows if row is not None)
                    rows = [torch.zeros_like(like) if row is None else row for row in rows]
                    norm = {"weight": "gamma", "bias": "beta"}
                    said = norm[kind] if name.endswith("layer_norm") else kind
                    path = f"{stack}/layer_{index}/{name.replace('.', '/')}/{said}"
                    found[path] = torch.cat(rows).numpy()
    found["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"].numpy()
    for stack in ("encoder", "decoder"):
        positions = state[f"model.{stack}.embed_positions.weight"]
        found[f"{stack}/position_encodings/encodings"] = positions.numpy()
        for kind, said in (("weight", "gamma"), ("bias", "beta")):
            norm = state[f"model.{stack}.layer_norm.{kind}"]
            found[f"{stack}/layer_norm/{said}"] = norm.numpy()
    for name in ("conv1", "conv2"):
        for kind in back:
            found[f"encoder/{name}/{kind}"] = state[f"model.encoder.{name}.{kind}"].numpy()
    return found


def test_whisper_is_read_as_it_was_written(tmp_path, kinds_models):
    model = tiny("whisper", encoder_ffn_dim=20)
    state = {name: value.half() for name, value in model.state_dict().items()}
    written = variables(state, kinds_models)

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    parts = [struct.pack("<I", 6), string("WhisperSpec"), struct.pack("<II", 3, len(written) + 1)]
    parts += [string("encoder/num_heads"), struct.pack("<BBI", 0, 2, 2), struct.pack("<h", 4)]
    for name, value in written.items():
        shape = struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        parts += [string(name), shape, struct.pack("<BI", 4, value.nbytes), value.tobytes()]
    data, files = b"".join(parts), [tmp_path / name for name in ("model.bin1", "model.bin2")]
    for path, part in zip(files, (data[:1001], data[1001:]), strict=True):
        path.write_bytes(part)
    found = kinds_models.whisper_weights(*files)
    assert found.keys() == state.keys() - {"proj_out.weight"}
    for name, value in found.items():
        assert torch.equal(value, state[name].float()), name


def test_a_model_is_made_whole_beside_what_a_killed_job_left(tmp_path, kinds_models, monkeypatch):
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    state = Dinov2Model(Dinov2Config(**sizes)).state_dict()
    monkeypatch.setattr(kinds_models, "find", lambda *_: None)
    monkeypatch.setattr(kinds_models, "dinov2_weights", lambda _: state)
    left = tmp_path / "kinds" / "unfinished" / "stale"
    left.mkdir(parents=True)
    folder = kinds_models.dinov2(tmp_path)
    assert not (folder / "stale").exists() and kinds_models.dinov2(tmp_path) == folder
    assert Dinov2Model.from_pretrained(folder).num_parameters() > 2e7
    assert {each.name for each in folder.parent.iterdir()} == {"dinov2-small", "unfinished"}
