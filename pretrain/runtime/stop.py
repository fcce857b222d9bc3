"""Requests to end a run: a signal, or the clock."""

import os
import signal
import time

STOPPED = 75  # exit code of a run that was asked to stop: the same command goes on


class StopRequest:
    """SIGTERM, SIGUSR1 or the clock ask for a stop after the step in hand; a second signal stops at once.

    A signal within seconds of the first belongs to it: a scheduler signals the processes and their parents,
    which pass it on.
    """

    CLOCK, SIGNAL = 1, 2
    SAME_SIGNAL_SECONDS = 2.0

    def __init__(self, max_minutes: float):
        self.reason = ""
        self._deadline = time.monotonic() + max_minutes * 60 if max_minutes else float("inf")
        self._first_signal = float("inf")
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._received)

    def _received(self, number: int, frame: object) -> None:
        if time.monotonic() - self._first_signal > self.SAME_SIGNAL_SECONDS:
            os._exit(128 + number)
        self._first_signal = min(self._first_signal, time.monotonic())
        self.reason = signal.Signals(number).name

    def requested(self) -> int:
        """0 continue, CLOCK the time limit is over, SIGNAL a signal came."""
        if not self.reason and time.monotonic() > self._deadline:
            self.reason = "train.max_minutes"
        if not self.reason:
            return 0
        return self.CLOCK if self.reason == "train.max_minutes" else self.SIGNAL
