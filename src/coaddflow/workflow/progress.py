"""What a run says while it goes on: how far it is, how much time is left, and when interrupted.

Snakemake writes its messages with Python's logging; a handler listens to them, and nothing of
Snakemake's is replaced.
"""

import logging
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from snakemake_interface_logger_plugins.common import LogEvent

_SECONDS_BETWEEN_LINES = 30.0
_INTERRUPTED = "Terminating processes on user request"
"""How Snakemake begins its message after Ctrl-C."""
_ERRORS_OF_JOBS = ("RuleException", "CalledProcessError")


class Progress(logging.Handler):
    """Prints how many jobs are done and about how long the others take.

    Parameters
    ----------
    say : callable, optional
        Takes a line for the user; None: nothing is printed.
    clock : callable
        Returns the time in seconds.

    Attributes
    ----------
    done, total : int
        Jobs that have ended well, and all.
    interrupted : bool
        Whether the user has pressed Ctrl-C.
    """

    def __init__(
        self, say: Callable[[str], None] | None, clock: Callable[[], float] = time.monotonic
    ):
        super().__init__(logging.INFO)
        self._cost: Mapping[str, float] = {}
        self._say, self._clock = say, clock
        self._begun = self._said = clock()
        self._work_done, self._work = 0.0, 0.0
        self.done = self.total = 0
        self.interrupted = False

    def plan(self, jobs: Mapping[str, int], cost: Mapping[str, float]) -> None:
        """Begin with the number of jobs of each rule that will run, and the CPU seconds of one."""
        self._begun = self._said = self._clock()
        self._cost = cost
        self.total = sum(jobs.values())
        self._work = sum(self._cost_of(rule) * number for rule, number in jobs.items())

    def emit(self, record: logging.LogRecord) -> None:
        """Take a message of Snakemake."""
        if getattr(record, "event", None) == LogEvent.JOB_FINISHED:
            self._finish(record.getMessage().partition("(Rule: ")[2].rstrip(")"))

    def passes(self, record: logging.LogRecord) -> bool:
        """Return whether a message is worth showing: not what Ctrl-C does to running jobs.

        Called before the message is printed.
        """
        if record.getMessage().startswith(_INTERRUPTED):
            self.interrupted = True
            # a second Ctrl-C would break off the ending of jobs and the removal of locks
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not self.interrupted or record.levelno < logging.ERROR:
            return True
        of_a_job = getattr(record, "exception", "") in _ERRORS_OF_JOBS
        return getattr(record, "event", None) == LogEvent.ERROR and not of_a_job

    def _finish(self, rule: str) -> None:
        self.done += 1
        self._work_done += self._cost_of(rule)
        now = self._clock()
        if self._say is None or now - self._said < _SECONDS_BETWEEN_LINES:
            return
        self._said = now
        self._say(f"coaddflow: {self.done} of {self.total} jobs done{self._time_left(now)}")

    def _time_left(self, now: float) -> str:
        left = self._work - self._work_done
        if left <= 0 or self._work_done <= 0:
            return ""
        return f", about {duration((now - self._begun) * left / self._work_done)} left"

    def _cost_of(self, rule: str) -> float:
        return self._cost.get(rule, 1.0)


def plan_until_interrupted() -> None:
    """Let Ctrl-C end the planning of a run with one line; called when planning begins.

    Snakemake shows a traceback until the first job has begun.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_planning)


def _end_planning(number: int, _frame: object) -> None:
    to_user("coaddflow: interrupted while planning: nothing was changed; the same command again")
    raise SystemExit(128 + number)


def follow(progress: Progress, workflow: Any, cost: Mapping[str, float]) -> None:
    """Let `progress` hear the messages of a run; called when it begins.

    Parameters
    ----------
    progress : Progress
        What prints how far the run is.
    workflow : snakemake.workflow.Workflow
        The run.
    cost : mapping of str to float
        CPU seconds of a job of each rule.
    """
    if signal.getsignal(signal.SIGINT) is _end_planning:
        # from here on it is Snakemake's to end jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)
    progress.plan(Counter(job.rule.name for job in workflow.dag.needrun_jobs()), cost)
    logger = logging.getLogger("snakemake.logging")
    logger.addHandler(progress)
    logger.addFilter(progress.passes)


def duration(seconds: float) -> str:
    """Return a time in words, such as ``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{max(10 * round(seconds / 10), 10)} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def to_user(line: str) -> None:
    """Print a line for the user."""
    print(line, file=sys.stderr)
