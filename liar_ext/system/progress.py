"""Progress: a bar for each stage, or one line for a whole job with the time left; or log lines."""

from __future__ import annotations

import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from tqdm.auto import tqdm

Step = TypeVar("Step")
# Called with the stage, steps that are done, steps in all, and seconds left, if they are known.
OnProgress = Callable[[str, int, int | None, float | None], object]
EVERY, SHORTEST = 30.0, 0.1  # seconds between two lines of the log, and between looks at them
TITLES = {  # of stages, for people
    "blocks": "choosing blocks",
    "calibrate": "collecting activation statistics",
    "curves": "computing error curves",
    "evaluate": "evaluating",
    "experts": "ranking experts",
    "gaps": "solving around gaps",
    "gradients": "computing gradients",
    "latency": "measuring latency",
    "layerwise": "solving layer by layer",
    "reconstruct": "solving layers",
    "rescale": "fitting scales",
    "save": "writing blocks",
    "sensitivity": "measuring sensitivity",
    "tokens": "predicting tokens",
    "write": "generating text",
}
QUIETENED = (
    "transformers.integrations.heterogeneity.configuration_utils",
    "transformers.modeling_utils",
    "accelerate.big_modeling",
)
_PLAIN: ContextVar[bool] = ContextVar("liar_ext_plain", default=False)
_JOB: ContextVar[Timeline | None] = ContextVar("liar_ext_job", default=None)
_SHOWN: ContextVar[bool | OnProgress] = ContextVar("liar_ext_shown", default=False)


class Bar(tqdm):
    """A bar of tqdm on a terminal, or the line of the job; elsewhere lines of the log.

    It is shown within :func:`showing_bars`, or if ``shown``; where that is a function, it is called
    after each step instead. The log gets a line every :data:`EVERY` seconds. ``desc`` names the
    stage, up to a comma.
    """

    # Of a bar that Ctrl-C stops in its making, which is closed all the same.
    job, logs, disable, _ended = None, False, True, threading.Event()

    def __init__(
        self, *args: object, shown: bool | OnProgress = False, desc: str = "", **settings: object
    ) -> None:
        self.job, shown = _JOB.get(), shown or _SHOWN.get()
        file = settings.get("file") or sys.stderr
        self.told = shown if callable(shown) else None
        self.logs = bool(shown) and bool(self.told or _PLAIN.get() or not file.isatty())
        self.logged = time.monotonic()
        settings.setdefault("leave", self.job is None)
        self.number = self.job.begin(desc) if shown and self.job is not None else ""
        super().__init__(*args, disable=not shown or self.logs, desc=desc, **settings)
        self.desc, self._ended = desc, threading.Event()
        if self.logs and self.told is None:  # a step may take longer than two lines are apart
            ticking = weakref.ref(self), self._ended
            threading.Thread(target=_tick, args=ticking, daemon=True).start()

    def __str__(self) -> str:
        if self.job is None:
            return super().__str__()
        return self.job.line(self.number, self.desc, self.n, self.total)

    def __iter__(self) -> Iterator:
        try:
            for step in self.iterable:
                yield step
                self.update()
        finally:
            self.close()

    def update(self, n: int = 1) -> bool | None:
        """Note steps that are done; log them if it is time."""
        if not self.logs:
            return super().update(n)
        self.n += n
        if self.told is not None:
            left = None if self.job is None else self.job.left(self.desc, self.n)
            self.told(_name(self.desc), self.n, self.total, left)
            return
        self.log()

    def log(self) -> float:
        """Write a line into the log if it is time; return the seconds until it is."""
        now, last = time.monotonic(), self.job or self
        if now - last.logged >= EVERY:
            last.logged = now
            of = "" if self.total is None else f"/{self.total}"
            line = f"{_title(self.desc)} {self.n}{of}" if self.job is None else str(self)
            logging.getLogger("liar_ext").info(line)
        return EVERY - (now - last.logged)

    def close(self) -> None:
        """Take the line away; the stage has come so far."""
        if self.job is not None and (self.logs or not self.disable):
            self.job.advance(self.desc, self.n)
        self.logs = False
        self._ended.set()
        super().close()


def _tick(bar: weakref.ref[Bar], ended: threading.Event) -> None:
    """Let a bar log in time until it has ended or is gone."""
    left = EVERY
    while not ended.wait(max(left, SHORTEST)) and (open_bar := bar()) is not None:
        left = open_bar.log()
        del open_bar


def showing_bars(progress: bool | OnProgress) -> AbstractContextManager[None]:
    """Show bars that are made in the context, or let them call a function; else all is as before.

    It is how ``progress`` of a call reaches all that the call does.
    """
    return _within(_SHOWN, progress or _SHOWN.get())


def hiding_bars() -> AbstractContextManager[None]:
    """Show no bars that are made in the context: what it does is a step of another bar."""
    return _within(_SHOWN, False)


def shows_bars() -> bool:
    """Tell whether bars that are made here are shown."""
    return bool(_SHOWN.get())


def plain_lines(plain: bool) -> AbstractContextManager[None]:
    """Let bars be lines of the log, also on a terminal, if ``plain``."""
    return _within(_PLAIN, plain)


@contextmanager
def _within(variable: ContextVar, value: object) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def spare(stage: str, steps: int | None = None) -> None:
    """Tell the job that is shown that steps of a stage, or all, were done before it was stopped.

    A bar counts them nevertheless.
    """
    job = _JOB.get()
    known = None if job is None else job.stages.get(_name(stage))
    if known is not None:
        known.spared = known.steps if steps is None else known.spared + steps


@dataclass
class Stage:
    """A stage of a job."""

    steps: int  # of all bars of its name
    work: float  # of all steps, in a unit that all stages share
    done: int = 0  # steps, of bars that are closed
    spared: int = 0  # steps that take no time, done or not


class Timeline:
    """How far a job is: counted work that is done, by the time that it took.

    A bar of a stage that isn't in ``stages`` counts as no work. ``bars`` names the stages of all
    bars, in order; by default each stage has one.
    """

    def __init__(
        self,
        stages: Mapping[str, Stage],
        bars: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stages, self.clock = dict(stages), clock
        self.start, self.logged = clock(), time.monotonic()
        self.bars, self.begun = list(bars or stages), 0

    def shown(self) -> AbstractContextManager[None]:
        """Let bars that are made in the context be the line of this job."""
        return _within(_JOB, self)

    def begin(self, stage: str) -> str:
        """Return the number of a bar that begins, ``[3/5]``; of one not expected ``prune``.

        Bars that were left out, since a checkpoint has what they do, count as well.
        """
        name = _name(stage)
        if name not in self.bars[self.begun :]:
            return "prune"
        self.begun = self.bars.index(name, self.begun) + 1
        return f"[{self.begun}/{len(self.bars)}]"

    def advance(self, stage: str, steps: int) -> None:
        """Note steps that are done."""
        known = self.stages.get(_name(stage))
        if known is not None:
            known.done += steps

    def left(self, stage: str = "", steps: int = 0) -> float | None:
        """Return the seconds left, ``steps`` of a stage being done beside what is noted.

        ``gone · (work − done) / done``, what is spared being neither; None before any is done.
        """
        work = done = 0.0
        for name, each in self.stages.items():
            so_far = each.done + (steps if name == _name(stage) else 0)
            to_do = max(each.steps - each.spared, 0)
            step = each.work / max(each.steps, 1)
            work += step * to_do
            done += step * min(max(so_far - each.spared, 0), to_do)
        return (self.clock() - self.start) * (work - done) / done if done else None

    def line(self, number: str, stage: str, steps: int, total: int | None) -> str:
        """Return ``[3/5] measuring sensitivity 37/60 · 4:10 elapsed, about 3:30 remaining``."""
        of = "" if total is None else f"/{total}"
        elapsed = _shown(self.clock() - self.start)
        said = f"{number} {_title(stage)} {steps}{of} · {elapsed} elapsed"
        left = self.left(stage, steps)
        return said if left is None else f"{said}, about {_shown(left)} remaining"


class Clock:
    """Seconds by stage; stages of one name add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the seconds of the context for a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    def each(self, stage: str, steps: Iterable[Step]) -> Iterator[Step]:
        """Yield the steps; what getting them takes is of the stage."""
        steps, step = iter(steps), None
        while True:
            with self(stage):
                step = next(steps, None)
            if step is None:
                return
            yield step


def _name(stage: str) -> str:
    return stage.partition(",")[0]


def _title(stage: str) -> str:
    """Return a stage in words, with what follows its name."""
    name = _name(stage)
    return TITLES.get(name, name) + stage.removeprefix(name)


def _shown(seconds: float) -> str:
    """Return 4:10, or 1:04:10."""
    return tqdm.format_interval(seconds).removeprefix("0")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back logs of sizes that differ by layer, as is meant, and of weights refused here."""
    loggers = [logging.getLogger(name) for name in QUIETENED]
    for logger in loggers:
        logger.addFilter(_is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_news)


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep back the progress bars of transformers; afterwards they are as they were."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def obedient_bar() -> AbstractContextManager:
    """Let the bar of a GGUF file obey the switch of transformers' other bars, which it ignores."""
    from unittest import mock

    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging as bars

    return mock.patch.object(reader, "tqdm", bars.tqdm, create=True)


def _is_news(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    refused = "LOAD REPORT" in text and any(word in text for word in ("MISSING", "MISMATCH"))
    offloaded = "were offloaded to the" in text  # as was asked for
    return not (refused or offloaded or "per-layer attribute" in text)
