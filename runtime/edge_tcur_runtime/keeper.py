"""Keeps the progress of a run: checkpoints at intervals and at a signal, and stops when it is asked to.

At SIGTERM a thread saves what the last finished update left, at once, also while a long pass is being
computed; the run itself ends after that pass. Nothing here knows what is trained.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from edge_tcur_runtime.checkpoint import Checkpoints, Progress
from edge_tcur_runtime.errors import BadInputError, EdgeError, IncompatibleError, PausedError
from edge_tcur_runtime.settings import Gate, KeepSettings

_HINT = "run the same command again to go on"
GATE_SECONDS = 5.0  # between two looks at the gates


def open_keeper(settings: KeepSettings, identity: Mapping[str, str]) -> Keeper:
    """The keeper of the run that `identity` describes (`edge_tcur_runtime.checkpoint.identify`)."""
    checkpoints = None if settings.directory is None else Checkpoints(settings.directory, identity)
    return Keeper(checkpoints, seconds=settings.seconds, gates=settings.gates, resume=settings.resume)


def clear_checkpoints(settings: KeepSettings) -> None:
    """Removes the checkpoints of a run whose result was put away.

    Raises:
        BadInputError, DiskError: see `Checkpoints.remove`.
    """
    if settings.directory is not None:
        Checkpoints(settings.directory, {}).remove()


class Keeper:
    """Saves the progress of one run, and ends the run where a signal or a gate says so.

    Args:
        checkpoints: where to save; None keeps nothing.
        seconds: between two checkpoints; 0 saves after every update.
        gates: each says why the run must wait for another time, or None.
        resume: see `KeepSettings`.
    """

    def __init__(
        self,
        checkpoints: Checkpoints | None = None,
        *,
        seconds: float = 30.0,
        gates: Sequence[Gate] = (),
        resume: str = "auto",
    ) -> None:
        self._checkpoints, self._seconds, self._gates = checkpoints, seconds, tuple(gates)
        self._resume = resume
        self._notes: list[str] = []
        self._lock = threading.RLock()
        self._latest: Progress | None = None
        self._saved: Progress | None = None
        self._saved_at = time.monotonic()
        self._looked_at = -GATE_SECONDS
        self._reason: str | None = None
        self._failure: EdgeError | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the checkpoints that were found."""
        return tuple(self._notes)

    def resume(self) -> Progress | None:
        """The progress to go on from, or None. Called while `listening`.

        Raises:
            IncompatibleError: ``yes``, and the checkpoint is of another run; or written by a newer version.
            BadInputError: ``yes``, and there is no whole checkpoint; or it cannot be read.
            DiskError: checkpoints that are given up cannot be removed.
        """
        if self._checkpoints is None:
            return None
        progress = None
        if self._resume != "no":
            try:
                progress = self._checkpoints.load()
            except IncompatibleError as error:
                if self._resume == "yes":
                    raise
                self._notes.append(f"{error.message}; it is given up, this run starts over")
            self._notes += self._checkpoints.warnings
        if progress is None:
            if self._resume == "yes":
                raise BadInputError(
                    "there is no checkpoint to go on from",
                    where=str(self._checkpoints.directory),
                    hint="leave --resume out",
                )
            self._checkpoints.clear()
        self._latest = self._saved = progress
        return progress

    def reached(self, progress: Progress) -> None:
        """Takes the progress after an update, and saves it where the last checkpoint is old enough.

        Raises:
            DiskError: it could not be written; the checkpoint before it is whole.
        """
        self._latest = progress
        if time.monotonic() - self._saved_at >= self._seconds:
            self.save()

    def save(self) -> None:
        """Saves the latest progress, unless it is saved already.

        Raises:
            DiskError: it could not be written; the checkpoint before it is whole.
        """
        with self._lock:
            latest = self._latest
            if self._checkpoints is None or latest is None or latest is self._saved:
                return
            self._checkpoints.save(latest)
            self._saved, self._saved_at = latest, time.monotonic()

    def check(self) -> None:
        """Called after every pass.

        Raises:
            PausedError: a signal came or a gate closed; the latest progress is saved.
            DiskError: it should have been saved and could not be.
        """
        now = time.monotonic()
        if self._reason is None and now - self._looked_at >= GATE_SECONDS:
            self._looked_at = now
            self._reason = next((reason for gate in self._gates if (reason := gate()) is not None), None)
        if self._reason is None:
            return
        if self._failure is not None:
            raise self._failure
        self.save()
        steps = 0 if self._latest is None else self._latest.steps
        kept = "and kept" if self._checkpoints is not None else "but not kept"
        raise PausedError(f"{self._reason}: paused after {steps} updates, {kept}", hint=_HINT)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Saves at SIGTERM while the block runs; whatever ends the block, the progress is saved.

        Outside the main thread signals are left to the program.

        Raises:
            BadInputError: another process trains with these checkpoints.
        """
        main = threading.current_thread() is threading.main_thread()
        if self._checkpoints is not None:
            self._checkpoints.hold()
        try:
            with self._signals() if main else contextlib.nullcontext():
                try:
                    yield
                finally:
                    self.save()
        finally:
            if self._checkpoints is not None:
                self._checkpoints.release()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        receiver, sender = os.pipe()
        os.set_blocking(sender, False)
        before = signal.signal(signal.SIGTERM, lambda *_: None)  # without a handler nothing is sent
        old = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(receiver,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(old)
            signal.signal(signal.SIGTERM, before)
            os.close(sender)
            watcher.join()
            os.close(receiver)

    def _watch(self, receiver: int) -> None:
        while numbers := os.read(receiver, 64):
            if signal.SIGTERM in numbers:
                self._reason = "SIGTERM"
                try:
                    self.save()
                except EdgeError as error:
                    self._failure = error
