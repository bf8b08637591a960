"""
What all scripts share: knobs (a script's flags), errors of one line, and files that are written
completely or not at all. It does not import PyTorch, so the prepare scripts start fast.
"""

import argparse
import errno
import math
import os
import re
import secrets
import sys
from contextlib import contextmanager, suppress
from dataclasses import field, fields
from pathlib import Path

from tqdm import tqdm


def check(condition, message):
    """Raise ValueError(message) unless condition holds."""
    if not condition:
        raise ValueError(message)


# -----------------------------------------------------------------------------
# knobs: a dataclass per script, whose fields are its flags

def knob(default, help, group=None, low=-math.inf, high=math.inf):
    """Declare a field of a dataclass that is also a flag, with its range if it is a number. group
    begins a new group of --help. A default of None is explained in help."""
    return field(default=default, metadata=dict(help=help, group=group, low=low, high=high))


def parse_knobs(cls, description, other_defaults=()):
    """Return the flags that were given on the command line, as {name: value}. The fields of the
    dataclass cls are the flags: --key=value, --key value, and --key alone for a switch. ValueError
    for a number outside its range.

    other_defaults: pairs such as ("on CUDA", {"n_layer": 6}), which --help lists, too."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    parser.error = fail  # one line, without the usage
    for f in fields(cls):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        defaults = [str(f.default)] if f.default not in (None, "") else []
        defaults += [f"{where} {of[f.name]}" for where, of in other_defaults if f.name in of]
        kind = dict(nargs="?", const=True, type=boolean) if f.type is bool else dict(type=f.type)
        group.add_argument(f"--{f.name}", metavar=f.type.__name__, **kind,
                           help=f"{f.metadata['help']} (default: {'; '.join(defaults) or 'none'})")
    given = vars(parser.parse_args())
    for f in fields(cls):
        value, low, high = given.get(f.name), f.metadata["low"], f.metadata["high"]
        check(value != [], f"--{f.name} needs a value, not --")  # argparse's answer to --seed=--
        if type(value) in (int, float):
            range_ = f"at least {low}" + f" and at most {high}" * (high < math.inf)
            check(low <= value <= high and abs(value) < math.inf,
                  f"--{f.name} must be {range_}, not {value}")
    return given


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


# -----------------------------------------------------------------------------
# errors and output

def fail(message):
    """Report bad input: one line on stderr, exit status 2."""
    print("error:", " ".join(str(message).splitlines()), file=sys.stderr)
    sys.exit(2)


def open_streams(encoding=None):
    """Make stdout and stderr safe to print to: one may be closed, belong to a notebook, or have an
    encoding that lacks some of our characters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding=encoding, errors="backslashreplace")
        setattr(sys, name, stream)


def printable(text):
    """Return text with escapes in place of characters that a terminal would obey."""
    return "".join(char if char.isprintable() or char in "\n\t"
                   else char.encode("unicode_escape").decode() for char in text)


def say(text, file=None):
    """Print a line above the progress bar. A stream that goes away does not end the run."""
    file = file or sys.stdout
    try:
        tqdm.write(text, file=file)
        file.flush()
    except OSError:
        if file is sys.stdout:
            sys.stdout = open(os.devnull, "w")


@contextmanager
def one_line_errors(advice, rank=0):
    """Turn errors that a user can cause (bad input, files, too little memory) into one line on
    stderr and exit status 2, and Ctrl-C into status 130. advice: how to need less memory. Of
    several processes, which all meet the same error, only the first (rank 0) reports it."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        line = explain(e, advice)
        if line is None:
            raise
        try:
            sys.stdout.flush()
        except OSError:  # stdout itself is what failed: what it still holds goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):  # its reader has left, as in: python main.py | head
            sys.exit(1)
        fail(line) if rank == 0 else sys.exit(2)


def explain(error, advice):
    """Return what to tell the user about an error, or None if it is one of ours."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if (type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
            or re.search("(torch.compile|Dynamo) is not supported", str(error))):
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"--compile does not work here ({reason}): leave it out"
    if (isinstance(error, (MemoryError, OverflowError))
            or re.search("out of memory|allocate memory", str(error))):  # of CUDA, of the CPU
        return f"out of memory: {advice}"
    return error if isinstance(error, (OSError, ValueError, FloatingPointError)) else None


# -----------------------------------------------------------------------------
# files

def write_atomically(path, data):
    """Write bytes to a temporary file beside path, flush it to the disk, and rename it to path:
    whenever the process dies, path holds either the old content or the new one. OSError if path
    can't be written."""
    target = Path(os.path.realpath(path))  # of a link, the file that it leads to
    tmp = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(tmp, "xb") as f:
            f.write(data)
            f.flush()
            try:
                os.fsync(f.fileno())
            except OSError as e:  # network drives and FUSE may not support it
                if e.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                    raise
        os.replace(tmp, target)
    except OSError as e:
        raise OSError(f"{path} can't be written: {e.strerror}") from e
    finally:
        with suppress(OSError):  # usually it is gone already
            os.unlink(tmp)


def read_text(path):
    """Return the text of a UTF-8 file; - is standard input. A byte order mark is dropped; \\r\\n
    and \\r, the line ends of Windows and of old files, become \\n. ValueError for other bytes."""
    check(path != "-" or sys.stdin, "standard input is closed")
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    check(data.count(0) <= len(data) / 3, f"{path} looks like UTF-16: convert it to UTF-8 first")
    try:
        return unify_line_ends(data.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start}): convert it first") from e


def text_of(value):
    """Return the text that a flag's value means: standard input (-), a file (one of that name
    exists, or the value ends as names of text files do), or the value itself."""
    path = os.path.expanduser(value)
    if value == "-" or os.path.isfile(path):
        return read_text(path)
    check(not re.search(r"\.(txt|md|csv|tsv|sdk|sdm)$", value),
          f"there is no file {value} (if it is a text, pipe it in, and give - as the value)")
    return unify_line_ends(value)


def unify_line_ends(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")
