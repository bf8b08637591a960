import errno
import math
import os
import pickle
import random
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from conftest import ROOT

from common import write_atomically
from model import (
    GPT,
    GPTConfig,
    load_checkpoint,
    pick_device,
    pick_dtype,
    resolve_path,
    save_checkpoint,
)

CHARS = list("abcdefg")


def tiny(**changes):
    torch.manual_seed(0)
    sizes = dict(block_size=12, vocab_size=8, n_layer=2, n_head=2, n_embd=16)
    return GPT(GPTConfig(**{**sizes, **changes}))


@pytest.mark.parametrize("rope", [True, False])
def test_every_position_sees_both_sides(rope):
    model = tiny(rope=rope).eval()
    for p in model.h.parameters():
        p.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    idx = torch.zeros(1, 12, dtype=torch.long)
    for changed in (0, 11):
        other = idx.clone()
        other[0, changed] = 1
        moved = (model(idx) - model(other)).abs().amax(-1)[0]
        assert (moved > 1e-6).all()


@pytest.mark.parametrize("rope", [True, False])
def test_order_matters(rope):
    """Without positions, a bidirectional transformer could not tell abc from cba."""
    model = tiny(rope=rope).eval()
    for p in model.h.parameters():
        p.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    idx = torch.tensor([[0, 1, 2, 7]])
    assert not torch.allclose(model(idx)[0, -1], model(idx[:, [2, 1, 0, 3]])[0, -1], atol=1e-4)


def test_rotary_positions_are_relative():
    """Shifting all positions changes no attention."""
    model = tiny().eval()
    idx = torch.randint(8, (2, 6), generator=torch.Generator().manual_seed(0))
    expected = model(idx)
    model.cos, model.sin = model.cos[6:], model.sin[6:]
    torch.testing.assert_close(model(idx), expected, atol=1e-5, rtol=1e-4)


def test_attention_of_unit_queries_and_keys():
    """With qk_norm their length does not count; a checkpoint of before qk_norm goes without."""
    for qk_norm in (True, False):
        model = GPT(GPTConfig(16, 10, 1, 2, 16, qk_norm=qk_norm)).eval()
        idx = torch.arange(8)[None]
        before = model(idx)
        with torch.no_grad():
            model.h[0].attn.c_attn.weight[:32] *= 8                # queries and keys
        assert torch.allclose(model(idx), before, atol=1e-4) == qk_norm


def test_a_checkpoint_of_before_qk_norm(tmp_path):
    model = GPT(GPTConfig(16, 4, 1, 2, 16, qk_norm=False)).eval()
    save_checkpoint(tmp_path / "old.pt", model, list("abc"))
    old = torch.load(tmp_path / "old.pt", weights_only=True)
    del old["config"]["qk_norm"]
    torch.save(old, tmp_path / "old.pt")
    assert torch.equal(load_checkpoint(tmp_path / "old.pt")[0](torch.arange(3)[None]),
                       model(torch.arange(3)[None]))


@pytest.mark.parametrize("bias", [True, False])
def test_initialisation_is_gpt2s(bias):
    model = tiny(n_embd=128, n_layer=3, bias=bias)
    weights = dict(model.named_parameters())
    assert abs(weights["h.0.mlp.c_fc.weight"].std() - 0.02) < 1e-3
    for name in ("h.2.mlp.c_proj.weight", "h.1.attn.c_proj.weight"):
        assert abs(weights[name].std() - 0.02 / math.sqrt(6)) < 1e-3
    assert any("bias" in name for name in weights) == bias
    logits = model(torch.randint(8, (4, 12)))
    assert logits.shape == (4, 12, 8)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(8, (48,)))
    assert abs(loss - math.log(8)) < 0.2  # no opinion yet


def test_dropout_is_where_gpt2_has_it_and_in_training_only(monkeypatch):
    """After the embedding, on the attention weights, and on what each half of a block adds to the
    residual stream."""
    used = []
    F = torch.nn.functional
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def seen_dropout(x, p, training):
        used.append(p * training)
        return dropout(x, p, training)

    def seen_attention(*qkv, dropout_p, **kwargs):
        used.append(dropout_p)
        return attention(*qkv, dropout_p=dropout_p, **kwargs)
    monkeypatch.setattr(F, "dropout", seen_dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen_attention)
    model, idx = tiny(dropout=0.5), torch.zeros(1, 12, dtype=torch.long)
    assert not torch.equal(model(idx), model(idx)) and used == [0.5] * 2 * (1 + 3 * 2)
    model.eval()
    assert torch.equal(model(idx), model(idx)) and used[14:] == [0.0] * 14


def test_what_does_not_fit_is_a_value_error():
    with pytest.raises(ValueError, match="block_size=12"):
        tiny()(torch.zeros(1, 13, dtype=torch.long))
    for bad in (dict(n_head=3), dict(n_embd=2), dict(n_layer=0), dict(dropout=1.0)):
        with pytest.raises(ValueError, match=next(iter(bad)).split("_")[0]):
            tiny(**{"n_head": 2, **bad})


# -----------------------------------------------------------------------------
# the checkpoint file

def test_round_trip(tmp_path):
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


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def damaged(path, marker):
    """-> {what it is: a function that makes such a file at path}."""
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


def test_missing_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.pt"):
        load_checkpoint(tmp_path / "gone.pt")
    with pytest.raises(OSError, match="folder"):
        load_checkpoint(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    path.write_bytes(b"good")

    def disk_full(_):
        raise OSError(errno.ENOSPC, "disk full")
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="m.pt can't be written: disk full"):
        write_atomically(path, b"half")
    assert path.read_bytes() == b"good" and os.listdir(tmp_path) == ["m.pt"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
def test_a_save_touches_no_other_file_and_keeps_the_mode(tmp_path):
    path, others = tmp_path / "m.pt", ("m.pt.tmp", "m.pt.probe", "thesis.txt")
    for name in others:
        (tmp_path / name).write_text("mine")
    path.write_bytes(b"old")
    path.chmod(0o600)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o600
    assert all((tmp_path / name).read_text() == "mine" for name in others)
    os.mkfifo(tmp_path / "pipe")
    for bad in ("pipe", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(OSError, match="regular file"):
            write_atomically(tmp_path / bad, b"new")
    with pytest.raises(OSError, match="pipe"):
        load_checkpoint(tmp_path / "pipe")  # and does not wait for somebody to write into it


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


def test_kill_during_save_never_breaks_the_file(tmp_path):
    path = tmp_path / "m.pt"
    code = ("from model import *\nimport itertools\n"
            "model = GPT(GPTConfig(n_layer=2, vocab_size=8, n_embd=128, n_head=2))\n"
            "for i in itertools.count():\n"
            f"    save_checkpoint({str(path)!r}, model, 'abcdefg', iteration=i)\n"
            "    print(i, flush=True)\n")
    for delay in (0.0, 0.003, 0.007):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE)
        for _ in range(3):
            process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        assert load_checkpoint(path)[2]["iteration"] >= 2


def test_resolve_path():
    assert resolve_path("a/model") == resolve_path("a/model.pt")
    assert resolve_path("a/model.ckpt").name == "model.ckpt"
    assert resolve_path("~/x") != resolve_path("~nobody-here/x")
    assert resolve_path("~nobody-here/x").name == "x.pt"


# -----------------------------------------------------------------------------
# the device and dtype

def test_pick_device():
    assert pick_device("cpu")[0] == torch.device("cpu")
    assert pick_device("auto")[0].type == ("cuda" if torch.cuda.is_available() else "cpu")
    for bad in ("gpu", "cpu:1", "cuda:x", "cuda:99", "cuda:", ""):
        with pytest.raises(ValueError, match="--device"):
            pick_device(bad)


def test_pick_dtype_chooses_the_faster(monkeypatch):
    assert pick_dtype("float16", torch.device("cpu"))[0] == torch.float16
    with pytest.raises(ValueError, match="--dtype"):
        pick_dtype("int8", torch.device("cpu"))
    for slow, chosen in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        def product(a, b, slow=slow):
            time.sleep(0.002 if a.dtype == slow else 0)
        monkeypatch.setattr(torch.Tensor, "__matmul__", product)
        dtype, why = pick_dtype("auto", torch.device("cpu"))
        assert dtype == chosen and "bfloat16 matrix product" in why
        monkeypatch.undo()
