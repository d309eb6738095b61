"""Graphs of tiny models, run by onnxruntime: outputs, any shape, padding, what is refused."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from covers import slow
from folders import as_in_the_hubs_cache, equal_plan, make_plan, pruned, tokenizer
from onnxruntime import quantization
from safetensors.torch import save_file
from tiny import VOCAB, tiny

from liar_ext import InputError, cli, save_pruned
from liar_ext.checkpoint.readers import read_sentence
from liar_ext.export import export
from liar_ext.export import onnx as exporter

SHAPES = ((1, 1), (1, 2), (2, 1), (1, 40), (7, 13))
POOLING = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}


def text_inputs(batch: int, tokens: int, types: bool) -> dict[str, np.ndarray]:
    """Random tokens; of all but the first sequence some are padding, left or right."""
    random = np.random.default_rng(tokens)
    ids = random.integers(3, VOCAB, (batch, tokens))
    mask = np.ones_like(ids)
    for row in range(1, batch):
        gone = row * tokens // (batch + 1)
        mask[row, : gone if row % 2 else 0] = 0
        mask[row, tokens - (0 if row % 2 else gone) :] = 0
    inputs = {"input_ids": np.where(mask, ids, 0), "attention_mask": mask}
    return inputs | ({"token_type_ids": random.integers(0, 2, ids.shape)} if types else {})


def session_of(out) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(out / "onnx" / "model.onnx")


def differences(model, out, types: bool) -> list[float]:
    session = session_of(out)
    found = []
    for shape in SHAPES:
        inputs = text_inputs(*shape, types)
        with torch.no_grad():
            result = model(**{name: torch.from_numpy(each) for name, each in inputs.items()})
        names = [each.name for each in session.get_outputs()]
        for name, got in zip(names, session.run(None, inputs), strict=True):
            assert got.shape == tuple(result[name].shape)
            found.append(float(np.abs(got - result[name].numpy()).max()))
    return found


def save_dense(model, folder):
    model.save_pretrained(folder)
    return folder


def add_modules(folder, *modules: tuple[str, str], **settings: dict) -> None:
    """Write modules.json, and a config.json for each module that has settings."""
    chain = [("Transformer", ""), *modules]
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.{kind}"}
        for index, (kind, path) in enumerate(chain)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    for path, fields in settings.items():
        (folder / path).mkdir(exist_ok=True)
        (folder / path / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("name", "plan_of", "outputs"),
    [
        ("bert", make_plan, ["logits"]),
        slow("roberta", equal_plan, ["logits"]),
        slow("distilbert", make_plan, ["last_hidden_state"]),
        slow("mpnet", make_plan, ["last_hidden_state"]),
    ],
)
def test_outputs_are_those_of_torch_whatever_the_shape(name, plan_of, outputs, tmp_path):
    model, plan = pruned(name, plan_of)
    save_pruned(model, tmp_path / "model", plan, tokenizer=tokenizer())
    (out,) = export(tmp_path / "model", "onnx").paths
    assert out == tmp_path / "model-onnx"
    session = session_of(out)
    assert [each.name for each in session.get_outputs()] == outputs
    types = "token_type_ids" in [each.name for each in session.get_inputs()]
    assert types == (name in ("bert", "roberta"))
    assert max(differences(model, out, types)) < 2e-5
    # A sequence that is all padding is nobody's, but must not be NaN.
    inputs = text_inputs(2, 5, types)
    inputs["attention_mask"][1] = 0
    assert np.isfinite(session.run(None, inputs)[0]).all()
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.architectures == [type(model).__name__]
    assert transformers.AutoTokenizer.from_pretrained(out)("a b")["input_ids"] == [2, 3]
    assert not {"liar", "auto_map", "per_layer_config"} & config.to_dict().keys()


@pytest.mark.exhaustive
def test_other_heads_and_images(tmp_path):
    config = tiny("bert", num_hidden_layers=1).config
    torch.manual_seed(0)
    questions = transformers.BertForQuestionAnswering(config).eval()
    (out,) = export(save_dense(questions, tmp_path / "questions"), "onnx").paths
    assert [each.name for each in session_of(out).get_outputs()] == ["start_logits", "end_logits"]
    assert max(differences(questions, out, True)) < 2e-5

    images = tiny("vit", num_hidden_layers=1)
    folder = save_dense(images, tmp_path / "images")
    processor = folder / "preprocessor_config.json"
    processor.symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="preprocessor_config.json leads to /etc/hostname, outsid"):
        export(folder, "onnx")
    processor.unlink()
    processor.write_text('{"size": 8}')
    done = export(folder, "onnx")
    session = session_of(*done.paths)
    assert json.loads((done.paths[0] / processor.name).read_text()) == {"size": 8}
    for batch in (1, 3):
        pixels = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            expected = images(pixels).logits.numpy()
        assert (
            np.abs(session.run(None, {"pixel_values": pixels.numpy()})[0] - expected).max() < 2e-5
        )
    assert not any("tokenizer" in note for note in done.notes)
    with pytest.raises(InputError, match="can't express BertForPreTraining, whose outputs are"):
        model = transformers.BertForPreTraining(config)
        export(save_dense(model, tmp_path / "two"), "onnx")


@pytest.fixture
def encoder(tmp_path):
    """A folder of a sentence encoder, saved with the head that it was trained with."""
    model = tiny("roberta", num_hidden_layers=1)
    return save_dense(model, tmp_path / "encoder"), model.roberta


def states_and_mask(model, batch=4, tokens=6):
    inputs = {key: torch.from_numpy(each) for key, each in text_inputs(batch, tokens, True).items()}
    with torch.no_grad():
        return model(**inputs).last_hidden_state, inputs


def test_a_sentence_encoder_is_pooled_in_the_graph(encoder):
    folder, model = encoder
    dense = {"in_features": 64, "out_features": 5, "bias": True}
    dense["activation_function"] = "torch.nn.modules.activation.Tanh"
    add_modules(
        folder,
        ("models.Pooling", "1_Pooling"),
        ("models.Dense", "2_Dense"),
        ("sentence_transformer.modules.normalize.Normalize", "3_Normalize"),
        **{"1_Pooling": {**POOLING, "pooling_mode_max_tokens": True}, "2_Dense": dense},
    )
    weight, bias = torch.randn(5, 64), torch.randn(5)
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense/model.safetensors")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    done = export(folder, "onnx")
    (out,) = done.paths
    assert "ask for sentence_embedding" in " ".join(done.notes)
    states, inputs = states_and_mask(model)
    mask = inputs["attention_mask"][..., None]
    largest = states.masked_fill(mask == 0, -torch.inf).amax(1)
    pooled = torch.cat([largest, (states * mask).sum(1) / mask.sum(1)], 1)
    expected = torch.nn.functional.normalize(torch.tanh(pooled @ weight.T + bias), dim=-1)
    fed = {key: each.numpy() for key, each in inputs.items()}
    got = session_of(out).run(["sentence_embedding", "last_hidden_state"], fed)
    assert np.abs(got[0] - expected.numpy()).max() < 2e-5
    assert np.abs(got[1] - states.numpy()).max() < 2e-5
    # What was written says the same chain, in its own words.
    again = read_sentence(out)
    assert again.pooling.modes == ("max", "mean") and len(again.rest) == 3
    assert json.loads((out / "sentence_bert_config.json").read_text()) == {"max_seq_length": 40}


@pytest.mark.parametrize("mode", ["cls", "max", "mean", "mean_sqrt_len_tokens"])
def test_each_pooling_is_what_it_says(mode, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    add_modules(tmp_path, ("models.Pooling", "p"), p={"pooling_mode": mode})
    states = torch.randn(3, 4, 2)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    got = read_sentence(tmp_path).pooling(states, mask)
    for row, kept in enumerate(mask.bool()):
        tokens = states[row, kept]
        mean = tokens.mean(0)
        expected = {"cls": tokens[0], "max": tokens.amax(0), "mean": mean}
        expected["mean_sqrt_len_tokens"] = mean * len(tokens) ** 0.5
        torch.testing.assert_close(got[row], expected[mode])


def test_int8_is_smaller_and_says_what_it_costs(tmp_path, capsys):
    folder = save_dense(tiny("bert", num_hidden_layers=1), tmp_path / "model")
    assert cli.main(["export", str(folder), "--to", "onnx", "--quantize", "int8"]) == 0
    said = capsys.readouterr().out
    assert "int8: 0." in said and "greatest difference from torch" in said
    out = tmp_path / "model-onnx"
    assert f"InferenceSession('{out}/onnx/model.onnx')" in said  # not where it was made
    assert [path.name for path in (out / "onnx").iterdir()] == ["model.onnx"]
    assert 0 < max(differences(tiny("bert", num_hidden_layers=1), out, True)) < 0.5
    kinds = [node.op_type for node in onnx.load(out / "onnx" / "model.onnx").graph.node]
    assert kinds.count("MatMulInteger") >= 6
    with pytest.raises(InputError, match="--quantize of --to onnx must be one of float32, int8"):
        export(folder, "onnx", tmp_path / "x", quantize="q8_0")
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model with its graph, and with one of another embedding."""
    folder = tmp_path_factory.mktemp("small")
    model = tiny("distilbert", n_layers=1)
    exporter.write_graph(exporter.build_graph(model, None), folder / "right.onnx")
    wrong = onnx.load(folder / "right.onnx")
    weight = max(wrong.graph.initializer, key=lambda each: len(each.dims) * len(each.raw_data))
    values = np.frombuffer(weight.raw_data, np.float32)
    weight.raw_data = np.ascontiguousarray(-values[::-1]).tobytes()
    onnx.save(wrong, folder / "wrong.onnx")
    return save_dense(model, folder / "model")


@pytest.mark.parametrize("quantize", ["float32", "int8"])
def test_a_graph_that_computes_something_else_is_not_put_in_place(quantize, small, monkeypatch):
    right, wrong = small.with_name("right.onnx"), small.with_name("wrong.onnx")
    first = wrong if quantize == "float32" else right
    monkeypatch.setattr(exporter, "write_graph", lambda graph, path: shutil.copy(first, path))
    monkeypatch.setattr(
        quantization, "quantize_dynamic", lambda first, path, **_: shutil.copy(wrong, path)
    )
    before = sorted(small.parent.iterdir())
    with pytest.raises(InputError, match="outputs are not torch's: they differ by"):
        export(small, "onnx", quantize=quantize)
    assert sorted(small.parent.iterdir()) == before


def test_outputs_of_torch_that_are_not_finite_are_seen(small):
    graph = exporter.build_graph(tiny("distilbert", n_layers=1), None)
    forward, scales = graph.forward, iter([1.0, *20 * [torch.nan]])
    graph.forward = lambda **given: [next(scales) * each for each in forward(**given)]
    with pytest.raises(InputError, match="outputs are not torch's: they differ by inf"):
        exporter.check_graph(graph, small.with_name("right.onnx"), 1e-2)


def fails(error):
    def run(*_, **__):
        raise error

    return run


def test_what_libraries_raise_is_one_line_and_leaves_nothing(small, monkeypatch):
    before = sorted(small.parent.iterdir())
    right = small.with_name("right.onnx")
    monkeypatch.setattr(torch.onnx, "export", fails(torch.onnx.OnnxExporterError("no such\nop")))
    with pytest.raises(InputError, match="can't express DistilBertModel: OnnxExporterError: no su"):
        export(small, "onnx")
    monkeypatch.setattr(torch.onnx, "export", fails(OSError(28, os.strerror(28))))
    with pytest.raises(InputError, match="No space left on device; nothing was left behind"):
        export(small, "onnx")
    monkeypatch.setattr(exporter, "write_graph", lambda graph, path: path.write_text("no graph"))
    with pytest.raises(InputError, match="can't express what was written, by onnxruntime: "):
        export(small, "onnx")
    monkeypatch.setattr(exporter, "write_graph", lambda graph, path: shutil.copy(right, path))
    # What protobuf raises at a file that a full disk has cut is none of Python's own kinds.
    torn = type("DecodeError", (Exception,), {})("torn")
    monkeypatch.setattr(quantization, "quantize_dynamic", fails(torn))
    with pytest.raises(InputError, match="can't quantise this graph: DecodeError: torn; free spac"):
        export(small, "onnx", quantize="int8")
    assert sorted(small.parent.iterdir()) == before
    done = export(small, "onnx", small.with_name("out"))
    assert "has no tokenizer, so none was written" in done.notes[-1]


def test_what_generates_is_refused_with_the_alternative(tmp_path):
    folder = save_dense(tiny("llama"), tmp_path / "model")
    with pytest.raises(InputError, match="got LlamaForCausalLM, which generates .* use --to gguf"):
        export(folder, "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


HOSTILE = {
    "an absolute path": ([("models.Pooling", "/etc")], {}, "leads out of it"),
    "a path upwards": ([("models.Pooling", "1/../../x")], {}, "leads out of it"),
    "a class of others": ([("models.Pooling", "p"), ("os.system", "q")], {"p": POOLING}, "names"),
    "another module": ([("models.Pooling", "p"), ("models.LSTM", "q")], {"p": POOLING}, "LSTM"),
    "no folder": ([("models.Pooling", "")], {}, "Pooling has no folder of its own"),
    "no pooling": ([("models.Normalize", "p")], {}, "where Pooling is expected"),
    "an unknown pooling": ([("models.Pooling", "p")], {"p": {"pooling_mode": "lasttoken"}}, "asks"),
    "pooling of a number": ([("models.Pooling", "p")], {"p": {"pooling_mode": 7}}, "asks for 7"),
    "prompts": ([("models.Pooling", "p")], {"p": {"include_prompt": False}}, "leaves prompts out"),
    "a missing folder": ([("models.Pooling", "p")], {}, "is missing"),
    "a path of no character": ([("models.Pooling", "\ud800")], {}, "is missing"),
    "too long a path": ([("models.Pooling", "p" * 300)], {}, "copy the folder again"),
    "activation": (
        [("models.Pooling", "p"), ("models.Dense", "d")],
        {"p": POOLING, "d": {"activation_function": "os.system"}},
        "names the activation 'system'",
    ),
    "another input": (
        [("models.Pooling", "p"), ("models.Dense", "d")],
        {"p": POOLING, "d": {"module_input_name": []}},
        "reads or writes something else",
    ),
    "pickled weights": (
        [("models.Pooling", "p"), ("models.Dense", "d")],
        {"p": POOLING, "d": {"activation_function": "torch.nn.Tanh"}},
        "can run code when they are read",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_of_a_chain_are_refused(case, encoder, capsys):
    folder, _ = encoder
    modules, settings, words = HOSTILE[case]
    add_modules(folder, *modules, **settings)
    assert cli.main(["export", str(folder), "--to", "onnx"]) == 2
    error = capsys.readouterr().err.replace("\nhint: ", "; ")
    assert words in error and error.count("\n") == 1, error
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]


def test_weights_with_nan_are_not_called_a_wrong_graph(tmp_path):
    model = tiny("distilbert", n_layers=1)
    model.transformer.layer[0].ffn.lin1.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="hold NaN or infinity; look for damaged weights"):
        export(save_dense(model, tmp_path / "model"), "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", '[{"type": 1}]', "[" * 10**5, "[{}]" * 2])
def test_a_damaged_chain_is_refused(text, encoder):
    folder, _ = encoder
    (folder / "modules.json").write_text(text)
    with pytest.raises(InputError, match="no readable modules.json|names '1'"):
        export(folder, "onnx")


def test_links_lead_no_further_than_the_cache_of_a_hub(encoder, tmp_path):
    folder, _ = encoder
    add_modules(folder, ("models.Pooling", "p"), p=POOLING)
    secret = tmp_path / "secret.json"
    secret.write_text('{"pooling_mode": "cls"}')
    for name in ("p/config.json", "sentence_bert_config.json", "modules.json"):
        kept = (folder / name).read_text() if (folder / name).exists() else None
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        with pytest.raises(InputError, match="leads to .*secret.json, outside of the fold"):
            read_sentence(folder)
        (folder / name).unlink()
        if kept:
            (folder / name).write_text(kept)
    assert read_sentence(as_in_the_hubs_cache(folder)).pooling.modes == ("mean",)


def test_dense_weights_must_be_those_of_their_config(encoder):
    folder, _ = encoder
    dense = {"in_features": 32, "out_features": 2**40, "bias": False}
    add_modules(folder, ("models.Pooling", "p"), ("models.Dense", "d"), p=POOLING, d=dense)
    save_file({"linear.weight": torch.zeros(2, 32)}, folder / "d" / "model.safetensors")
    with pytest.raises(InputError, match="has weights .* its config.json says 32 to 1099511627776"):
        export(folder, "onnx")
    # As its config says, and yet not for this encoder.
    (folder / "d" / "config.json").write_text(
        '{"in_features": 7, "out_features": 2, "bias": false}'
    )
    save_file({"linear.weight": torch.zeros(2, 7)}, folder / "d" / "model.safetensors")
    with pytest.raises(InputError, match="can't express modules.json, after the encoder"):
        export(folder, "onnx")
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]
