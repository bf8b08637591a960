"""
Is a model too sure of itself? This script divides its logits by tau (temperature scaling,
arXiv 1706.04599) and measures the NELBO, the bound on the likelihood. If the NELBO is lower at some
tau above 1, the model is too sure of itself.

    python tests/benchmarks/calibration.py --path=X                       # the table
    python tests/benchmarks/calibration.py --path=X --save_filename=Y     # X with the best tau

tau is chosen on every other window of the validation text of Tiny Shakespeare. The other windows
show what it gains on text that was not used to choose it. The logits are linear in the weight and
the bias of the last LayerNorm, so Y is X with those divided by tau: neither its size nor its
likeliest characters change. The model that ships is divided already: its file says
logits_divided_by=1.25.
"""

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.checkpoint import load_checkpoint, resolve_path, save_checkpoint
from lib.data import data_folder, load_data
from lib.device import autocast, choose_attention, pick_device, pick_dtype
from lib.evaluate import measure
from main import SHIPPED

TAUS = tuple(i / 20 for i in range(20, 29))                 # 1.00, 1.05, ... 1.40


def divide_logits(model, tau):
    """Return a copy of the model whose logits are those of model, divided by tau."""
    model = copy.deepcopy(model)
    for p in model.ln_f.parameters():
        p.data /= tau
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=SHIPPED, help="the checkpoint")
    parser.add_argument("--save_filename", help="write the calibrated model to this checkpoint")
    args = parser.parse_args()
    device = pick_device()
    dtype = pick_dtype("auto", device)
    choose_attention(device)
    model, vocab, info = load_checkpoint(resolve_path(args.path), device)
    L = model.config.block_size
    data = load_data(data_folder("shakespeare_char"), L, vocab)
    val_windows = data.val[:len(data.val) // L * L].reshape(-1, L)
    halves = [val_windows[start::2].ravel() for start in (0, 1)]

    print(f"{'tau':>4}  {'where it is chosen':>18}  {'on the other half':>18}")
    found = {}
    for tau in TAUS:
        divided = divide_logits(model, tau)
        (chosen, se), (rest, rest_se) = (
            measure(divided, half, data, 8, 64, autocast(dtype, device)) for half in halves)
        found[tau] = chosen
        print(f"{tau:4.2f}  {chosen:9.4f} +- {se:.4f}  {rest:9.4f} +- {rest_se:.4f}", flush=True)
    best = min(found, key=found.get)
    if args.save_filename:
        info["logits_divided_by"] = info.get("logits_divided_by", 1.0) * best
        save_checkpoint(resolve_path(args.save_filename), divide_logits(model, best), vocab, **info)
        print(f"{resolve_path(args.save_filename)} is {args.path} with tau = {best:.2f}")


if __name__ == "__main__":
    main()
