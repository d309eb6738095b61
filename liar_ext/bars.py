"""Progress on a terminal: a bar for each stage, or one line for a whole job with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from tqdm.auto import tqdm

Step = TypeVar("Step")
# Called with the stage, steps that are done, steps in all, and seconds left, if they are known.
OnProgress = Callable[[str, int, int | None, float | None], object]
_JOB: ContextVar[Timeline | None] = ContextVar("liar_ext_job", default=None)
_TOLD: ContextVar[OnProgress | None] = ContextVar("liar_ext_told", default=None)


class Bar(tqdm):
    """A bar of tqdm: silent where there is no terminal, the line of the job where there is one.

    Within :func:`told` it isn't shown: a function is called after each step instead.
    A notebook shows bars of its own. Parameters are those of tqdm; ``desc`` names the stage, and
    what follows a comma in it isn't part of the name.
    """

    def __init__(
        self, *args: object, disable: bool = False, desc: str = "", **settings: object
    ) -> None:
        self.job = _JOB.get()
        self.told = None if disable else _TOLD.get()
        settings.setdefault("leave", self.job is None)
        super().__init__(
            *args, disable=True if disable or self.told else None, desc=desc, **settings
        )
        self.desc = desc

    def __str__(self) -> str:
        if self.job is None:
            return super().__str__()
        return self.job.line(self.desc, self.n, self.total)

    def __iter__(self) -> Iterator:
        """Yield the steps."""
        if self.told is None:
            yield from super().__iter__()
            return
        try:
            for step in self.iterable:
                yield step
                self.update()
        finally:
            self.close()

    def update(self, n: int = 1) -> bool | None:
        """Note steps that are done."""
        if self.told is None:
            return super().update(n)
        self.n += n
        left = None if self.job is None else self.job.left(self.desc, self.n)
        self.told(_name(self.desc), self.n, self.total, left)

    def close(self) -> None:
        """Take the line away; the stage has come so far."""
        if self.job is not None and (self.told or not self.disable):
            self.job.advance(self.desc, self.n)
        self.told = None
        super().close()


@contextmanager
def told(progress: bool | OnProgress) -> Iterator[None]:
    """Let bars that are made in the context call a function, if it is one."""
    token = _TOLD.set(progress if callable(progress) else _TOLD.get())
    try:
        yield
    finally:
        _TOLD.reset(token)


def spare(stage: str, steps: int | None = None) -> None:
    """Let the job that is shown know that steps of a stage needn't be done; all of them if None.

    A bar counts them nevertheless. They are of a job that was stopped, and take no time now.
    """
    job = _JOB.get()
    if job is not None:
        job.spare(stage, steps)


@dataclass
class Stage:
    """A stage of a job.

    Parameters
    ----------
    steps : int
        How many there will be, of all bars of its name.
    work : float
        What they take together, in a unit that all stages share.
    done : int
        Steps that are done, of bars that are closed.
    spared : int
        Steps of these, and to come, that take no time.
    """

    steps: int
    work: float
    done: int = 0
    spared: int = 0


class Timeline:
    """How far a job is: counted work that is done, by the time that it took.

    Parameters
    ----------
    title : str
        What the job is called.
    stages : mapping of str to Stage
        By name; one that isn't there counts as no work.
    clock : callable
        Seconds.
    """

    def __init__(
        self,
        title: str,
        stages: Mapping[str, Stage],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.stages, self.clock = title, dict(stages), clock
        self.start = clock()

    @contextmanager
    def shown(self) -> Iterator[Timeline]:
        """Let bars that are made in the context be the line of this job."""
        token = _JOB.set(self)
        try:
            yield self
        finally:
            _JOB.reset(token)

    def advance(self, stage: str, steps: int) -> None:
        """Note steps that are done."""
        known = self.stages.get(_name(stage))
        if known is not None:
            known.done += steps

    def spare(self, stage: str, steps: int | None) -> None:
        """Note steps that take no time."""
        known = self.stages.get(_name(stage))
        if known is not None:
            known.spared = known.steps if steps is None else known.spared + steps

    def left(self, stage: str = "", steps: int = 0) -> float | None:
        """Return the seconds left, ``steps`` of a stage being done beside what is noted.

        Time goes on as it did: ``gone · (work − done) / done``, what is spared being neither. None
        before any work is done.
        """
        work = done = 0.0
        for name, each in self.stages.items():
            so_far = each.done + (steps if name == _name(stage) else 0)
            to_do = max(each.steps - each.spared, 0)
            step = each.work / max(each.steps, 1)
            work += step * to_do
            done += step * min(max(so_far - each.spared, 0), to_do)
        return (self.clock() - self.start) * (work - done) / done if done else None

    def line(self, stage: str, steps: int, total: int | None) -> str:
        """Return what is shown: ``prune: sensitivity 37/60 · 4:10 gone, about 3:30 left``."""
        of = "" if total is None else f"/{total}"
        said = f"{self.title}: {stage} {steps}{of} · {_shown(self.clock() - self.start)} gone"
        left = self.left(stage, steps)
        return said if left is None else f"{said}, about {_shown(left)} left"


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


def _shown(seconds: float) -> str:
    """Return 4:10, or 1:04:10."""
    return tqdm.format_interval(seconds).removeprefix("0")
