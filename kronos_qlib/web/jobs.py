"""Jobs: a bounded queue, one thread that answers what waits, and answers that are kept by a digest of the question."""

import asyncio
import logging
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from kronos_qlib.web.problems import Problem
from kronos_qlib.web.schema import State

logger = logging.getLogger("qlib.KronosWeb")
ENDED = ("done", "failed", "cancelled")
BATCH = 16  # jobs that are answered together
SHORTEST = 0.05  # seconds between two changes that a listener is told of


class Cancelled(Exception):
    """All jobs of a batch were cancelled, or the queue was closed."""


class Report(Protocol):
    """Called with the share that is done, and with what is known so far of each answer, where something is."""

    def __call__(self, share: float, partial: Sequence[dict[str, Any]] | None = None) -> None:
        """Tell those who wait. Raises Cancelled when nobody waits any more."""


Work = Callable[[Sequence[Any], Report], Sequence[Any]]
"""Answers several questions of a group at once."""


@dataclass(frozen=True)
class Task:
    """A question to the thread.

    digest: of all that decides the answer; None: it is answered anew each time. group: questions of equal groups are
    answered together; None: alone. payload: the question as `work` takes it. question: as the user asked it. lasting:
    whether an answer may be given to the same question again.
    """

    kind: str
    digest: str | None
    group: Hashable | None
    payload: Any
    work: Work | None
    question: dict[str, Any]
    lasting: Callable[[dict[str, Any]], bool] = lambda answer: True


@dataclass
class Job:
    """A question that waits, is being answered or has been; `version` counts its changes."""

    id: str
    task: Task
    state: State = "queued"
    progress: float = 0.0
    seconds: float | None = None
    partial: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    problem: dict[str, Any] | None = None
    version: int = 0
    listeners: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(default_factory=list)


class JobQueue:
    """Answers questions one batch after the other in a thread of its own.

    Args:
        waiting: jobs that may wait; more are refused.
        answers: that are kept, the last used ones.
    """

    def __init__(self, name: str, waiting: int, answers: int) -> None:
        self._most_waiting, self._most_answers = waiting, answers
        self._condition = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._answers: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._running: list[Job] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many jobs are being answered."""
        return len(self._running)

    def submit(self, task: Task) -> Job:
        """Add a job; one whose answer is known is done at once. Raises Problem, 429, if too many wait."""
        job = Job(secrets.token_urlsafe(12), task)
        with self._condition:
            if self._is_answered(job):
                pass
            elif len(self._waiting) >= self._most_waiting:
                raise Problem(
                    429,
                    f"{len(self._waiting)} jobs wait already, which is the most here; ask again in a few seconds.",
                    {"Retry-After": "5"},
                )
            else:
                self._waiting.append(job)
                self._condition.notify()
            self._jobs[job.id] = job
            self._forget()
        return job

    def _is_answered(self, job: Job) -> bool:
        """Give a job the answer to the same question, if it is kept."""
        answer = None if job.task.digest is None else self._answers.get(job.task.digest)
        if job.task.digest is None or answer is None:
            return False
        self._answers.move_to_end(job.task.digest)
        self._end(job, "done", result=answer, seconds=0.0)
        return True

    def job(self, job_id: str) -> Job:
        """Return a job by its id. Raises Problem if there is none."""
        job = self._jobs.get(job_id)
        if job is None:
            raise Problem(404, "There is no such job; jobs are forgotten when the server ends, or when many follow.")
        return job

    def cancel(self, job_id: str) -> Job:
        """Cancel a job that waits or is being answered; one that has ended stays as it is."""
        job = self.job(job_id)
        with self._condition:
            if job.state not in ENDED:
                with suppress(ValueError):
                    self._waiting.remove(job)
                self._end(job, "cancelled")
        return job

    def place(self, job: Job) -> int | None:
        """Return how many jobs wait before one that waits."""
        with self._condition:
            return self._waiting.index(job) if job in self._waiting else None

    def run_waiting(self) -> None:
        """Answer what waits now, from within a longer job's work: between two of its parts."""
        for _ in range(self._most_waiting):
            batch = self._take(long=False)
            if not batch:
                return
            self._answer(batch)

    async def changes(self, job: Job, seconds: float) -> AsyncIterator[bool]:
        """Yield whenever a job has changed, and False when it has not for so many seconds, until it has ended."""
        event, loop = asyncio.Event(), asyncio.get_running_loop()
        entry = (loop, event)
        job.listeners.append(entry)
        seen = -1
        try:
            while True:
                version = job.version
                ended = job.state in ENDED  # what it ended with was known before
                yield ended or version != seen
                seen = version
                if ended:
                    return
                await asyncio.sleep(SHORTEST)
                if job.version == seen:
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(event.wait(), seconds)
                event.clear()
        finally:
            job.listeners.remove(entry)

    def close(self) -> None:
        """End the thread: what is being answered is cancelled at its next step."""
        with self._condition:
            self._closed = True
            for job in [*self._waiting, *self._running]:
                self._end(job, "cancelled")
            self._waiting.clear()
            self._condition.notify_all()
        self._thread.join(10)

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._waiting or self._closed):
                    self._condition.wait()
                if self._closed:
                    return
            batch = self._take(long=True)
            if batch:
                self._answer(batch)

    def _take(self, long: bool) -> list[tuple[Job, Task]]:
        """Take the first job that waits and others of its group; with `long` also a job that is alone in its group."""
        with self._condition:
            for job in [job for job in self._waiting if self._is_answered(job)]:  # since it was asked
                self._waiting.remove(job)
            first = next((job for job in self._waiting if long or job.task.group is not None), None)
            if first is None:
                return []
            group = first.task.group
            batch = [first] if group is None else [job for job in self._waiting if job.task.group == group][:BATCH]
            for job in batch:
                self._waiting.remove(job)
                self._change(job, state="running")
            self._running += batch
            return [(job, job.task) for job in batch]  # one that is cancelled lets go of its task

    def _answer(self, taken: list[tuple[Job, Task]]) -> None:
        batch = [job for job, _ in taken]
        first = {_key(job): task for job, task in taken}  # the same question asked twice is answered once
        started = time.monotonic()

        def report(share: float, partial: Sequence[dict[str, Any]] | None = None) -> None:
            if self._closed or all(job.state == "cancelled" for job in batch):
                raise Cancelled
            known = {} if partial is None else dict(zip(first, partial))
            for job in batch:
                if job.state == "running" and known:
                    self._change(job, partial=known[_key(job)])
                if job.state == "running" and share - job.progress >= 0.01:
                    self._change(job, progress=min(share, 1.0))

        problem, answers = None, {}
        try:
            tasks = list(first.values())
            assert tasks[0].work is not None
            answers = dict(zip(first, tasks[0].work([task.payload for task in tasks], report)))
        except Cancelled:
            pass
        except Problem as error:
            problem = error.content()
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            logger.warning(f"a {batch[0].task.kind} failed: {type(error).__name__}: {error}")
            text = str(error) if isinstance(error, ValueError) else f"It failed ({type(error).__name__})."
            problem = Problem(422 if isinstance(error, ValueError) else 500, text).content()
        except Exception:
            logger.exception(f"a {batch[0].task.kind} failed")
            problem = Problem(500, "It failed; the server's log says why.").content()
        seconds = time.monotonic() - started
        with self._condition:
            for key, answer in answers.items():
                if first[key].digest == key and first[key].lasting(answer):
                    self._answers[key] = answer
            while len(self._answers) > self._most_answers:
                self._answers.popitem(last=False)
            for job in batch:
                self._running.remove(job)
                answer = answers.get(_key(job))
                if job.state == "cancelled":
                    continue
                if answer is not None:
                    self._end(job, "done", result=answer, seconds=seconds)
                elif problem is not None:
                    self._end(job, "failed", problem=problem)
                else:
                    self._end(job, "cancelled")

    def _end(self, job: Job, state: State, **values: Any) -> None:
        """End a job; its state comes last, for readers take no lock. What it was to be answered from is let go."""
        task = replace(job.task, payload=None, work=None)
        self._change(job, task=task, progress=1.0 if state == "done" else job.progress, partial=None, **values)
        self._change(job, state=state)

    def _change(self, job: Job, **values: Any) -> None:
        for name, value in values.items():
            setattr(job, name, value)
        job.version += 1
        for loop, event in list(job.listeners):
            with suppress(RuntimeError):  # its loop has ended
                loop.call_soon_threadsafe(event.set)

    def _forget(self) -> None:
        """Forget the oldest jobs that have ended, with their answers."""
        ended = [key for key, job in self._jobs.items() if job.state in ENDED]
        for key in ended[: max(0, len(ended) - self._most_answers)]:
            self._jobs.pop(key, None)


def _key(job: Job) -> str:
    """Return what jobs of the same question have in common."""
    return job.task.digest or job.id
