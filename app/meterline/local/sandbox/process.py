"""The sandbox as a child process, for tests and tools that want one of their own.

with SandboxProcess.start(state_dir) as sandbox:
    stripe.StripeClient(SANDBOX_API_KEY, base_addresses={"api": sandbox.url})
"""

from __future__ import annotations

import select
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from meterline.errors import UserError

__all__ = ["SandboxProcess"]

START_TIMEOUT_S = 60.0
"""It is up in a second; a journal of a million events and a busy machine take longer."""
STOP_TIMEOUT_S = 15.0
"""Longer than the server itself waits for its clients."""


class SandboxProcess:
    """A running sandbox. Leaving the `with` block stops it and keeps its state."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self._process = process
        self.url = url

    @classmethod
    def start(
        cls, state_dir: Path, *, port: int = 0, clock: str | None = None, grace_h: float | None = None
    ) -> SandboxProcess:
        """Start one and wait until it answers; port 0 takes any free port.

        Args:
            clock: where a new state's time begins and stands; None: the real time.
            grace_h: hours an invoice stays a draft; None: as it was.

        Raises:
            UserError: it ended at once; its own message is on standard error.
        """
        options = ["--port", str(port), "--state-dir", str(state_dir)]
        options += [] if clock is None else ["--clock", clock]
        options += [] if grace_h is None else ["--grace", str(grace_h)]
        process = subprocess.Popen(  # noqa: S603 - our own module, no shell
            [sys.executable, "-m", "meterline.local.sandbox", *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
        line = process.stdout.readline() if ready else ""
        if not line:
            process.kill()
            process.wait()
            process.stdout.close()
            raise UserError(f"The Stripe sandbox didn't start within {START_TIMEOUT_S:.0f} s.")
        return cls(process, line.split()[-1])

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit code; SIGKILL follows if it hangs."""
        assert self._process.stdout is not None
        self._process.send_signal(signal_number)
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
