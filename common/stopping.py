"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 ask a run to stop after its step and to save, see `listening`."""

import contextlib
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


@contextlib.contextmanager
def listening():
    """A context in which a signal only sets `asked`; a second Ctrl-C ends the process at once. Stopped ends the process
    with the exit status COME_AGAIN.
    """
    global _asked
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def ask(number, _):
        global _asked
        if number == signal.SIGHUP:  # the terminal is gone, and writing to it would raise
            for descriptor in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
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
        yield
    except Stopped:
        sys.exit(COME_AGAIN)
    finally:
        _asked = False
        for number, handler in former.items():
            signal.signal(number, handler)
