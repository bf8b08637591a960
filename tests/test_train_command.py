"""train.py as a command: flags, bad input, damaged data, --help and --eval_only."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import prepare
import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error, read_help
from helpers import RUN, contents, names

import train as train_script
from diffusion import estimate_nelbo
from lib.checkpoint import load_checkpoint, save_checkpoint
from lib.common import parse_knobs
from lib.data import data_folder, load_data
from lib.device import Processes
from lib.evaluate import spread_windows
from model import GPT, GPTConfig
from train import CUDA_DEFAULTS, TrainConfig

# -----------------------------------------------------------------------------
# flags


def test_flags_take_a_value_after_a_space_and_switches_need_none(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", "--seed", "5", "--compile",
                                      "--rope=False", "--data_dir=/nowhere"])
    assert parse_knobs(TrainConfig, "") == {"device": "cpu", "seed": 5, "compile": True,
                                            "rope": False, "data_dir": "/nowhere"}


@pytest.mark.parametrize("device, n_layer, n_embd", [("cuda", 6, 384), ("cpu", 4, 256)])
def test_flags_count_before_the_data_s_defaults_and_these_before_the_gpu_s(
        data_dir, tmp_path, monkeypatch, device, n_layer, n_embd):
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes((data_dir / name).read_bytes())
    meta = json.loads((data_dir / "meta.json").read_text(encoding="utf-8"))
    training = dict(max_iters=777, batch_size=32)
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "training": training}))
    monkeypatch.setattr(train_script, "connect", lambda name, processes: torch.device(device))
    given = dict(data_dir=str(tmp_path), batch_size=8, dtype="float32")
    config, picked, state, base = train_script.resolve(given, None, Processes())
    assert (picked, state, base) == (torch.device(device), None, None)
    assert (config.n_layer, config.n_embd) == (n_layer, n_embd)
    assert (config.batch_size, config.max_iters, config.warmup_iters) == (8, 777, 100)


def test_dataset_is_a_folder_seen_from_here_or_else_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_folder("mine") == ROOT / "data" / "mine"
    for folder in (tmp_path / "data" / "mine", tmp_path / "mine"):
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text("{}")
        assert data_folder("mine").resolve() == folder.resolve()
    assert data_folder("mine", "other") == Path("other")


def test_help_groups_and_explains_every_flag_with_its_defaults(train):
    result = train("--help")
    groups = read_help(result.out)
    assert result.code == 0
    assert set(groups) >= {"files", "device", "model", "optimization", "evaluation"}
    entries = {flag: text for group in groups.values() for flag, text in group.items()}
    assert set(entries) == {f.name for f in fields(TrainConfig)} | {"help"}
    for f in fields(TrainConfig):
        default = str(f.default) if f.default != "" else "none"
        assert "".join(f.metadata["help"].split()) in "".join(entries[f.name].split())
        assert re.search(rf"\(default: {re.escape(default)}[;)]", entries[f.name]), f.name
    for name, default in CUDA_DEFAULTS.items():
        assert entries[name].endswith(f"; on CUDA {default})")
    assert set(groups["model"]) == {f.name for f in fields(GPTConfig)} - {"vocab_size"}


@pytest.mark.parametrize("name, file", [
    ("exp", "exp.pt"), ("exp.pt", "exp.pt"), ("exp.v2", "exp.v2.pt"), ("exp.v2.pt", "exp.v2.pt"),
    ("lr=3e-3", "lr=3e-3.pt"), ("train.bin", "train.bin.pt")])
def test_save_filename_x_writes_x_pt_even_if_x_has_a_dot(train, tmp_path, name, file):
    result = train("--max_iters=1", "--warmup_iters=0", "--eval_tokens=16",
                   f"--save_filename={tmp_path}/{name}")
    assert result.code == 0 and names(tmp_path) == [file, f"{file}.csv"]
    assert result.out.endswith(f"Now: python main.py --path={tmp_path / file}\n")


def test_backups_of_a_name_with_a_dot_keep_the_whole_name(train, tmp_path):
    for _ in range(2):
        train("--max_iters=1", "--warmup_iters=0", "--eval_tokens=16",
              f"--save_filename={tmp_path}/exp.v2")
    assert names(tmp_path) == ["exp.v2.pt", "exp.v2.pt.csv", "exp.v2_backup1.pt",
                               "exp.v2_backup1.pt.csv"]


# -----------------------------------------------------------------------------
# bad input

@pytest.mark.parametrize("flags, words", [
    (["--lerning_rate=1"], ["--lerning_rate"]),
    (["--learn=1"], ["--learn"]),
    (["--eval_chars=100"], ["--eval_chars"]),  # an old name of --eval_tokens
    (["--max_iters=many"], ["--max_iters", "many"]),
    (["--max_iters=0"], ["--max_iters"]),
    (["--compile=perhaps"], ["--compile"]),
    (["--learning_rate=nan"], ["--learning_rate"]),
    (["--final_lr_frac=-1"], ["--final_lr_frac"]),
    (["--ema_decay=1"], ["--ema_decay"]),
    (["--p_max=1.5"], ["--p_max", "1.5"]),
    (["--p_max=0.05"], ["--p_max", "--eps=0.1"]),
    (["--seed=-1"], ["--seed"]),
    (["--eval_passes=1"], ["--eval_passes", "2"]),
    (["--eval_tokens=15"], ["--eval_tokens", "16", "15"]),
    (["--n_head=3"], ["n_head=3", "n_embd=16"]),
    (["--device=gpu"], ["--device=gpu"]),
    (["--device=cuda:99"], ["cuda:99"]),
    (["--dtype=int4"], ["--dtype=int4"]),
    (["--data_dir=/nowhere"], ["nowhere", "prepare.py"]),
    (["--data_dir=", "--dataset=nothing"], ["nothing"]),
    (["--block_size=5000"], ["val.bin", "--block_size", "5000"]),
    (["--init_from=/nowhere/x"], ["x.pt", "No such file"]),
    (["--save_filename=out/"], ["'out/'", "not the name of a checkpoint"]),
    (["--save_filename="], ["not the name of a checkpoint"]),
    (["--eval_only"], ["--init_from"]),
])
def test_bad_input_is_reported_in_one_line_and_an_earlier_model_stays(train, tmp_path, monkeypatch,
                                                                      flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pt").write_bytes(b"an earlier model")
    assert_one_line_error(train("--save_filename=x", *flags), *words)
    assert contents(tmp_path) == {"x.pt": b"an earlier model"} and names(tmp_path) == ["x.pt"]


def test_a_save_filename_that_can_t_be_written_is_reported_in_one_line(train, tmp_path):
    (tmp_path / "x.pt").mkdir()
    assert_one_line_error(train(f"--save_filename={tmp_path}/x"), "folder")
    (tmp_path / "file").write_text("mine")
    assert_one_line_error(train(f"--save_filename={tmp_path}/file/x"), "file")
    assert names(tmp_path) == ["file", "x.pt"]


def test_an_evaluation_of_less_than_one_window_of_the_init_from_model_is_refused(call, data_dir,
                                                                                tmp_path):
    vocab = load_data(data_dir, 16).vocab
    config = GPTConfig(block_size=512, vocab_size=len(vocab) + 1, n_layer=1, n_head=2, n_embd=16)
    save_checkpoint(tmp_path / "base.pt", GPT(config), vocab)
    result = call(train_script, f"--init_from={tmp_path}/base", f"--save_filename={tmp_path}/x",
                  f"--data_dir={data_dir}", "--eval_tokens=300", "--batch_size=2", "--device=cpu",
                  "--dtype=float32")
    assert_one_line_error(result, "--eval_tokens", "512", "300")


def without_vocabulary(meta):
    return json.dumps({k: v for k, v in json.loads(meta).items() if k != "chars"}).encode()


@pytest.mark.parametrize("name, damage, words", [
    ("train.bin", lambda data: b"\0\0\0", ["train.bin", "1 tokens"]),
    ("train.bin", lambda data: data[:-1], ["train.bin"]),
    ("val.bin", lambda data: b"", ["val.bin", "0 tokens"]),
    ("train.bin", lambda data: b"\xff\xff" * 100, ["train.bin", "meta.json", "does not belong"]),
    ("meta.json", lambda data: b"{", ["meta.json", "damaged"]),
    ("meta.json", lambda data: b"[]", ["meta.json", "damaged"]),
    ("meta.json", lambda data: b'{"chars": "ab"}', ["meta.json", "damaged"]),
    ("meta.json", lambda data: b'{"chars": "ab", "crc32": {}}', ["meta.json", "does not belong"]),
    ("meta.json", without_vocabulary, ["meta.json", "damaged"]),
    ("val.bin", lambda data: None, ["there is no val.bin"]),
])
def test_damaged_data_are_reported_in_one_line(call, data_dir, tmp_path, name, damage, words):
    for path in data_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = damage((tmp_path / name).read_bytes())
    (tmp_path / name).unlink()
    if damaged is not None:
        (tmp_path / name).write_bytes(damaged)
    before = names(tmp_path)
    result = call(train_script, f"--data_dir={tmp_path}", "--block_size=16", "--device=cpu",
                  f"--save_filename={tmp_path}/x")
    assert_one_line_error(result, *words)
    assert names(tmp_path) == before


def test_a_torchrun_variable_that_is_no_number_is_reported_in_one_line(train, monkeypatch):
    monkeypatch.setenv("RANK", "abc")
    assert_one_line_error(train("--data_dir=/nowhere"), "abc")


def test_an_empty_torchrun_variable_counts_as_unset(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    assert_one_line_error(train("--data_dir=/nowhere"), "nowhere")


# -----------------------------------------------------------------------------
# streams

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("how", ["> /dev/full", ">&-", "2>&-", "| head -1",
                                 "> /dev/null; test -f 模型.pt"])
def test_a_run_does_not_end_when_standard_output_goes_away_or_can_t_show_a_name(tmp_path, data_dir,
                                                                                how):
    command = f"{sys.executable} {ROOT / 'train.py'} {' '.join(TINY)} --data_dir={data_dir} " \
              "--save_filename=模型 --max_iters=4 --eval_interval=2 --eval_tokens=160"
    result = subprocess.run(["bash", "-c", f"{command} {how}"], cwd=tmp_path, capture_output=True,
                            env=dict(os.environ, PYTHONIOENCODING="cp1252", OMP_NUM_THREADS="1"))
    assert result.returncode == 0 and b"Traceback" not in result.stderr, result.stderr
    assert b"xception" not in result.stderr
    assert names(tmp_path) == ["模型.pt", "模型.pt.csv"]


# -----------------------------------------------------------------------------
# --eval_only

def test_eval_only_prints_the_nelbo_of_all_of_both_splits_in_eight_passes(train, tmp_path,
                                                                          data_dir):
    train(*RUN, f"--save_filename={tmp_path}/x")
    before = contents(tmp_path)
    result = train("--eval_only", f"--init_from={tmp_path}/x", "--batch_size=64")
    assert result.code == 0 and result.out.count("NELBO") == 2 and contents(tmp_path) == before
    model, vocab, _ = load_checkpoint(tmp_path / "x.pt")
    data = load_data(data_dir, 16, vocab)
    for split, ids in (("train", data.train), ("val", data.val)):
        windows = spread_windows(ids, len(ids), 16)
        assert len(windows) == len(ids) // 16
        mean, se = estimate_nelbo(model, windows, len(vocab), passes=8, batch_size=64)
        assert f"{split} NELBO {mean:.4f} +- {se:.4f} nats per character\n" in result.out


def test_token_ids_are_translated_to_the_vocabulary_of_the_checkpoint(call, train, tmp_path, text):
    """Other prepared data may use fewer characters; a character that the model does not know is an
    error."""
    train(*RUN, f"--save_filename={tmp_path}/x")
    few = "\n".join(line for line in text.splitlines() if "e" not in line) * 2
    for name, content in (("few", few), ("alien", few + "\N{SNOWMAN}")):
        (tmp_path / f"{name}.txt").write_text(content, encoding="utf-8")
        prepare.prepare(tmp_path / f"{name}.txt", tmp_path / name)
    vocab = load_checkpoint(tmp_path / "x.pt")[1]
    data = load_data(tmp_path / "few", 16, vocab)
    assert data.vocab == vocab
    assert "".join(vocab[i] for i in data.train) == few[:len(data.train)]
    flags = ("--eval_only", f"--init_from={tmp_path}/x", "--device=cpu", "--dtype=float32")
    assert call(train_script, *flags, f"--data_dir={tmp_path}/few").code == 0
    alien = call(train_script, *flags, f"--data_dir={tmp_path}/alien")
    assert_one_line_error(alien, "alien", "\N{SNOWMAN}")
