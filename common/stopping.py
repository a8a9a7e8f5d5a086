"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 ask a run to stop after its step and to save, see `listening`."""

import contextlib
import errno
import os
import signal
import sys

from common.distributed import say

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP
COME_AGAIN = 75  # the exit status of a run that was asked to stop and has saved: EX_TEMPFAIL of sysexits.h

_asked = False


class Stopped(Exception):
    """The run was asked to stop, and stops before its end."""


def asked():
    """Whether a signal asked this process to stop."""
    return _asked


class Output:
    """A stream that a run outlives. What cannot be written is dropped: after Ctrl-C `tee` has ended, after SIGHUP the
    terminal, and the disk may be full.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, call, *arguments):
        try:
            return call(*arguments)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # nobody will read it
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def listening():
    """A context in which a signal only sets `asked`; a second Ctrl-C ends the process at once. Stopped ends the process
    with the exit status COME_AGAIN.
    """
    global _asked

    def ask(number, _):
        global _asked
        if not _asked:
            say("Stopping as soon as possible …")
        _asked = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    _asked = False
    former = {number: signal.signal(number, ask) for number in SIGNALS}
    for number, handler in former.items():
        if handler == signal.SIG_IGN and number != signal.SIGINT:  # nohup ignores SIGHUP; a shell's & ignores SIGINT
            signal.signal(number, handler)
    try:
        with contextlib.redirect_stdout(Output(sys.stdout)), contextlib.redirect_stderr(Output(sys.stderr)):
            try:
                yield
            finally:
                sys.stdout.flush()
    except Stopped:
        sys.exit(COME_AGAIN)
    finally:
        _asked = False
        for number, handler in former.items():
            signal.signal(number, handler)
