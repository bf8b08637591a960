"""What the prepare scripts share: the three files that train.py reads, each written whole or not at
all, and one line for what goes wrong."""

import json
import os
import secrets
import sys
import zlib
from contextlib import contextmanager

import numpy as np

# what a prepare script writes
FILES = ("train.bin", "val.bin", "meta.json")


def write_atomically(path, data):
    """Write bytes to a new temporary file beside path and rename it: path is never half-written."""
    tmp = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(tmp, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


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
    chars, pieces = ([t for t in vocab if (len(t) == 1) == single] for single in (True, False))
    print("all the unique characters:", "".join(chars[:200]) + " ..." * (len(chars) > 200))
    if pieces:
        print("the first word pieces:", *map(repr, pieces[:20]), "...")
    print(f"vocab size: {len(vocab):,}")
    print(f"train has {len(train_ids):,} tokens")
    print(f"val has {len(val_ids):,} tokens")
    print(f"wrote {', '.join(FILES[:2])} and {FILES[2]} to {out_dir}")


def fail(message):
    """Bad input: one line on stderr, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def one_line_errors():
    """What a user can cause ends a script in one line."""
    if hasattr(sys.stdout, "reconfigure"):  # some terminals can't show every character
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except (OSError, ValueError) as e:
        try:
            sys.stdout.flush()
        except OSError:  # standard output is what failed; it must not fail again at the end
            sys.stdout = open(os.devnull, "w")
        fail(e)
    except KeyboardInterrupt:
        sys.exit(130)
