"""Bad command lines of ``liar``: what a hurried newcomer or a stranger types.

"{...}" is a file of :func:`reliability.commands.make_inputs`.
"""

from __future__ import annotations

import itertools

Line = tuple[str, ...]

# Options of `liar prune` with values that it must refuse.
VALUES = {
    "--samples": ["0", "-1", "1", "2.5", "many", "", "1e3", "9" * 20, "9" * 5000],
    "--self-text": ["-0.1", "0.999999", "nan", "x", "", "1e300"],
    "--random-tokens": ["-0.1", "0.999999", "nan", "x", "", "1e300"],
    "--seq-len": ["0", "-1", "1", "x", "", str(2**63), "65", "100000"],
    "--batch-size": ["0", "-1", "1.5", "x", "", "-" + "9" * 30],
    "--seed": ["-1", str(2**70), "1.5", "nan", ""],
    "--memory": ["nan", "infGiB", "-1GiB", "0GiB", "-1", "", "lots", "12", "9" * 400 + "TB"],
    "--keep": ["0", "-1", "1.5", "80", "nan", "inf", "", "0,8", "0.01", "1e-300", "x" * 5000],
    "--of": ["bytes", "", "PARAMS"],
    "--tile": ["0", "-32", "32.0", "x", "", "AUTO", "9" * 30],
    "--keep-hidden": ["0", "-0.1", "1.5", "nan", "0.001", "", "half"],
    "--sites": ["ffn", "", "attn,mlp"],
    "--attn-unit": ["token", ""],
    "--criterion": ["best", "", " ", "wifv ", "\udcff"],
    "--allocation": ["fair", "", "curves"],
    "--reconstruct": ["ridge", ""],
    "--damp": ["much", "-1", "nan", "", "1e-3x"],
    "--schedule": ["two-pass", ""],
    "--dtype": ["int8", "", "float"],
    "--device": ["cuda:99", "gpu", "", "cpu:x", "meta:", "\udcff"],
    "--eval": ["", " ", "{absent}.txt", "{text}", "{latin}", "{empty}", "{short}", "a\0b"],
    "--eval-samples": ["0", "-1", "x", "1.5"],
    "--certify": ["-1", "1", "x", "", "9" * 30],
    "--calibration": [
        *("", "{absent}.txt", "{latin}", "{empty}", "{short}", "{nothing}", "\udcff"),
        *("{no_field}", "{no_json}", "{deep}", "a\0b", "{binary}"),
    ],
    "--out": ["", " ", "{text}", "{text}/below", "{nothing}/" + "x" * 300, "a\udcff", "a\0b"],
    "--recipe": [
        *("", "{absent}", "{nothing}", "{binary}", "{tag}", "{alias}", "{deep_yaml}", "{unknown}"),
        *("{wrong}", "{twice}", "{huge}", "a\0b"),
    ],
    "--preset": ["quick", ""],
}
# Beside a valid job.
ADDED: list[Line] = [
    ("--rescale", "--max-memory", "8GiB"),
    ("--schedule", "layerwise", "--reconstruct", "none"),
    ("--keep-hidden", "0.9", "--tile", "64"),
    ("--preset", "fast", "--recipe", "{unknown}"),
    ("--keep", "0.7", "--uniform-layers", "yes"),
    ("--bogus",),
    ("--seed",),
    ("extra",),
    ("--memory", "1GiB", "2"),
    ("--eval", "{text}", "--eval-samples", "0"),
    ("--criterion", "taylor", "--schedule", "layerwise", "--reconstruct", "bias"),
]
MODELS = ["", " ", "{absent}", "{text}", "{nothing}", "{no_config}", "{bare}", "{nan}", "a\0b"]
SMALL = ("--calibration", "{text}", "--seq-len", "8", "--samples", "8")
BANKS = ["", "{absent}", "{text}", "{texts}", "{model}/model.safetensors", "{torn}", "a\0b"]
OTHERS: list[Line] = [
    (),
    ("",),
    ("--bogus",),
    ("shrink",),
    ("prune",),
    ("prune", "{model}"),
    ("prune", "--out", "{new}"),
    ("prune", "{model}", "--out", "{new}"),
    ("prune", "{model}", "--calibration", "{text}"),
    ("prune", "--calibration", "{text}", "{model}", "--out", "{new}"),
    ("prune", "{model}", "--calibration", "--out", "{new}"),
    ("prune", "{model}", "{model}", "--calibration", "{text}", "--out", "{new}"),
    ("prune", "{model}", "--calibration", "{text}", "--out", "{nothing}", "--keep", "0.7"),
    ("prune", "{model}", "--calibration", "{text}", "--out", "{texts}", "--overwrite"),
    ("prune", "{model}", "--calibration", "{text}", "--dry-run", "--keep", "0"),
    ("prune", "{model}", "--calibration", "{text}", "--dry-run", "--keep", "0.001"),
    ("doctor", "extra"),
    ("doctor", "--bogus"),
    ("eval",),
    ("eval", "{model}"),
    ("eval", "--text", "{text}"),
    # Of a model that isn't finite only a run tells what perplexity it has.
    *(("eval", m, "--text", "{text}", "--seq-len", "8") for m in MODELS if m != "{nan}"),
    ("eval", "{bert}", "--text", "{text}", "--seq-len", "8"),
    *(
        ("eval", "{model}", "--text", "{text}", option, value)
        for option, values in {
            "--samples": ["0", "-3", "x", "", "9" * 30],
            "--seq-len": ["0", "1", "-1", "x", "9" * 30, "100000"],
            "--batch-size": ["0", "-1", "x"],
            "--dtype": ["int8"],
            "--device": ["gpu", "cuda:99", ""],
        }.items()
        for value in values
    ),
    *(
        ("eval", "{model}", "--seq-len", "8", "--text", text)
        for text in ("", "{absent}.txt", "{latin}", "{empty}", "{short}", "{no_field}", "a\0b")
    ),
    *(
        ("calibrate", "{model}", *SMALL, "--out", "{new}", option, value)
        for option, values in {
            "--out": ["", " ", "{text}", "{texts}", "{absent}/bank", "{model}", "a\0b", "\udcff"],
            "--checkpoint": ["", " ", "{text}", "{texts}", "{text}/below", "{model}", "a\0b"],
            "--calibration": ["", "{absent}.txt", "{empty}", "{short}", "{binary}"],
            "--samples": ["0", "x", "", "1"],
            "--seq-len": ["0", "x", "100000"],
            "--criterion": ["best", ""],
        }.items()
        for value in values
    ),
    ("calibrate",),
    ("calibrate", "{model}"),
    ("calibrate", "{model}", *SMALL),
    ("calibrate", "--out", "{new}", *SMALL),
    ("calibrate", "{model}", *SMALL, "--out", "{new}", "--keep", "0.7"),
    ("calibrate", "{model}", *SMALL, "--out", "{new}", "--memory", "1GiB"),
    *(("calibrate", m, *SMALL, "--out", "{new}") for m in MODELS),
    ("merge",),
    ("merge", "{bank}"),
    ("merge", "{bank}", "-o", "{new}"),
    ("merge", "{bank}", "{bank}", "-o", "{new}"),
    ("merge", "{bank}", "{same}", "-o", "{new}"),
    ("merge", "{bank}", "{other}", "-o", "{new}"),
    *(("merge", "{bank}", bad, "-o", "{new}") for bad in BANKS),
    *(
        ("merge", "{bank}", "{more}", "-o", out)
        for out in ("", "{bank}", "{text}", "{texts}", "{absent}/b", "{nothing}", "a\0b")
    ),
    ("merge", "{bank}", "{more}", "-o", "{text}", "--overwrite"),
    ("sweep",),
    ("sweep", "{model}"),
    ("sweep", "--bank", "{bank}"),
    *(("sweep", "{model}", "--bank", bad) for bad in [*BANKS, "{other}"]),
    *(("sweep", m, "--bank", "{bank}") for m in MODELS),
    *(
        ("sweep", "{model}", "--bank", "{bank}", *more)
        for more in (
            ("--keep", "0"),
            ("--keep", "1.5", "0.8"),
            ("--keep", "0.8", "0.8"),
            ("--keep",),
            ("--keep", "x"),
            ("--keep", "0.001"),
            ("--samples", "8"),
            ("--certify", "4"),
            ("--keep-hidden", "0.9"),
            ("--out", "{text}"),
            ("--out", "{model}/config.json"),
            ("--eval", "{absent}.txt"),
            ("--dtype", "bfloat16"),
            ("--checkpoint", "{new}"),
        )
    ),
    *(("prune", "{model}", "--bank", bad, "--out", "{new}") for bad in [*BANKS, "{other}"]),
    *(
        ("prune", "{model}", "--bank", "{bank}", "--out", "{new}", *more)
        for more in (
            ("--calibration", "{text}"),
            ("--samples", "8"),
            ("--certify", "4"),
            ("--keep-hidden", "0.9"),
            ("--max-memory", "4GiB"),
            ("--dry-run",),
            ("--dtype", "bfloat16"),
        )
    ),
    *(
        ("prune", "{model}", *SMALL, "--out", "{new}", *more)
        for more in (
            *(("--max-memory", size) for size in ("", "12", "GiB", "-1GiB", "0GiB", "1MiB", "x")),
            ("--max-memory", "4GiB", "--memory", "1GiB"),
            ("--max-memory", "4GiB", "--criterion", "taylor"),
            ("--max-memory", "4GiB", "--keep-hidden", "0.9"),
            ("--max-memory", "4GiB", "--of", "latency"),
            ("--max-memory", "4GiB", "--device", "auto"),
            ("--max-memory", "4GiB", "--calibration", "self"),
            *(
                ("--checkpoint", folder)
                for folder in ("", "{text}", "{texts}", "{text}/below", "{model}", "a\0b")
            ),
            ("--checkpoint", "{new}-c", "--of", "latency"),
            ("--checkpoint", "{new}-c", "--keep", "0.001"),
            ("--checkpoint", "{new}-c", "--max-memory", "1MiB"),
        )
    ),
    ("resume",),
    *(("resume", f) for f in ("", "{absent}", "{nothing}", "{text}", "{model}", "{jobs}", "a\0b")),
    ("resume", "{nothing}", "{nothing}"),
    ("resume", "{nothing}", "--keep", "0.7"),
    ("families", "extra"),
    ("families", "--bogus"),
    *(("families", "--suggest", m) for m in MODELS if m not in ("{nan}", "{bare}")),
    ("verify",),
    *(("verify", folder) for folder in ("", " ", "{absent}", "{model}", "{text}", "{nothing}")),
    ("verify", "a\0b"),
    ("verify", "{model}", "--device", "gpu"),
    ("verify", "{model}", "--bogus"),
    *((name,) for name in ("report", "compare", "bench")),
    *(
        (name, folder)
        for name in ("report", "compare")
        for folder in ("", " ", "{absent}", "{model}", "{text}", "{nothing}", "a\0b")
    ),
    ("report", "{model}", "{model}"),
    ("report", "{model}", "-o", ""),
    ("report", "{model}", "-o", "{text}"),
    ("compare", "{model}", "-o", "{absent}/x.html"),
    ("bench", "{model}"),
    *(
        ("bench", "{model}", "--against", "{model}", option, value)
        for option, values in {
            "--rounds": ["0", "-1", "x", "9" * 30],
            "--batch": ["0", "x", ""],
            "--prompt-length": ["0", "x"],
            "--new-tokens": ["0", "x"],
            "--threads": ["0", "x"],
            "--dtype": ["int8"],
            "--device": ["gpu", "cuda:99", ""],
            "--out": ["", "{text}", "{texts}", "{absent}/x.json", "a\0b"],
        }.items()
        for value in values
    ),
]


def lines() -> list[Line]:
    """Return every command line, with names of inputs still in braces."""
    found = []
    for option, values in VALUES.items():
        for value in values:
            job = {"--calibration": "{text}", "--out": "{new}", "--seq-len": "8", "--samples": "8"}
            job[option] = value
            found.append(("prune", "{model}", *itertools.chain(*job.items())))
    valid = ("--calibration", "{text}", "--out", "{new}", "--seq-len", "8", "--samples", "8")
    found += [("prune", "{model}", *valid, *more) for more in ADDED]
    found += [("prune", model, *valid) for model in MODELS]
    return [*found, *OTHERS]
