"""
Data sets: what the prepare scripts write and train.py reads. A data set is a folder with
train.bin and val.bin (token ids, uint16) and meta.json (the vocabulary, and more).
"""

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.common import check, printable, write_atomically
from lib.tokenizer import decode, encode

FILES = ("train.bin", "val.bin", "meta.json")


@dataclass
class Data:
    train: np.ndarray    # (N,): token ids
    val: np.ndarray
    vocab: list          # vocab[i] is the token of id i
    meta: dict           # what meta.json holds

    def __post_init__(self):
        self.record = self.meta.get("record", 1)  # tokens of a record: 91 for a Sudoku, 1 for text
        self.prompt_length = self.meta.get("prompt", 0)  # of pairs: what precedes the answer
        self.characters_per_token = characters_per_token(self.train, self.vocab)


def write_dataset(out_dir, train_ids, val_ids, vocab, **meta):
    """Write the three files to out_dir: train_ids and val_ids (N,), and the vocabulary (vocab[i] is
    the token of id i). Further keyword arguments are stored in meta.json: record (the data consist
    of records of so many tokens) and training (train.py's defaults for this data)."""
    out_dir = Path(os.path.expanduser(out_dir))
    out_dir.mkdir(parents=True, exist_ok=True)
    crc32 = {}  # tells data sets apart: a run can only be resumed on its own data
    for name, ids in (("train.bin", train_ids), ("val.bin", val_ids)):
        data = ids.astype("<u2").tobytes()
        crc32[name] = zlib.crc32(data)
        write_atomically(out_dir / name, data)
    meta = json.dumps({"chars": list(vocab), "crc32": crc32, **meta}, ensure_ascii=False)
    write_atomically(out_dir / "meta.json", meta.encode("utf-8"))
    characters = sum(round(len(ids) * characters_per_token(ids, vocab))
                     for ids in (train_ids, val_ids))
    pieces = [token for token in vocab if len(token) > 1]
    print(f"length of dataset in characters: {characters:,}\nall the unique characters:",
          printable("".join(token for token in vocab if len(token) == 1)[:200]))
    if pieces:
        print("the first word pieces:", *map(repr, pieces[:20]), "...")
    print(f"vocab size: {len(vocab):,}\ntrain has {len(train_ids):,} tokens\n"
          f"val has {len(val_ids):,} tokens\nwrote train.bin, val.bin and meta.json to {out_dir}")


def characters_per_token(ids, vocab):
    """Return the mean length of the tokens ids (N,): 1 for a vocabulary of characters."""
    lengths = np.array([len(token) for token in vocab], dtype=np.uint16)
    return float(lengths[ids].mean(dtype=np.float64))


def data_folder(dataset, data_dir=""):
    """Return the folder that --dataset or --data_dir names. --dataset=mine is the folder mine or
    data/mine that holds a data set, seen from here or else from the repository."""
    if data_dir:
        return Path(os.path.expanduser(data_dir))
    dataset, here, root = os.path.expanduser(dataset), Path(), Path(__file__).resolve().parents[1]
    places = [base / part / dataset for base in (here, root) for part in ("", "data")]
    return next((place for place in places if (place / "meta.json").exists()), places[-1])


def read_meta(folder):
    """Return what meta.json in folder holds: "chars" (the vocabulary), "crc32" (checksums of the
    .bin files) and, for some data, "record" and "training". ValueError unless it is complete."""
    for name in FILES:
        check((folder / name).is_file(), f"there is no {name} in {folder}; prepare.py writes it")
    try:
        meta = dict(json.loads((folder / "meta.json").read_text(encoding="utf-8")))
        meta["chars"], meta["crc32"] = list(meta["chars"]), dict(meta["crc32"])
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{folder / 'meta.json'} is damaged: run prepare.py again") from e
    return meta


def load_data(folder, block_size, vocab=None, grow=False):
    """Return the Data of a folder; train and val are memory maps of the .bin files. If vocab, a
    model's vocabulary, is given, the text is encoded in it; with grow, new characters are added at
    its end. ValueError for data that can't be trained on."""
    meta = read_meta(folder)
    own_vocab, record = meta["chars"], meta.get("record", 1)
    check(block_size % record == 0 and not (block_size > record and "prompt" in meta),
          f"--block_size={block_size} does not fit the records of {record} tokens in {folder}")
    vocab = vocab or own_vocab
    unknown = sorted(set("".join(own_vocab)) - set(vocab))
    check(grow or not unknown,
          f"{folder} has characters that the model does not know: {''.join(unknown[:20])!r}")
    vocab, splits = vocab + unknown, []
    for path in (folder / "train.bin", folder / "val.bin"):
        n, odd = divmod(path.stat().st_size, 2)
        check(n >= block_size, f"{path} has only {n} tokens: give a smaller --block_size than "
                               f"{block_size}, or a text of at least {10 * block_size:,} tokens")
        try:
            ids = np.memmap(path, dtype="<u2", mode="r", shape=(n,))
        except OSError:  # network drives and FUSE may not support it
            ids = np.fromfile(path, dtype="<u2", count=n)
        check(not odd and ids.max() < len(own_vocab),
              f"{path} does not belong to the meta.json beside it: run prepare.py again")
        splits.append(ids if vocab == own_vocab else encode(decode(ids, own_vocab), vocab))
        check(record == 1 or len(splits[-1]) == n, "these records need a model of characters")
    return Data(*splits, vocab, meta)


def cut_windows(data, starts, length):
    """Return the windows of data (N,) that begin at starts (B,): (B, length) int64."""
    return np.asarray(data)[starts[:, None] + np.arange(length)].astype(np.int64)
