"""What the commands share: errors in one line, without a traceback; help that shows defaults; types of arguments."""

import argparse
import ast
import contextlib
import dataclasses
import errno
import math
import os
import re
import sys
from pathlib import Path

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, a quota, a limit on the size of files
MOST_PSI = 10  # of the truncation; far more than is of use
MADE_BY = "made by Aurora (arXiv 2309.03904)"  # in the first 4 KB of every file that a command may replace


class UserError(ValueError):
    """The user's input is wrong. The message says what is wrong and what to do."""


def print_on_any_console():
    """Prints "?" for characters that the console cannot show: cp1252 and ASCII have no ψ. If the user closed a stream
    (`>&-`), its output is dropped.
    """
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def errors_in_one_line():
    """Prints a UserError, an OSError that names a file, or too little memory as one line on stderr, and exits with
    status 2. Any other exception is a bug and keeps its traceback.
    """
    print_on_any_console()
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        if str(error):  # else another rank prints it
            print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)  # a path may contain line breaks
        sys.exit(2)
    except BrokenPipeError:  # the reader of the output has ended, for example `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno in DISK_IS_FULL:
            what = f"{error.filename or 'a file, or the output,'} could not be written: {error.strerror}"
            print(f"error: {what}; make room on that disk, and give the same command again", file=sys.stderr)
        elif error.filename is not None:  # a disk that is read-only, a name too long, a loop of links, …
            print(f"error: {error.filename}: {reason(error)}", file=sys.stderr)
        else:
            raise
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate) memory", str(error)):
            raise
        print("error: too little memory; ask for fewer pictures or a smaller batch", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default, except None: there the help itself says what happens without the argument. Keeps the line
    breaks of descriptions.
    """

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Shows defaults in its help, and refuses empty values."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, **options)
        self.register("type", None, a_text)
        print_on_any_console()  # help is printed while arguments are parsed, before any command runs


def reason(error):
    """The message of an OSError, to print after a file's name."""
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return "a file or a broken link is where a folder is needed"
    if isinstance(error, IsADirectoryError):
        return "a folder is where a file is needed; move it, or name another file"
    return error.strerror or first_line(error)


def first_line(error):
    """The first line of an exception's message, at most 200 characters. If it ends with a colon, the next one too."""
    line, *more = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join([line, more[0].strip()] if line.endswith(":") and more else [line])[:200]


def check_file(path):
    """Makes the folder of a file, and fails before the work if the file cannot be written, or exists without MADE_BY in
    it. Raises OSError and UserError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists():
        with open(path, "rb") as file:
            if MADE_BY.encode() not in file.read(4096):
                raise UserError(f"{path} exists, and this command did not make it; give another --out")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def a_text(text):
    """The type of an argument without a type: a text that is not empty, in UTF-8."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give a value, or leave it out")
    try:
        text.encode()  # what is written about it, such as JSON, is in UTF-8
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it has bytes that are not UTF-8; rename the file") from None
    return text


def a_name(text):
    """An argument's type: the name of data. "~" is the home folder."""
    return os.path.expanduser(a_text(text))


def a_path(text):
    """An argument's type: the path of a file or a folder. "~" is the home folder."""
    path = Path(a_name(text))
    with contextlib.suppress(OSError):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise argparse.ArgumentTypeError(f"{text} is neither a file nor a folder")
    return path


def add_data(add, also=""):
    """Adds --data and --caption-key. add: a parser's add_argument. also: another kind of data that it accepts."""
    names = f"emoji, a folder of images with captions, .tar shards{also}"
    add("--data", type=a_name, default="emoji", help=names)
    add("--caption-key", help="the field of each .json that contains the caption; .txt files are then not read")


def positive_int(text):
    """An argument's type: a whole number from 1 to 2³¹ − 1."""
    if not 0 < (number := int(text)) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number, or is too large")
    return number


def natural_number(text):
    """An argument's type: a whole number from 0. Of a seed, PyTorch's generators use 32 bits."""
    if not 0 <= (number := int(text)) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is negative or too large; give 0 to {2**32 - 1}")
    return number


def a_truncation(text):
    """An argument's type: the truncation ψ."""
    if not abs(psi := float(text)) <= MOST_PSI:  # NaN is not
        raise argparse.ArgumentTypeError(f"{text}: give a number from -{MOST_PSI} to {MOST_PSI}, such as 0.7")
    return psi


def with_fields(settings, option, assignments):
    """Sets fields of a dataclass from an option's texts, for example "lr_generator=1e-3" → a copy. Raises UserError."""
    changes = {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in vars(settings):
            raise UserError(f"{option}: {name!r} is no field here; choose one of {', '.join(vars(settings))}")
        former, value = getattr(settings, name), None
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            value = ast.literal_eval(text)
            if isinstance(former, float):
                value = float(value)
        if not is_like(value, former):
            raise UserError(f"{option} {name}={text}: write {name}=VALUE with a value like {former!r}")
        changes[name] = value
    return dataclasses.replace(settings, **changes)


def is_like(value, former):
    """Whether a value can replace another: the same type, the same keys, and neither negative nor infinite."""
    if type(value) is not type(former):
        return False
    if isinstance(former, dict):
        return value.keys() == former.keys() and all(is_like(value[key], former[key]) for key in former)
    return not isinstance(former, int | float) or 0 <= value < math.inf  # NaN is not
