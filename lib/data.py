"""
Data sets: what the prepare scripts write and train.py reads. A data set is a folder with
train.bin and val.bin (token ids, uint16) and meta.json (the vocabulary, and checksums).
"""

import json
import zlib
from pathlib import Path

import numpy as np

from lib.common import check, write_atomically
from lib.tokenizer import decode, encode

FILES = ("train.bin", "val.bin", "meta.json")


def write_dataset(out_dir, train_ids, val_ids, vocab, **meta):
    """Write the three files to out_dir: train_ids and val_ids (N,), and the vocabulary (vocab[i] is
    the token of id i). Further keyword arguments are stored in meta.json: record (the data consist
    of records of so many tokens) and training (train.py's defaults for this data)."""
    out_dir.mkdir(parents=True, exist_ok=True)
    parts = {"train.bin": train_ids.astype("<u2").tobytes(),
             "val.bin": val_ids.astype("<u2").tobytes()}
    for name, data in parts.items():
        write_atomically(out_dir / name, data)
    # written last, meta.json says which two files belong to it
    crc32 = {name: zlib.crc32(data) for name, data in parts.items()}
    meta = json.dumps({"chars": list(vocab), "crc32": crc32, **meta}, ensure_ascii=False)
    write_atomically(out_dir / "meta.json", meta.encode("utf-8"))
    n_characters = sum(round(len(ids) * characters_per_token(ids, vocab))
                       for ids in (train_ids, val_ids))
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


def characters_per_token(ids, vocab):
    """Return the mean length of the tokens ids (N,): 1 for a vocabulary of characters."""
    lengths = np.array([len(token) for token in vocab], dtype=np.uint16)
    return float(lengths[ids].mean(dtype=np.float64))


def data_folder(dataset, data_dir):
    """Return the folder that --dataset and --data_dir name."""
    if data_dir:
        return Path(data_dir).expanduser()
    return Path(__file__).resolve().parents[1] / "data" / dataset


def read_meta(folder):
    """Return what meta.json in folder holds: "chars" (the vocabulary), "crc32" and, for some data,
    "record" and "training"; {} if the file is missing or unreadable."""
    try:
        return dict(json.loads((folder / "meta.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def load_data(folder, block_size, vocab=None, grow=False):
    """Return (train, val, vocab): both splits as uint16 ids (N,), memory maps of the .bin files,
    and the vocabulary. If vocab, a model's vocabulary, is given, the text is encoded in it; with
    grow, new characters are added at its end. ValueError for data that can't be trained on."""
    for name in FILES:
        check((folder / name).is_file(), f"there is no {name} in {folder}; prepare.py writes it")
    meta, bins = read_meta(folder), [folder / "train.bin", folder / "val.bin"]
    own_vocab = meta.get("chars")
    check(meta.get("crc32") == {path.name: zlib.crc32(path.read_bytes()) for path in bins}
          and isinstance(own_vocab, list),
          f"meta.json, train.bin and val.bin in {folder} do not belong together, or one is "
          "damaged: run prepare.py again")
    record = meta.get("record", 1)
    check(block_size % record == 0, f"--block_size={block_size} is not a multiple of {record}, the "
                                    f"length of the records in {folder}")
    vocab = vocab or own_vocab
    unknown = sorted(set("".join(own_vocab)) - set(vocab))
    check(grow or not unknown, f"{folder} has characters that the model does not know: "
                               f"{''.join(unknown[:20])!r}")
    vocab, splits = vocab + unknown, []
    for path in bins:
        ids = np.memmap(path, dtype="<u2", mode="r")
        if own_vocab != vocab:
            ids = encode(decode(ids, own_vocab), vocab)
        check(len(ids) >= block_size,
              f"{path} has {len(ids)} tokens, fewer than one --block_size={block_size}")
        splits.append(ids)
    return *splits, vocab
