"""
Draw how diffusion and the twin learn from a small text: validation nats per character against
epochs, that is, how often the training text was seen.

    python tests/benchmarks/epochs.py assets/epochs.png "diffusion, dropout 0.3=ship.pt.csv" \\
        "twin, dropout 0.3=twin.pt.csv"

Each csv is the loss curve that train.py wrote beside a model of batches of 64 windows of 256
characters. Needs matplotlib: pip install ".[picture]".
"""

import argparse
import csv

EPOCHS_PER_ITERATION = 64 * 256 / 1_003_854    # characters of an iteration, of the training text


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="of the picture")
    parser.add_argument("curves", nargs="+", help="label=X.pt.csv")
    args = parser.parse_args()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    for curve in args.curves:
        label, _, name = curve.partition("=")
        with open(name, newline="") as f:
            rows = list(csv.DictReader(f))
        epochs = [float(row["iteration"]) * EPOCHS_PER_ITERATION for row in rows]
        ax.plot(epochs, [float(row["val"]) for row in rows], label=label)
    ax.set(xscale="log", xlabel="epochs", ylabel="validation, nats per character", ylim=(1.35, 2))
    ax.set_title("The twin learns faster, and overfits sooner; diffusion goes on improving")
    ax.grid(alpha=0.2)
    ax.legend(frameon=False)
    fig.savefig(args.path, dpi=110)


if __name__ == "__main__":
    main()
