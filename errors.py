"""Mistakes that a user can mend are told in one line, without a traceback."""

import argparse
import contextlib
import sys


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, and what to do about it."""


@contextlib.contextmanager
def told_in_one_line():
    """Turns a UserError into a line on stderr and exit status 2. Anything else is a bug and keeps its traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def positive_int(text):
    """The type of a command line argument that counts something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
