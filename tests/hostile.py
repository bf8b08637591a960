"""
Do the scripts survive damaged files, flags that make no sense, and kills at random moments? Each
case must either work or end in one line of error, and a killed run must resume to the same weights,
bit for bit. This is not part of the test suite, because it takes half an hour:

    python tests/hostile.py                     # everything
    python tests/hostile.py kills --count=20    # or: checkpoints, states, flags
"""

import argparse
import contextlib
import dataclasses
import io
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main as main_script
import train as train_script
from lib.checkpoint import load_checkpoint, save_checkpoint
from lib.data import write_dataset
from lib.tokenizer import encode, learn_pieces
from model import GPT, GPTConfig

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
        "--device=cpu", "--dtype=float32", "--eval_tokens=64", "--eval_passes=2"]
VALUES = ["", "-1", "0", "1", "2", "3", "7", "70000", "0.3", "1.5", "-0.0", "nan", "inf", "1e30",
          "-inf", "10" * 12, "x", "--", "-", "None", "True", "false", "[1]", "a_b", "_", "\n",
          "\N{SNOWMAN}", "/", ".", "..", "~", "/dev/null", "/dev/full", "/nowhere/x", "x.txt"]


def call(module, *flags):
    """Return the exit status and the errors, a list of lines, of module.main(), which runs in this
    process. Other exceptions than SystemExit escape."""
    argv, err, code = [f"{module.__name__}.py", *map(str, flags)], io.StringIO(), 0
    stdin = io.TextIOWrapper(io.BytesIO(b"a_b"))
    with (mock.patch.multiple(sys, argv=argv, stdin=stdin), contextlib.redirect_stderr(err),
          contextlib.redirect_stdout(io.StringIO())):
        try:
            module.main()
        except SystemExit as e:
            code = e.code or 0
    return code, [line for line in err.getvalue().splitlines() if not line.startswith("warning: ")]


def is_refused(code, errors):
    return code == 2 and len(errors) == 1 and errors[0].startswith("error: ")


def damage(data, other, rng):
    """Return data as a bad disk or a bad copy leaves it."""
    data, at = bytearray(data), rng.randrange(len(data))
    kind = rng.choice(["bit", "byte", "cut", "zeros", "mixed", "doubled"])
    if kind == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[at] = rng.randrange(256)
    elif kind == "cut":
        del data[at:]
    elif kind == "zeros":
        data[at:at + 512] = bytes(len(data[at:at + 512]))
    elif kind == "mixed":
        data[at:] = other[at:]
    else:
        data[at:at] = data[at:at + rng.randrange(1, 512)]
    return bytes(data)


def altered(content, rng):
    """Return a checkpoint, or a part of one, with a value that does not belong there."""
    if isinstance(content, dict) and content and rng.random() < 0.8:
        key = rng.choice(list(content))
        if rng.random() < 0.2:
            return {k: v for k, v in content.items() if k != key}
        return {**content, key: altered(content[key], rng)}
    return rng.choice([None, -1, 0, 3, 2**40, 1.5, float("nan"), True, "x", [], {}, [1], {"a": 1},
                       torch.ones(3), torch.full((66, 16), float("inf")), {"a", "b"}, ("a",)])


def checkpoints(count, rng, folder):
    """A checkpoint that loads after damage must be one that was saved. Any other must be refused
    with a ValueError or OSError."""
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        save_checkpoint(folder / name, GPT(GPTConfig(16, 4, 2, 2, 16)), list("abc"), n=seed)
    a, b = (folder / "a").read_bytes(), (folder / "b").read_bytes()
    content, path, loaded = torch.load(folder / "a", weights_only=True), folder / "x.pt", 0
    whole = [load_checkpoint(folder / name)[0].state_dict() for name in "ab"]
    for i in range(count):
        if i % 2:
            path.write_bytes(damage(a, b, rng))
        else:
            torch.save(altered(content, rng), path)
        try:
            model, _, _ = load_checkpoint(path)
        except (ValueError, OSError):
            continue
        loaded += 1
        model(torch.zeros(1, model.config.block_size, dtype=torch.long))
        if i % 2:
            assert any(all(torch.equal(right[k], v) for k, v in model.state_dict().items())
                       for right in whole)
    return f"{count} damaged or altered checkpoints: {loaded} loaded, since what was hit does " \
           f"not matter; {count - loaded} were refused"


def states(count, rng, folder):
    """A damaged X.pt.state must be refused in one line that names it, and nothing be changed."""
    base = [*TINY, f"--data_dir={text_data(folder)}", f"--save_filename={folder / 'x'}"]
    evaluate = train_script.evaluate

    def crash(model, config, data, iteration):
        return evaluate(model, config, data, iteration) if iteration == 2 else 1 / 0

    for name, seed in (("a", 1), ("b", 2)):  # each run saves its state at iteration 2 and crashes
        with (mock.patch.object(train_script, "evaluate", crash),
              contextlib.suppress(ZeroDivisionError)):
            call(train_script, *base, "--max_iters=4", "--eval_interval=2", f"--seed={seed}")
        (folder / "x.pt.state").rename(folder / name)
    a, b = (folder / "a").read_bytes(), (folder / "b").read_bytes()
    resumed = 0
    for _ in range(count):
        (folder / "x.pt").unlink(missing_ok=True)
        (folder / "x.pt.state").write_bytes(damage(a, b, rng))
        before = sorted(p.name for p in folder.glob("x*"))
        code, errors = call(train_script, *base, "--resume", "--log_interval=1")
        resumed += code == 0
        if code:
            assert is_refused(code, errors) and "x.pt.state" in errors[0], (code, errors)
            assert before == sorted(p.name for p in folder.glob("x*"))
    return f"{count} damaged states: {resumed} resumed, since what was hit does not matter; " \
           f"{count - resumed} were refused in one line"


def flags(count, rng, folder):
    """With any values of any flags, the exit status must be 0, or 2 with one line."""
    save_checkpoint(folder / "m.pt", GPT(GPTConfig(16, 4, 1, 2, 16)), list("a\nb"))
    small = {"gen_length", "num_samples", "steps", "max_iters", "batch_size", "n_embd", "n_layer",
             "gradient_accumulation_steps", "eval_passes", "block_size"}
    base_of = {
        train_script.TrainConfig: [*TINY, "--max_iters=2", f"--data_dir={text_data(folder)}"],
        main_script.SampleConfig: [f"--path={folder / 'm'}", "--device=cpu"]}
    lines = []
    for config, base in base_of.items():
        module, names = sys.modules[config.__module__], [f.name for f in dataclasses.fields(config)]
        refused = 0
        for _ in range(count):
            chosen = []
            for name in rng.sample(names, rng.randrange(1, 3)):
                value = rng.choice(VALUES if rng.random() < 0.5 else ["1", "2", "3", "0.3"])
                slow = name in small and value.isdigit() and int(value) > 100
                outside = name == "save_filename" and value.startswith("/")
                if not slow and not outside:
                    chosen.append(f"--{name}={value}")
            code, errors = call(module, *base, *chosen)
            refused += code == 2
            assert code == 0 or is_refused(code, errors), (base, chosen, errors)
        lines.append(f"{count} flag sets of {module.__name__}.py: {refused} refused in one line, "
                     f"{count - refused} worked")
    return "\n".join(lines)


def kills(count, rng, folder):
    """A run that is killed (SIGKILL) at random moments, and resumed until it is complete, must end
    with the weights of a run that was left alone."""
    base = [sys.executable, train_script.__file__, *TINY, f"--data_dir={text_data(folder)}",
            "--max_iters=1500", "--eval_interval=100"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.perf_counter()
    subprocess.run([*base, f"--save_filename={folder / 'whole'}"], check=True, **quiet)
    seconds = time.perf_counter() - began
    right, _, _ = load_checkpoint(folder / "whole.pt")
    killed = runs = 0
    while killed < count:
        runs += 1
        for path in folder.glob("x.pt*"):
            path.unlink()
        while True:
            process = subprocess.Popen([*base, f"--save_filename={folder / 'x'}", "--resume"],
                                       **quiet)
            try:
                code = process.wait(timeout=rng.uniform(0, 1.2 * seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
                continue
            assert code == 0, code
            break
        model, _, _ = load_checkpoint(folder / "x.pt")
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), right.parameters()))
    left = [p.name for p in folder.glob("x.pt*.tmp")]
    return f"{killed} kills in {runs} runs: every run ended with the same weights, bit for bit; " \
           f"{len(left)} temporary files left"


def text_data(folder):
    """Return a folder of random text to train on."""
    text = "".join(random.Random(0).choices("the old king\n", k=2_000))
    vocab = learn_pieces(text)
    ids = encode(text, vocab)
    with contextlib.redirect_stdout(io.StringIO()):
        write_dataset(folder / "data", ids[:1_800], ids[1_800:], vocab)
    return folder / "data"


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    loops = dict(checkpoints=1000, states=1000, flags=500, kills=200)
    parser.add_argument("loops", nargs="*", default=list(loops))
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.loops:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # files that the scripts write go there, also those in ~
            os.environ["HOME"] = str(Path(folder) / "home")
            print(globals()[name](args.count or loops[name], random.Random(args.seed),
                                  Path(folder)), flush=True)
            os.chdir("/")
