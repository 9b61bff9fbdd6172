"""Threads that take turns, so that only a few of many requests run Python code at a time.

A thread that waits for Python's interpreter lock looks for it every 5 ms. A thousand of them keep a core busy with
nothing else, and each has the lock as seldom as any: whatever the main thread does for the next client, it waits as
often as it makes a system call for all the others. So a request waits for its *turn* before it begins, and gives it
back while it waits for a model. What does that is ``waiting``; where no turns are taken, it does nothing.

A turn is not for ever: who knows what a plugin waits for, or how slowly a client sends its picture. What has not ended
after ``TURN_S`` goes on, but keeps nobody waiting any more.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Final

#: How long the work that has a turn may keep other work waiting.
TURN_S: Final = 0.05

Work = Callable[[], object]


class Turns:
    """Runs work in threads of its own, which are made when they are needed. Methods may be called from any thread.

    Args:
        n_at_once: how much of it has a turn at a time.
        max_threads: how much of it is under way at a time, what waits included.
    """

    def __init__(self, n_at_once: int, max_threads: int) -> None:
        self._n_at_once = n_at_once
        self._max_threads = max_threads
        self._lock = threading.Lock()
        self._urgent: deque[Work] = deque()
        self._patient: deque[Work] = deque()
        self._idle: list[_Thread] = []  # who was busy last is asked first: few threads do most of the work
        self._n_threads = 0
        self._at_turn: dict[_Thread, float] = {}  # since when, the longest first
        self._is_held = False
        self._is_shut = False

    def submit(self, work: Work, *, urgent: bool = False) -> None:
        """Run ``work`` when it has its turn, first come, first served, or at once where it is urgent."""
        with self._lock:
            (self._urgent if urgent else self._patient).append(work)
            self._hand_out()

    @property
    def is_free(self) -> bool:
        """Whether work would begin at once."""
        return not self._patient and len(self._at_turn) < self._n_at_once

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let nothing begin meanwhile but what is urgent."""
        self._is_held = True
        try:
            yield
        finally:
            with self._lock:
                self._is_held = False
                self._hand_out()

    def end_long_turns(self) -> float | None:
        """Count no longer what has been at its turn for too long.

        Returns:
            after how many seconds it is to be called again; None: not until there is work that waits.
        """
        with self._lock:
            if not self._patient and not self._urgent:
                return None
            now = monotonic()
            for thread, since in list(self._at_turn.items()):
                if since + TURN_S > now:
                    break
                del self._at_turn[thread]
            self._hand_out()
            return TURN_S if self._patient or self._urgent else None

    def _next(self) -> Work | None:
        if self._urgent:
            return self._urgent.popleft()
        if self._patient and not self._is_held and len(self._at_turn) < self._n_at_once:
            return self._patient.popleft()
        return None

    def _hand_out(self) -> None:
        while self._idle or self._n_threads < self._max_threads:
            if (work := self._next()) is None:
                return
            if self._idle:
                thread = self._idle.pop()
                thread.work = work
                self._at_turn[thread] = monotonic()
                thread.wake.release()
            else:
                thread = _Thread(self, work)
                try:
                    thread.start()
                except RuntimeError:  # the system has none left: one that there is already takes it when it is free
                    self._urgent.appendleft(work)
                    return
                self._n_threads += 1
                self._at_turn[thread] = monotonic()

    def shutdown(self, wait: bool = False) -> None:
        """Have the threads end that have nothing to do, and the others when they are done. Waits for none of them."""
        self._is_shut = True
        # It may be a signal's handler that calls, on the thread that has the lock. Whoever has it, the next thread that
        # is done has the others end.
        if self._lock.acquire(blocking=False):
            self._end_idle()
            self._lock.release()

    def _end_idle(self) -> None:
        while self._idle:
            self._idle.pop().wake.release()

    # Called by the threads

    def next_for(self, thread: _Thread) -> Work | None:
        """Wait for what a thread does next; None: it is to end."""
        with self._lock:
            self._at_turn.pop(thread, None)
            if (work := self._next()) is not None:
                self._at_turn[thread] = monotonic()
                return work
            thread.work = None
            self._idle.append(thread)
        if self._is_shut:  # not looked at before, since it may be since a moment
            with self._lock:
                self._end_idle()
        thread.wake.acquire()
        return thread.work

    def pause(self, thread: _Thread) -> None:
        with self._lock:
            self._at_turn.pop(thread, None)
            self._hand_out()

    def resume(self, thread: _Thread) -> None:
        """Take a turn again, even if that is one too many: what is nearly done goes before what has not begun."""
        with self._lock:
            self._at_turn[thread] = monotonic()


class _Thread(threading.Thread):
    def __init__(self, turns: Turns, work: Work) -> None:
        super().__init__(name="request", daemon=True)
        self.turns = turns
        self.work: Work | None = work
        self.wake = threading.Lock()  # released when there is work for a thread that was idle
        self.wake.acquire()

    def run(self) -> None:
        _own.thread = self
        work = self.work
        while work is not None:
            work()
            work = self.turns.next_for(self)


class _Own(threading.local):
    thread: _Thread | None = None


_own = _Own()


@contextmanager
def waiting() -> Iterator[None]:
    """Give back the calling thread's turn meanwhile, if it has one."""
    thread = _own.thread
    if thread is None:
        yield
        return
    thread.turns.pause(thread)
    try:
        yield
    finally:
        thread.turns.resume(thread)
