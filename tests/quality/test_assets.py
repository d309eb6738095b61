"""Real texts and models of Python packages: what is held out, and what is made once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench import assets

ROOT = Path(__file__).parents[2]


def test_a_held_out_article_shares_neither_title_nor_body_with_the_others():
    articles = ["T1\n\nb1", "T2\n\nb2", "T1\n\nb3", "T4\n\nb4", "T5\n\nb5", "T6\n\nb4", "T7\n\nb7"]
    others, held_out = assets.hold_out(articles, 3)
    assert held_out == ["T1\n\nb1", "T4\n\nb4", "T7\n\nb7"]
    assert others == ["T2\n\nb2", "T5\n\nb5"]  # T1 by its title, b4 by its body


def test_articles_of_one_title_or_body_are_held_out_once():
    assert assets.distinct(["T\n\na", " T\n\nb", "U\n\na", "V\n\nc\n"]) == ["T\n\na", "V\n\nc"]


def test_missing_packages_say_what_to_do(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "assets.py", "texts"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("is missing; run: make demo\n")


def test_of_two_jobs_that_make_a_model_the_first_one_stays(tmp_path):
    folder = tmp_path / "assets" / "model"
    with assets.made_once(folder) as late:
        (late / "config.json").write_text("late")
        with assets.made_once(folder) as first:
            (first / "config.json").write_text("first")
    assert (folder / "config.json").read_text() == "first"
    assert list(folder.parent.iterdir()) == [folder]
