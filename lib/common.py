"""
What all scripts share: knobs (a script's flags), errors of one line, and files that are written
completely or not at all. It does not import PyTorch, so the prepare scripts start fast.
"""

import argparse
import errno
import os
import re
import secrets
import shutil
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

def knob(default, help, group=None):
    """Declare a field of a dataclass that is also a flag. group begins a new group of --help. A
    default of None is explained in help."""
    return field(default=default, metadata={"help": help, "group": group})


def parse_knobs(cls, description, other_defaults=()):
    """Return the flags that were given on the command line, as {name: value}. The fields of the
    dataclass cls are the flags: --key=value, --key value, and --key alone for a switch.

    other_defaults: pairs such as ("on CUDA", {"n_layer": 6}), which --help lists, too."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    parser.error = fail  # one line, without the usage
    for f in fields(cls):
        if f.metadata["group"]:
            group = parser.add_argument_group(*f.metadata["group"].split(": ", 1))
        defaults = [str(f.default)] if f.default not in (None, "") else []
        defaults += [f"{where} {of[f.name]}" for where, of in other_defaults if f.name in of]
        kind = dict(nargs="?", const=True, type=boolean) if f.type is bool else dict(type=f.type)
        group.add_argument(f"--{f.name}", metavar=f.type.__name__, **kind,
                           help=f"{f.metadata['help']} (default: {'; '.join(defaults) or 'none'})")
    given = vars(parser.parse_args())
    for name, value in given.items():
        check(value != [], f"--{name} needs a value, not --")  # argparse's answer to --seed=--
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
    stderr and exit status 2. Ctrl-C gives status 130 and no line. advice: how to need less memory.
    Of several processes, which all meet the same error, only the first (rank 0) reports it."""
    try:
        yield
    except (OSError, ValueError) as e:
        try:
            sys.stdout.flush()
        except OSError:  # stdout itself is what failed: what it still holds goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):  # its reader has left, as in: python main.py | head
            sys.exit(1)
        fail(e) if rank == 0 else sys.exit(2)
    except (MemoryError, OverflowError):
        fail(f"out of memory: {advice}")
    except RuntimeError as e:
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            fail(f"--compile does not work here ({reason}): leave it out")
        if not re.search("out of memory|allocate memory", str(e)):  # of CUDA, of the CPU
            raise
        fail(f"out of memory: {advice}")
    except KeyboardInterrupt:
        sys.exit(130)


# -----------------------------------------------------------------------------
# files

def write_atomically(path, data):
    """Write bytes to a new temporary file beside path, flush it to disk, and rename it to path:
    whenever the process dies, path holds either the old content or the new one. An existing file
    keeps its mode. OSError if path can't be written or is no regular file."""
    target = Path(os.path.realpath(path))
    tmp = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        if target.exists() and not target.is_file():
            raise OSError(errno.EINVAL, "it is not a regular file")
        with open(tmp, "xb") as f:  # x: never an existing file, nor through a link
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if target.exists():
            shutil.copymode(target, tmp)
        os.replace(tmp, target)
    except OSError as e:
        raise OSError(f"{path} can't be written: {e.strerror}") from e
    finally:
        with suppress(OSError):  # it is gone already, or can't be removed, and the error says why
            os.unlink(tmp)


def regular_file(path):
    """Return path as a Path. OSError if it does not exist, or is a folder, a device or a pipe."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise OSError(f"{path} is a folder, a device or a pipe; a regular file is needed")
    return path


def read_text(path):
    """Return the text of a UTF-8 file; - is standard input. A byte order mark is dropped; \\r\\n
    and \\r, the line ends of Windows and of old files, become \\n. ValueError for other bytes."""
    data = sys.stdin.buffer.read() if path == "-" else regular_file(path).read_bytes()
    try:
        return unify_line_ends(data.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        byte = f"byte {e.object[e.start]:#04x} at offset {e.start}"
        raise ValueError(f"{path} is not UTF-8 text: {byte}. Convert it first") from e


def text_of(value):
    """Return the text that a flag's value means: standard input (-), a file (one of that name
    exists, or the name ends like that of a file, in .txt for example), or the value itself."""
    path = os.path.expanduser(value)
    is_file = os.path.exists(path) and not os.path.isdir(path)
    if value == "-" or is_file or re.fullmatch(r"\S+\.[A-Za-z]\w*", value):
        return read_text(path)
    return unify_line_ends(value)


def unify_line_ends(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")
