from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import sys
import warnings
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout

import huggingface_hub
import pytest
import torch
from command import run
from example_reports import ordinary, save
from tiny import outputs, tiny
from transformers.utils.logging import enable_progress_bar, is_progress_bar_enabled

from liar_ext import InputError, Report, load_pruned, verify_pruned
from liar_ext.checkpoint import load_model
from liar_ext.cli.main import parser, say
from liar_ext.cli.options import error_lines
from liar_ext.system.progress import no_bars

pytestmark = pytest.mark.usefixtures("quick_workers")


@pytest.fixture(scope="module")
def pruned(llama_folder, corpus, tmp_path_factory):
    """The folder that a command writes, and what it prints and warns of."""
    out = tmp_path_factory.mktemp("out") / "pruned"
    command = ["prune", llama_folder, "--calibration", corpus[0], "--eval", corpus[1]]
    printed, warned = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(warned), no_bars():
        command += ["--out", out, "--keep", 0.7, "--samples", 16, "--seq-len", 32]
        assert run(*command) == 0, warned.getvalue()
    return out, printed.getvalue(), warned.getvalue()


def test_a_reader_that_has_enough_is_no_error(monkeypatch, capfd):
    """As in ``liar families | head``; the rest is left out, also what would be flushed at exit."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run("families") == 141
    assert capfd.readouterr().err == ""


def test_prune_writes_an_ordinary_model_with_a_report(pruned):
    out, printed, warned = pruned
    report = json.loads((out / "liar/report.json").read_text())
    assert {path.name for path in out.iterdir()} >= {
        *("config.json", "model.safetensors", "tokenizer.json", "README.md", "liar"),
    }
    assert (out / "liar/plan.json").exists()
    assert report["budget"]["keep"] == 0.7
    assert report["evaluation"]["dense"]["perplexity"] > 1
    assert report["settings"]["bos"] == "" and "cut into" in report["warnings"][-1]
    stages = (
        "load write calibrate score allocate reconstruct judge surgery save evaluate total".split()
    )
    assert set(stages) == set(report["seconds"])
    assert report["params"]["prunable_after"] <= 0.7 * report["params"]["prunable_before"]
    fields = "name units_before units_after params_before params_after damp error holdout_error"
    assert set(f"{fields} dropped_rows path seconds".split()) <= set(report["sites"][0])
    assert "perplexity" in printed
    assert "calibrate" not in warned and "\r" not in warned  # no terminal, no progress
    assert f'load                 AutoModelForCausalLM.from_pretrained("{out}"' in printed
    assert f"next                 liar verify {out}\n" in printed
    assert "warning: " in warned and "arning" not in printed


def test_commands_to_run_next_take_no_folder_for_an_option(tmp_path, capsys):
    report = Report.load(save(tmp_path / "run", ordinary(2, model="-dense model")))
    say(report, Namespace(out="-out", json=False, quiet=False), 0.0)
    printed = re.findall(r" (liar .*)\n", capsys.readouterr().out)
    parsed = [parser().parse_args(shlex.split(line)[1:]) for line in printed]
    assert [each.command for each in parsed] == ["verify", "bench", "report"]
    assert {each.folder for each in parsed} == {"./-out"} and parsed[1].against == "./-dense model"


def test_prune_by_curves_reports_what_it_measured(llama_folder, corpus, tmp_path):
    out = tmp_path / "pruned"
    options = ["--keep", 0.7, "--samples", 16, "--seq-len", 32, "--quiet"]
    options += ["--criterion", "obs", "--allocation", "curve"]
    assert run("prune", llama_folder, "--calibration", corpus[0], "--out", out, *options) == 0
    report = json.loads((out / "liar/report.json").read_text())
    assert report["recipe"]["criterion"] == "obs"
    assert report["settings"]["predicted_divergence"] > 0
    assert all(site["sensitivity"] > 0 for site in report["sites"])
    assert report["seconds"]["allocate"] > 0
    assert verify_pruned(out)["agrees"]


def test_prune_by_gradients_says_how_to_load_the_result(llama_folder, corpus, tmp_path, capsys):
    out = tmp_path / "pruned"
    options = ["--keep", 0.6, "--samples", 16, "--seq-len", 32]
    options += ["--criterion", "fisher", "--allocation", "global"]
    assert run("prune", llama_folder, "--calibration", corpus[0], "--out", out, *options) == 0
    printed, report = capsys.readouterr().out, (out / "liar/report.md").read_text()
    assert f'AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)' in printed
    for told in ("liar_ext.load_pruned(folder)", "trust_remote_code=True", "--uniform-layers"):
        assert told in report
    assert json.loads((out / "liar/report.json").read_text())["loading"] in report
    assert run("verify", out) == 0
    name = "transformers.AutoModelForCausalLM.from_pretrained(trust_remote_code=True)"
    assert f"{name}: same outputs" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cuda:9", "gpu"])
def test_a_device_that_is_not_there_is_refused(device, llama_folder, corpus, tmp_path, capsys):
    texts = ("--calibration", corpus[0], "--keep", 0.7)
    for command in (
        ("prune", llama_folder, *texts, "--out", tmp_path / "out"),
        ("eval", llama_folder, "--text", corpus[1]),
    ):
        assert run(*command, "--device", device) == 2
        said = capsys.readouterr().err.replace("\nhint: ", "; ").strip()
        assert f"device must be one that torch can use here, or auto, got '{device}'" in said
        assert "\n" not in said


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
        MemoryError(),
        MemoryError("std::bad_alloc"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("liar_ext: out of memory for the workspace of an operator; free some"),
    ],
)
def test_too_little_memory_says_what_to_do(error, monkeypatch, capsys):
    def prune(options):
        raise error

    monkeypatch.setattr("liar_ext.cli.prune.run", prune)
    assert run("prune", "model", "--calibration", "text", "--keep", 0.7, "--out", "out") == 2
    said = capsys.readouterr().err.replace("\nhint: ", "; ")
    assert said.startswith("error: ") and said.count("\n") == 1
    assert "memory" in said and "give smaller --batch-size or --memory" in said


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    def prune(options):
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr("liar_ext.cli.prune.run", prune)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        run("prune", "model", "--calibration", "text", "--out", "out")


def test_gradients_of_an_encoder_without_labels_are_refused(tokenizer, tmp_path, capsys):
    tiny("bert").save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    texts = ("--calibration", tmp_path / "rows.jsonl", "--seq-len", 16, "--samples", 8)
    (tmp_path / "rows.jsonl").write_text('{"text": "some words"}\n' * 8)
    out = tmp_path / "out"
    assert run("prune", tmp_path / "bert", *texts, "--criterion", "snip", "--out", out) == 2
    assert "got no labels\nhint: give a model with a head and batches" in capsys.readouterr().err
    assert not out.exists()


def test_verify_and_eval_the_result(pruned, corpus, capsys):
    out = pruned[0]
    assert run("verify", out, "--text", corpus[1]) == 0
    said = capsys.readouterr().out
    assert "same outputs" in said and "perplexity" in said and "tokens/s" in said
    report = json.loads((out / "liar/report.json").read_text())
    text = ("--text", corpus[1], "--seq-len", 32)
    assert run("eval", out, *text, "--json", "--quiet") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["perplexity"] == pytest.approx(
        report["evaluation"]["pruned"]["perplexity"], rel=1e-4
    )
    assert run("eval", out, *text, "--samples", 3) == 0
    assert "93 tokens in 3 windows of 32" in capsys.readouterr().out


def test_what_is_missing_is_told_before_the_model_is_loaded(
    llama_folder, corpus, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("liar_ext.cli.inputs.load_model", lambda *_: pytest.fail("loaded"))
    command = ("prune", llama_folder, "--calibration", corpus[0], "--out", tmp_path / "out")
    assert run(*command, "--of", "latency", "--latency-table", tmp_path / "no.json") == 2
    assert f"there is no file {tmp_path / 'no.json'}" in capsys.readouterr().err


def test_a_typo_in_the_name_of_a_folder(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "minilm").mkdir()
    for name, said in (
        ("minlm", "did you mean minilm? "),
        ("no/where", "the hub can't be reached"),
    ):
        assert run("eval", name, "--text", corpus[1]) == 2
        assert f"error: there is no folder {name} here\nhint: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--max-memory", "4GiB"]])
def test_a_hub_out_of_reach_is_asked_once_at_a_time(more, corpus, tmp_path, capsys, monkeypatch):
    """For what the model reads, and to load it; a download would ask six times, with waits."""
    asked = []

    def refuse(url: str) -> None:
        asked.append(url)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    command = ["prune", "no/where", "--calibration", corpus[0], "--out", tmp_path / "out"]
    assert run(*command, *more) == 2
    said = "error: there is no folder no/where here\nhint: the hub can't be reached: no route"
    assert said in capsys.readouterr().err
    assert len(asked) == 2 and asked[0].endswith("/no/where/resolve/main/config.json")


def test_values_that_are_too_large_are_told(llama_folder, corpus, tmp_path, capsys):
    model, tokenizer = load_model(llama_folder)
    model.model.layers[1].mlp.up_proj.weight.data *= 1e18
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = ("--calibration", corpus[0], "--samples", 8, "--seq-len", 16, "--preset", "fast")
    assert run("prune", tmp_path / "model", *text, "--out", tmp_path / "out") == 2
    assert "at 1.mlp tokens with values that are not finite or too large" in capsys.readouterr().err


def test_text_that_does_not_vary_is_warned_of(llama_folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a" * 4000)
    text = ("--calibration", tmp_path / "text.txt", "--samples", 8, "--seq-len", 16)
    own = ("--self-text", 0, "--random-tokens", 0, "--preset", "fast", "--keep", 0.5)
    assert run("prune", llama_folder, *text, *own, "--out", tmp_path / "out") == 0
    assert "warning: Every error is 0: the activations do not vary" in capsys.readouterr().err


def test_a_warning_is_a_line_where_python_makes_errors_of_warnings(monkeypatch, capsys):
    families = "liar_ext.cli.info.run_families"
    monkeypatch.setattr(families, lambda _: warnings.warn("of the text", stacklevel=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("families") == 0
    assert capsys.readouterr().err == "warning: of the text\n"


def test_what_the_text_lacks_is_said_once(llama_folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 20)
    text = ("--calibration", tmp_path / "text.txt", "--samples", 99, "--seq-len", 16)
    assert run("prune", llama_folder, *text, "--preset", "fast", "--out", tmp_path / "out") == 0
    assert capsys.readouterr().err.count("of 99 sequences") == 1
    report = json.loads((tmp_path / "out/liar/report.json").read_text())
    assert sum("of 99 sequences" in each for each in report["warnings"]) == 1


def test_a_message_drives_no_terminal(llama_folder, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text(json.dumps({"\x1b[31mred": 1}))
    text = ("--calibration", tmp_path / "text.jsonl", "--out", tmp_path / "out")
    assert run("prune", llama_folder, *text) == 2
    error = capsys.readouterr().err
    assert "[31mred" in error and "\x1b" not in error


def test_the_file_of_an_evaluation_is_looked_at_first(llama_folder, corpus, tmp_path, capsys):
    command = ("eval", llama_folder, "--text", corpus[1], "--seq-len", 32, "--quiet", "--out")
    assert run(*command, tmp_path / "a.json") == run(*command, tmp_path / "a.json") == 0
    assert "perplexity" in json.loads((tmp_path / "a.json").read_text())
    capsys.readouterr()
    (tmp_path / "own.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("a.json")
    for name in ("own.json", "link.json", "missing/o.json"):
        assert run("eval", "/nowhere", *command[2:], tmp_path / name) == 2  # nothing was loaded
        assert "give another name with --out" in capsys.readouterr().err
    assert (tmp_path / "own.json").read_text() == "{}"


def test_an_evaluation_that_cannot_be_written_is_printed(
    llama_folder, corpus, tmp_path, capsys, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    text = ("--text", corpus[1], "--seq-len", 32, "--quiet")
    assert run("eval", llama_folder, *text, "--out", tmp_path / "a.json") == 2
    captured = capsys.readouterr()
    assert "perplexity" in captured.out and "No space left" in captured.err


def test_quiet_prints_nothing(llama_folder, corpus, tmp_path, capfd):
    arguments = ("--calibration", corpus[0], "--samples", 8, "--seq-len", 16, "--quiet")
    assert run("prune", llama_folder, *arguments, "--out", tmp_path / "out") == 0
    assert capfd.readouterr().out == ""


def test_layerwise_is_an_option(llama_folder, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    texts = ("--calibration", corpus[0], "--samples", 8, "--seq-len", 16, "--quiet")
    options = ("--schedule", "layerwise")
    assert run("prune", llama_folder, *texts, *options, "--out", out) == 0
    settings = json.loads((out / "liar/report.json").read_text())["settings"]
    assert settings["schedule"] == "layerwise"
    assert verify_pruned(out)["agrees"]
    wrong = (*options, "--reconstruct", "none")
    assert run("prune", llama_folder, *texts, *wrong, "--out", tmp_path / "other") == 2
    assert "solves for no target" in capsys.readouterr().err


def test_the_hidden_size_alone_is_an_option(llama_folder, corpus, tmp_path, capsys):
    out = tmp_path / "pruned"
    options = ["--keep", 1, "--keep-hidden", 0.8, "--samples", 16, "--seq-len", 32]
    assert run("prune", llama_folder, "--calibration", corpus[0], "--out", out, *options) == 0
    printed = capsys.readouterr().out
    assert f'AutoModelForCausalLM.from_pretrained("{out}")' in printed
    assert "input_layernorm" not in printed
    report = json.loads((out / "liar/report.json").read_text())
    assert report["sites"] == [] and {row["units_after"] for row in report["hidden"]} == {32}
    assert json.loads((out / "config.json").read_text())["hidden_size"] == 32
    assert run("verify", out) == 0
    assert "transformers.LlamaForCausalLM.from_pretrained: same outputs" in capsys.readouterr().out


def write_gguf(path, model, tokenizer, without: str = "lm_head.weight") -> None:
    """Write a tiny Llama as llama.cpp stores it: its names, and query and key rows interleaved."""
    import gguf

    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = [f"<{i}>" for i in range(config.vocab_size)]
    for token, index in tokenizer.get_vocab().items():
        tokens[index] = {" ": "Ġ", "\n": "Ċ"}.get(token, token)
    tokens[-1] = "ab"
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        if name in ("lm_head.weight", without):
            continue  # the first is tied to the embeddings
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if projection in name:
                tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_an_ordinary_model(tokenizer, corpus, tmp_path, capfd):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    dense = tiny("llama", **sizes)
    write_gguf(tmp_path / "tiny.gguf", dense, tokenizer)
    out = tmp_path / "out"
    enable_progress_bar()
    arguments = ("--calibration", corpus[0], "--samples", 8, "--seq-len", 16, "--quiet")
    assert run("prune", tmp_path / "tiny.gguf", *arguments, "--keep", 1, "--out", out) == 0
    assert verify_pruned(out)["agrees"]
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert torch.equal(outputs(load_pruned(out)), outputs(dense))
    # The bar of its tensors obeys --quiet, and the switch is as it was for the next command.
    assert "quantizing" not in capfd.readouterr().err and is_progress_bar_enabled()
    load_model(tmp_path / "tiny.gguf")
    assert "quantizing" in capfd.readouterr().err


@pytest.mark.parametrize(
    "lacks",
    ["layers.2.self_attn.k_proj.weight", "layers.0.mlp.up_proj.weight", "norm.weight"],
)
def test_a_gguf_file_without_a_weight_is_refused(lacks, tokenizer, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny("llama"), tokenizer, f"model.{lacks}")
    with pytest.raises(InputError, match=f"tiny.gguf lacks model.{lacks}; copy it again"):
        load_model(tmp_path / "tiny.gguf")


def test_nothing_beside_a_gguf_file_is_read(tokenizer, tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", tiny("llama"), tokenizer)
    code = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(code))
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    adapter = {"base_model_name_or_path": "/nowhere", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    monkeypatch.setattr("builtins.input", lambda prompt: "y")  # to transformers' question
    model, found = load_model(tmp_path / "tiny.gguf")
    assert found("ab").input_ids and model.config.name_or_path == str(tmp_path)


def test_a_vision_model_is_given_no_text(corpus, tmp_path, capsys):
    tiny("vit").save_pretrained(tmp_path / "vit")
    out = tmp_path / "out"
    assert run("prune", tmp_path / "vit", "--calibration", corpus[0], "--out", out) == 2
    assert "holds no images" in capsys.readouterr().err


def test_json_is_one_object_and_nothing_else(llama_folder, corpus, tmp_path, capsys):
    text = ("--calibration", corpus[0], "--samples", 8, "--seq-len", 16, "--preset", "fast")
    bank, out = tmp_path / "a.bank", tmp_path / "out"
    assert run("calibrate", llama_folder, *text[:-2], "-o", bank, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["out"] == str(bank) and facts["sequences"] >= 8 and facts["text"]
    assert run("prune", llama_folder, *text, "-o", out, "--eval", corpus[1], "--json") == 0
    said = capsys.readouterr()
    facts, report = json.loads(said.out), json.loads((out / "liar/report.json").read_text())
    assert facts["out"] == str(out) and facts["parameters"] == report["params"]
    assert facts["megabytes"]["after"] == pytest.approx(report["params"]["after"] * 4e-6)
    assert facts["quality"]["pruned"]["perplexity"] > 1 and facts["worst_layer"]["error"] >= 0
    assert facts["load"].startswith(f'AutoModelForCausalLM.from_pretrained("{out}"')
    assert facts["seconds"] > 0
    assert facts["warnings"] and said.err.count("warning: ") == len(facts["warnings"])
    assert run("prune", llama_folder, *text, "-o", out, "--overwrite", "--json", "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert run("doctor", "--json") == 0
    assert json.loads(capsys.readouterr().out)["versions"]["liar_ext"]


@pytest.mark.parametrize(
    ("more", "lines"),
    [((), True), (("--progress", "plain"), True), (("--progress", "none"), False)],
)
def test_progress_without_a_terminal_is_lines_of_stderr(
    more, lines, llama_folder, corpus, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("liar_ext.system.progress.EVERY", 0.0)
    text = ("--calibration", corpus[0], "--samples", 8, "--seq-len", 16, "--preset", "fast")
    assert run("prune", llama_folder, *text, "--out", tmp_path / "out", *more) == 0
    said = capsys.readouterr()
    assert ("[1/2] collecting activation statistics" in said.err) is lines
    assert "[1/2]" not in said.out and "\r" not in said.err
    assert not logging.getLogger("liar_ext").handlers


@pytest.fixture
def refuse(llama_folder, corpus, tmp_path, capsys):
    """Run prune with faulty arguments; it must say so in one line and leave nothing behind."""

    def check(message, *arguments, model=llama_folder, calibration=corpus[0]):
        out = tmp_path / "refused"
        code = run("prune", model, "--calibration", calibration, "--out", out, *arguments)
        error = capsys.readouterr().err.replace("\nhint: ", "; ").splitlines()[-1]
        assert code == 2
        assert error.startswith("error: ") and message in error
        assert not out.exists() and not list(tmp_path.glob(".*"))

    return check


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("prnue", "there is no command prnue\nhint: did you mean prune?"),
        ("prune m --keeep 1", "unknown option --keeep\nhint: did you mean --keep?"),
        ("prune m --text t", "unknown option --text\nhint: did you mean --calibration?"),
        ("prune m --sparsity 0.5", "unknown option --sparsity\nhint: did you mean --keep, the"),
        ("prune m --nsamples=8", "unknown option --nsamples=8\nhint: did you mean --samples?"),
        ("prune m --model m", "unknown option --model\nhint: liar prune --help shows"),
        ("prune m --preset fats", "got 'fats'\nhint: did you mean fast?"),
        ("export m --to onx", "got 'onx'\nhint: did you mean onnx?"),
        ("prune m --calibration t --out o --criterion wand", "'wand'\nhint: did you mean wanda?"),
        ("prune m --calibration t --out o --keep 80", "--keep must be in (0, 1], got 80.0\nhint: "),
        ("prune m --keep 80%", "error: --keep must be a number such as 0.5, got '80%'"),
        ("report gone/pruned", "gone/pruned has no liar/report.json\nhint: give a folder that"),
        ("verify pruend", "pruend doesn't exist\nhint: did you mean pruned?"),
        ("prune pruned.txt --calibration pruned --out o", "pruned.txt is a file, and no .gguf"),
        (
            "prune m --calibration t.txt --out pruned.txt",
            "pruned.txt exists\nhint: choose another folder\n",
        ),
        (f"prune {'m' * 300}/m --calibration t --out o", "error: [Errno 36] File name too long"),
    ],
)
def test_an_error_says_what_is_wrong_and_what_to_type(line, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned.txt").write_text("a calibration text")
    try:
        code = run(*line.split())
    except SystemExit as stop:  # of argparse
        code = stop.code
    assert code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(("no_color", "painted"), [("", True), ("1", False)])
def test_colours_are_of_a_terminal(no_color, painted, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert ("\033[1;31merror:\033[0m it is" in error_lines("load: it is")) is painted
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert error_lines("load: it is; do this") == "error: it is\nhint: do this"
    said = error_lines("""latency: no; use of="flops" or attn_unit='head', not size="x\", tile=8""")
    assert said == """error: no\nhint: use --of flops or --attn-unit head, not size="x", --tile 8"""
    assert (
        error_lines("in runs/keep=0.5/a and keep=0.5/a")
        == "error: in runs/keep=0.5/a and keep=0.5/a"
    )
    for name, shown in (("eval", "--eval"), ("eval.txt", "eval.txt"), ("my_eval", "my_eval")):
        assert error_lines(f"recipe: {name} changed") == f"error: {shown} changed"


def test_bad_input_is_one_line_and_exit_code_2(refuse, tmp_path, corpus):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "empty.txt").write_text(" \n")
    refuse("keep must be in (0, 1]", "--keep", "0")
    refuse("no plan keeps 0.01", "--keep", "0.01", "--seq-len", "16")
    refuse("unknown criterion 'best'; known: fisher", "--criterion", "best")
    refuse("damp must be a number", "--damp", "much")
    refuse("must be UTF-8", calibration=tmp_path / "latin.txt")
    refuse("too short", "--seq-len", "64", calibration=tmp_path / "short.txt")
    refuse("holds no text", calibration=tmp_path / "empty.txt")
    refuse("does not exist", calibration=tmp_path / "absent.txt")
    copy = tmp_path / "copy.jsonl"
    copy.write_text(json.dumps({"text": corpus[0].read_text().upper() + "\n"}))
    for same in (corpus[0], corpus[0].parent, copy):
        refuse("documents are in the calibration text too", "--eval", str(same))
    refuse("has 64 positions, got --seq-len 65", "--seq-len", "65")
    refuse("give a folder, a hub id", model=tmp_path / "no_model")


def test_a_pruned_folder_is_pruned_again(pruned, corpus, tmp_path, capsys):
    first, out = pruned[0], tmp_path / "again"
    options = ["--samples", 16, "--seq-len", 16, "--keep", 0.8]
    assert run("prune", first, "--calibration", corpus[0], "--out", out, *options) == 0
    assert "Pruned before" in capsys.readouterr().out
    plans = [
        json.loads((folder / "liar/plan.json").read_text())["sites"] for folder in (first, out)
    ]
    for name, site in plans[1].items():
        assert site["units"] == plans[0][name]["units"]
        assert set(site["kept"]) <= set(plans[0][name]["kept"])
    assert verify_pruned(out)["agrees"]
