"""The checkpoint file: what is saved comes back, no damage goes unnoticed, and no accident while
saving costs the old file. And the names of such files."""

import errno
import os
import pickle
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from lib.checkpoint import (
    load_checkpoint,
    load_object,
    resolve_path,
    save_checkpoint,
    save_object,
)
from lib.common import write_atomically
from model import GPT, GPTConfig

CHARS = list("abcdefg")


def tiny(**changes):
    torch.manual_seed(0)
    sizes = dict(block_size=12, vocab_size=8, n_layer=2, n_head=2, n_embd=16)
    return GPT(GPTConfig(**{**sizes, **changes}))


# -----------------------------------------------------------------------------
# what is saved comes back

def test_a_checkpoint_holds_the_model_its_vocabulary_and_how_it_was_made(tmp_path):
    model = tiny(dropout=0.1, bias=True)
    save_checkpoint(tmp_path / "m.pt", model, CHARS, iteration=7, nelbo={"val": 1.5})
    loaded, chars, info = load_checkpoint(tmp_path / "m.pt")
    assert chars == CHARS and loaded.config == model.config and not loaded.training
    assert info == {"iteration": 7, "nelbo": {"val": 1.5}, "torch_version": str(torch.__version__)}
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert os.listdir(tmp_path) == ["m.pt"]


def test_half_precision_weights_load_in_float32(tmp_path):
    save_checkpoint(tmp_path / "m.pt", tiny().bfloat16(), CHARS)
    loaded, _, _ = load_checkpoint(tmp_path / "m.pt")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_a_checkpoint_of_before_qk_norm_goes_without(tmp_path):
    path, model = tmp_path / "old.pt", tiny(qk_norm=False).eval()
    save_checkpoint(path, model, CHARS)
    old = torch.load(path, weights_only=True)
    del old["config"]["qk_norm"]
    torch.save(old, path)
    idx = torch.arange(8)[None]
    assert torch.equal(load_checkpoint(path)[0](idx), model(idx))
    assert not torch.equal(tiny(qk_norm=True).eval()(idx), model(idx))


def test_an_object_of_tensors_and_plain_values_comes_back(tmp_path):
    content = {"iteration": 3, "weights": torch.arange(3.0), "rows": [{"loss": 0.5}]}
    save_object(tmp_path / "x.state", content)
    loaded = load_object(tmp_path / "x.state")
    assert torch.equal(loaded.pop("weights"), content.pop("weights")) and loaded == content


# -----------------------------------------------------------------------------
# damage

class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def damaged(path, marker):
    """Return {what it is: a function that makes such a file at path}."""
    save_checkpoint(path, tiny(), CHARS)
    good = path.read_bytes()
    checkpoint = torch.load(path, weights_only=True)
    first = next(iter(checkpoint["model"]))

    def saved(**changes):
        return lambda: torch.save({**checkpoint, **changes}, path)

    def weights(value):
        return saved(model={**checkpoint["model"], first: value})
    return {
        "empty": lambda: path.write_bytes(b""),
        "cut short": lambda: path.write_bytes(good[:len(good) // 2]),
        "text": lambda: path.write_text("To be, or not to be"),
        "another object": lambda: torch.save([1, 2], path),
        "code": lambda: torch.save({**checkpoint, "info": Evil(marker)}, path),
        "a bare pickle with code": lambda: path.write_bytes(pickle.dumps(Evil(marker))),
        "other shapes": weights(torch.zeros(3, 3)),
        "a missing weight": saved(model={}),
        "not a tensor": weights("zero"),
        "not finite": weights(torch.full_like(checkpoint["model"][first], torch.nan)),
        "a vocabulary of another size": saved(chars=CHARS[:-1]),
        "a vocabulary with an empty token": saved(chars=["", *CHARS[1:]]),
        "an impossible config": saved(config={**checkpoint["config"], "n_head": 3}),
        "a config of words": saved(config={**checkpoint["config"], "n_layer": "two"}),
        "an unknown config": saved(config={**checkpoint["config"], "moe": 8}),
    }


@pytest.mark.parametrize("kind", [
    "empty", "cut short", "text", "another object", "code", "a bare pickle with code",
    "other shapes", "a missing weight", "not a tensor", "not finite",
    "a vocabulary of another size", "a vocabulary with an empty token",
    "an impossible config", "a config of words", "an unknown config"])
def test_a_bad_checkpoint_is_one_clear_error_and_runs_no_code(kind, tmp_path, sample):
    path, marker = tmp_path / "m.pt", tmp_path / "marker"
    damaged(path, marker)[kind]()
    with pytest.raises(ValueError, match="m.pt") as e:
        load_checkpoint(path)
    assert "\n" not in str(e.value)
    assert not marker.exists()
    result = sample(f"--path={path}")
    assert result.code == 2 and result.err.count("\n") == 1 and result.out == ""


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.pt"):
        load_checkpoint(tmp_path / "gone.pt")
    with pytest.raises(OSError) as e:
        load_checkpoint(tmp_path)
    assert Path(e.value.filename) == tmp_path


def test_one_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "m.pt"
    save_checkpoint(path, tiny(), CHARS)
    good = path.read_bytes()
    rng = random.Random(0)
    for _ in range(100):
        with zipfile.ZipFile(path) as z:  # somewhere inside a member
            part = rng.choice([part for part in z.infolist() if part.file_size])
        name = part.header_offset + 30  # of the local header; then the name, padding, the data
        lengths = good[part.header_offset + 26:name]
        data = name + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        place, bad = data + rng.randrange(part.file_size), bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="m.pt"):
            load_checkpoint(path)
        path.write_bytes(good)


# -----------------------------------------------------------------------------
# accidents while saving

def failing(code, text):
    """Return a function that fails as the operating system does."""
    def fail(*args, **kwargs):
        raise OSError(code, text, "the file that the system call was for")
    return fail


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    path.write_bytes(b"good")
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="m.pt can't be written: No space left on device"):
        write_atomically(path, b"half")
    assert path.read_bytes() == b"good" and os.listdir(tmp_path) == ["m.pt"]


@pytest.mark.parametrize("read_only", ["from the start", "at the end"])
def test_on_a_read_only_disk_the_error_names_the_users_file(tmp_path, monkeypatch, read_only):
    """Not the temporary file beside it, even where that can't be removed any more."""
    fail = failing(errno.EROFS, "Read-only file system")
    if read_only == "from the start":
        monkeypatch.setattr("builtins.open", fail)
    for module, name in ((os, "replace"), (os, "unlink"), (Path, "unlink")):
        monkeypatch.setattr(module, name, fail)
    with pytest.raises(OSError) as e:
        write_atomically(tmp_path / "m.pt", b"new")
    assert str(e.value) == f"{tmp_path}/m.pt can't be written: Read-only file system"


def test_in_a_folder_without_access_the_error_names_the_users_file(tmp_path, monkeypatch):
    """There, not even the question whether a file exists has an answer."""
    fail = failing(errno.EACCES, "Permission denied")
    monkeypatch.setattr("builtins.open", fail)
    monkeypatch.setattr(Path, "exists", fail)
    with pytest.raises(OSError) as e:
        write_atomically(tmp_path / "m.pt", b"new")
    assert str(e.value) == f"{tmp_path}/m.pt can't be written: Permission denied"


def test_a_save_touches_no_other_file_and_replaces_no_folder(tmp_path):
    path, others = tmp_path / "m.pt", ("m.pt.tmp", "m.pt.probe", "thesis.txt")
    for name in others:
        (tmp_path / name).write_text("mine")
    path.write_bytes(b"old")
    write_atomically(path, b"new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder can't be written"):
        write_atomically(tmp_path / "folder", b"new")
    assert path.read_bytes() == b"new"
    assert all((tmp_path / name).read_text() == "mine" for name in others)
    assert sorted(os.listdir(tmp_path)) == sorted(["m.pt", "folder", *others])


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
def test_a_link_stays_a_link_to_the_file_that_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "m.pt").symlink_to("disk/real.pt")
    for content in (b"first", b"second"):
        write_atomically(tmp_path / "m.pt", content)
        assert (tmp_path / "m.pt").is_symlink()
        assert (tmp_path / "disk" / "real.pt").read_bytes() == content
    assert os.listdir(tmp_path / "disk") == ["real.pt"]


def test_kill_during_save_never_breaks_the_file(tmp_path):
    path = tmp_path / "m.pt"
    code = ("import itertools\nfrom model import GPT, GPTConfig\n"
            "from lib.checkpoint import save_checkpoint\n"
            "model = GPT(GPTConfig(n_layer=2, vocab_size=8, n_embd=128, n_head=2))\n"
            "for i in itertools.count():\n"
            f"    save_checkpoint({str(path)!r}, model, 'abcdefg', iteration=i)\n"
            "    print(i, flush=True)\n")
    for delay in (0.0, 0.005):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE)
        for _ in range(3):
            process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        assert load_checkpoint(path)[2]["iteration"] >= 2


# -----------------------------------------------------------------------------
# names

@pytest.mark.parametrize("name, file", [
    ("a/model", "a/model.pt"), ("a/model.pt", "a/model.pt"), ("model.ckpt", "model.ckpt.pt"),
    ("v1.5", "v1.5.pt"), ("~/x", os.path.expanduser("~/x.pt")), ("/tmp/x", "/tmp/x.pt"),
    ("~nobody-here/x", "~nobody-here/x.pt")])
def test_pt_is_added_unless_the_name_ends_in_it(name, file):
    assert resolve_path(name) == resolve_path(Path(name)) == Path(file)


@pytest.mark.parametrize("name", ["", "/", "models/", "./", ".", "..", "a/..", "x.pt.state",
                                  "x.pt.csv"])
def test_a_name_that_is_a_folder_s_or_another_file_s_is_refused(name):
    with pytest.raises(ValueError, match="is not the name of a checkpoint, which ends in .pt"):
        resolve_path(name)
