"""The first import of every command: Ctrl-C during the other imports, which take seconds, prints no traceback."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as with a shell's &
    signal.signal(signal.SIGINT, signal.SIG_DFL)
