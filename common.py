"""
What the scripts share: flags, files that are written whole or not at all, and one line for what a
user can cause. It needs no PyTorch, so prepare.py starts fast.
"""

import errno
import json
import os
import re
import secrets
import shutil
import signal
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def check(condition, message):
    """Raise ValueError(message) unless condition holds."""
    if not condition:
        raise ValueError(message)


def fail(message):
    """Bad input: one line on stderr, exit status 2."""
    print("error:", " ".join(str(message).splitlines()), file=sys.stderr)
    sys.exit(2)


def open_streams(encoding=None):
    """Make standard output and error fit to print to: one may be closed, be a notebook's, or have
    an encoding without some of our characters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding=encoding, errors="backslashreplace")
        setattr(sys, name, stream)


def parse(parser, argv=None):
    """parse_args, with one line for bad flags."""
    parser.error = fail  # without the usage
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        check(value != [], f"--{name} needs a value, not --")  # argparse's answer to --seed=--
    return args


def stop_signals():
    """The signals that ask a script to stop: Ctrl-C, a scheduler's SIGTERM, and a closed terminal's
    SIGHUP, unless nohup has it ignored."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)  # Windows has none
    return signals


@contextmanager
def one_line_errors(advice, rank=0):
    """Errors that a user can cause (bad input, files, too little memory) become one line on stderr
    and an exit status; Ctrl-C becomes a status alone. advice: how to need less memory.
    Of several processes, all of which find the same bad input, the first alone (rank 0) says so."""
    try:
        yield
    except (OSError, ValueError) as e:
        try:
            sys.stdout.flush()
        except OSError:  # standard output is what failed; it must not fail again at the end
            sys.stdout = open(os.devnull, "w")
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
    whenever the process dies, path is either the old file or the new one, whole. An old file's mode
    is kept. OSError if path can't be written or is no regular file (a folder, a device, a pipe)."""
    path = Path(os.path.realpath(path))
    tmp = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is not a regular file")
        with open(tmp, "xb") as f:  # x: never an existing file, nor through a link
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if path.exists():
            shutil.copymode(path, tmp)
        os.replace(tmp, path)
    except OSError as e:
        raise OSError(f"{path} can't be written: {e.strerror}") from e
    finally:
        tmp.unlink(missing_ok=True)


def regular_file(path):
    """-> path, a Path. OSError if there is none, or if it is a folder, a device or a pipe."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise OSError(f"{path} is a folder, a device or a pipe; a regular file is needed")
    return path


# what a prepare script writes, and train.py reads
FILES = ("train.bin", "val.bin", "meta.json")


def write_dataset(out_dir, train_ids, val_ids, vocab, **meta):
    """train_ids and val_ids (N,), and the vocabulary (vocab[i] is the token of id i) -> the three
    files in out_dir. Further keyword arguments are stored in meta.json."""
    out_dir.mkdir(parents=True, exist_ok=True)
    parts = {"train.bin": train_ids.astype("<u2").tobytes(),
             "val.bin": val_ids.astype("<u2").tobytes()}
    for name, data in parts.items():
        write_atomically(out_dir / name, data)
    # written last, meta.json says which two files belong to it
    crc32 = {name: zlib.crc32(data) for name, data in parts.items()}
    meta = json.dumps({"chars": list(vocab), "crc32": crc32, **meta}, ensure_ascii=False)
    write_atomically(out_dir / "meta.json", meta.encode("utf-8"))
    lengths = np.array([len(token) for token in vocab], dtype=np.uint16)
    n_characters = sum(int(lengths[ids].sum(dtype=np.int64)) for ids in (train_ids, val_ids))
    print(f"length of dataset in characters: {n_characters:,}")
    chars = [token for token in vocab if len(token) == 1]
    pieces = [token for token in vocab if len(token) > 1]
    print("all the unique characters:", "".join(chars[:200]) + " ..." * (len(chars) > 200))
    if pieces:
        print("the first word pieces:", *map(repr, pieces[:20]), "...")
    print(f"vocab size: {len(vocab):,}")
    print(f"train has {len(train_ids):,} tokens")
    print(f"val has {len(val_ids):,} tokens")
    print(f"wrote train.bin, val.bin and meta.json to {out_dir}")
