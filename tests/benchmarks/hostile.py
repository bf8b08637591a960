"""
Damaged files, flags that make no sense, and kills at random moments, by the hundred. Each must end
in one line or work; a killed run must resume to the same weights, bit for bit. Not part of the test
suite, since it takes half an hour:

    python tests/benchmarks/hostile.py                     # everything
    python tests/benchmarks/hostile.py kills --count=20    # or: checkpoints, states, flags
"""

import argparse
import contextlib
import io
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path += [str(ROOT), str(ROOT / "data" / "shakespeare_char")]

import prepare  # noqa: E402
import torch  # noqa: E402

import main as main_script  # noqa: E402
import train as train_script  # noqa: E402
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint  # noqa: E402

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
        "--device=cpu", "--dtype=float32", "--eval_chars=64", "--eval_passes=2"]
VALUES = ["", "-1", "0", "1", "2", "3", "7", "70000", "0.3", "1.5", "-0.0", "nan", "inf", "1e30",
          "-inf", "10" * 12, "x", "--", "-", "None", "True", "false", "[1]", "a_b", "_", "\n",
          "\N{SNOWMAN}", "/", ".", "..", "~", "/dev/null", "/dev/full", "/nowhere/x", "x.txt"]


def call(module, *flags):
    """-> the exit status and stderr of module.main(), in this process. Other exceptions escape."""
    sys.argv, err = [f"{module.__name__}.py", *map(str, flags)], io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            module.main()
        except SystemExit as e:
            return e.code or 0, err.getvalue()
    return 0, err.getvalue()


def one_line(code, err):
    return code == 2 and err.count("\n") == 1 and err.startswith("error: ")


def damage(data, other, rng):
    """data as a bad disk or a bad copy leaves it."""
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
    """A checkpoint, or a part of one, with a value somewhere that does not belong there."""
    if isinstance(content, dict) and content and rng.random() < 0.8:
        key = rng.choice(list(content))
        if rng.random() < 0.2:
            return {k: v for k, v in content.items() if k != key}
        return {**content, key: altered(content[key], rng)}
    return rng.choice([None, -1, 0, 3, 2**40, 1.5, float("nan"), True, "x", [], {}, [1], {"a": 1},
                       torch.ones(3), torch.full((66, 16), float("inf")), {"a", "b"}, ("a",)])


def checkpoints(count, rng, folder):
    """One that loads after damage must be one that was saved; what is refused is a ValueError or
    OSError."""
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
    return f"{count} damaged or altered checkpoints: {loaded} loaded (what was hit does not " \
           f"matter), {count - loaded} were refused"


def states(count, rng, folder):
    """A damaged X.pt.state is refused in one line that names it, and nothing is changed."""
    folder_flags = [*TINY, f"--data_dir={text_data(folder)}", f"--save_filename={folder / 'x'}"]
    for name, seed in (("a", 1), ("b", 2)):
        real = train_script.evaluate
        train_script.evaluate = lambda run: 1 / 0           # a crash, after the state was saved
        with contextlib.suppress(ZeroDivisionError):
            call(train_script, *folder_flags, "--max_iters=4", "--eval_interval=2",
                 f"--seed={seed}")
        train_script.evaluate = real
        (folder / "x.pt.state").rename(folder / name)
    a, b = (folder / "a").read_bytes(), (folder / "b").read_bytes()
    resumed = 0
    for _ in range(count):
        (folder / "x.pt").unlink(missing_ok=True)
        (folder / "x.pt.state").write_bytes(damage(a, b, rng))
        before = sorted(p.name for p in folder.glob("x*"))
        code, err = call(train_script, *folder_flags, "--resume", "--log_interval=1")
        resumed += code == 0
        assert code == 0 or one_line(code, err) and "x.pt.state" in err, (code, err)
        assert code == 0 or before == sorted(p.name for p in folder.glob("x*"))
    return f"{count} damaged states: {resumed} resumed (what was hit does not matter), " \
           f"{count - resumed} were refused in one line"


def flags(count, rng, folder):
    """Any values of any flags: exit status 0, or 2 with one line."""
    save_checkpoint(folder / "m.pt", GPT(GPTConfig(16, 4, 1, 2, 16)), list("a\nb"))
    small = {"gen_length", "num_samples", "steps", "max_iters", "batch_size", "n_embd", "n_layer",
             "gradient_accumulation_steps", "eval_passes", "block_size"}
    names = [f.name for f in train_script.fields(train_script.TrainConfig)]
    bases = {train_script: ([*TINY, "--max_iters=2", f"--data_dir={text_data(folder)}",
                             f"--save_filename={folder / 'x'}"], names),
             main_script: ([f"--path={folder / 'm'}", "--gen_length=4", "--device=cpu"],
                           ["path", "prompt", "gen_length", "infill", "mask_char", "num_samples",
                            "seed", "steps", "temperature", "revise", "remasking", "block_length",
                            "cfg_scale", "animate", "html", "device", "dtype"])}
    lines = []
    for module, (base, names) in bases.items():
        refused = 0
        for _ in range(count):
            chosen = []
            for name in rng.sample(names, rng.randrange(1, 3)):
                value = rng.choice(VALUES if rng.random() < 0.5 else ["1", "2", "3", "0.3"])
                if not (name in small and value.isdigit() and int(value) > 100):  # no waiting
                    chosen.append(f"--{name}={value}")
            if any(flag in ("--prompt=-", "--infill=-") for flag in chosen):
                sys.stdin = io.TextIOWrapper(io.BytesIO(b"a_b"))
            code, err = call(module, *base, *chosen)
            refused += code == 2
            diverged = code == 1 and "diverged" in err
            assert code == 0 or diverged or one_line(code, err), (module.__name__, chosen, err)
            for left in Path().glob("unmask.pt*"):
                left.unlink()
        lines.append(f"{count} flag sets of {module.__name__}.py: {refused} refused in one line, "
                     f"{count - refused} worked")
    return "\n".join(lines)


def kills(count, rng, folder):
    """SIGKILL at random moments, --resume, until the run is complete: the weights are those of a
    run that was left alone."""
    base = [sys.executable, ROOT / "train.py", *TINY, f"--data_dir={text_data(folder)}",
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
    if not (folder / "data" / "meta.json").exists():
        rng = random.Random(0)
        (folder / "text").write_text("".join(rng.choices("the old king\n", k=2_000)))
        with contextlib.redirect_stdout(io.StringIO()):
            prepare.prepare(folder / "text", folder / "data")
    return folder / "data"


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    loops = dict(checkpoints=1000, states=1000, flags=500, kills=200)
    parser.add_argument("loops", nargs="*", default=list(loops))
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.loops:
        with tempfile.TemporaryDirectory() as folder:
            print(globals()[name](args.count or loops[name], random.Random(args.seed),
                                  Path(folder)), flush=True)
