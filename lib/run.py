"""
What a training run writes and reads besides the model: X.pt.state for --resume, X.pt.csv with the
loss curve, its progress on the terminal, and signals.
"""

import itertools
import os
import secrets
import shlex
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict

from tqdm import tqdm

from lib.checkpoint import load_object, save_checkpoint, save_object
from lib.common import check, say, write_atomically
from lib.puzzles import side_of

PLAIN = ("iteration", "minutes", "losses", "history")  # fields of a Run that are plain values


def parts_of(run):
    """Return the fields of a Run that have a state_dict, by name."""
    optimizers = {f"optimizer {i}": optimizer for i, optimizer in enumerate(run.optimizers)}
    return dict(model=run.model, ema=run.ema, scaler=run.scaler, **optimizers)


def best(history):
    """Return the row of the lowest validation loss."""
    return min(history, key=lambda row: row["val"])


def existing(path):
    """Return which of X.pt, X.pt.csv and X.pt.state there are, by what is added to path, X.pt."""
    return [end for end in ("", ".csv", ".state") if os.path.exists(f"{path}{end}")]


def free_name(path):
    """Return X_backup1.pt or, if that or a file beside it exists, the next one."""
    names = (path.with_name(f"{path.stem}_backup{n}.pt") for n in itertools.count(1))
    return next(name for name in names if not existing(name))


class Files:
    """The files of the run of --save_filename=X: X.pt, X.pt.csv and X.pt.state."""

    def __init__(self, path):
        check(not path.is_dir(), f"{path} is a folder: give another --save_filename")
        self.path, self.id = path, secrets.token_hex(8)  # tells runs of the same name apart

    def save_model(self, run, config, data):
        row = run.history[-1] if run.history else {}
        save_checkpoint(self.path, run.ema, data.vocab, iteration=run.iteration,
                        minutes=run.minutes, record=data.record, prompt=data.prompt_length,
                        hyperparameters=asdict(config),
                        nelbo={split: row.get(split) for split in ("train", "val")},
                        device=run.ema.wte.weight.device.type, command=" ".join(sys.argv))

    def save_curve(self, history):
        """Write X.pt.csv, a row for each evaluation."""
        lines = [history[0].keys(), *(row.values() for row in history)]
        text = "".join(",".join(map(str, line)) + "\n" for line in lines)
        try:
            write_atomically(f"{self.path}.csv", text.encode())
        except OSError as e:  # it may be open in a spreadsheet, which locks it on Windows
            say(f"warning: {e}. The next evaluation, if there is one, tries again", sys.stderr)

    def save_state(self, run, config, data):
        """Write X.pt.state, all that --resume needs; the first one before the first iteration."""
        state = {name: part.state_dict() for name, part in parts_of(run).items()}
        state |= {name: getattr(run, name) for name in PLAIN}
        save_object(f"{self.path}.state", dict(state, config=asdict(config), vocab=data.vocab,
                                               crc32=data.meta["crc32"], id=self.id))

    def leave_name_to_others(self):
        """If another run of the same name has moved the files aside, go on under a free name."""
        try:
            own = load_object(f"{self.path}.state").get("id") == self.id
        except FileNotFoundError:
            own = False  # the other run is complete
        except (OSError, ValueError):
            own = True   # the file can't be read just now, so nothing is known
        if not own:
            old, self.path = self.path, free_name(self.path)
            say(f"warning: another run has taken {old}; this one is now {self.path}", sys.stderr)

    def find_state(self, knobs):
        """Return the state of the interrupted run, or None if there is none. If the run is
        complete, say so and exit. knobs: the names that its config must have."""
        if os.path.exists(f"{self.path}.state"):
            state = load_object(f"{self.path}.state")
            check(isinstance(state, dict) and set(state.get("config", ())) == knobs
                  and "vocab" in state,
                  f"{self.path}.state is of another version: remove it to start afresh")
            return state
        if self.path.is_file():
            say(f"{self.path} is complete. To train it further: --init_from={self.path}")
            sys.exit()
        say(f"no interrupted run of {self.path} to resume: starting afresh")

    def restore_state(self, run, state, data):
        """Set the fields of a Run to those that were saved."""
        check(state.get("crc32") == data.meta["crc32"],
              f"the data are not those of the interrupted run of {self.path}: give its --dataset")
        try:
            for name, part in parts_of(run).items():
                part.load_state_dict(state[name])
            for name in PLAIN:
                setattr(run, name, state[name])
            self.id = state["id"]
        except Exception as e:  # the file may hold anything
            raise ValueError(f"{self.path}.state is damaged: remove it to start afresh") from e
        say(f"resuming {self.path} at iteration {run.iteration:,}")

    def move_old_files_aside(self):
        """Rename what an earlier run left here to a free name."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        backup, ends = free_name(self.path), existing(self.path)
        for end in ends:
            os.rename(f"{self.path}{end}", f"{backup}{end}")
        if ends:
            how = f"; to go on with it: --save_filename={backup} --resume" * (".state" in ends)
            say(f"kept the existing {self.path} as {backup}{how}")

    def finish(self, run, data, interrupted):
        """Say how the run ended; if it is complete, remove its state."""
        if interrupted:
            holds = "the best model so far" if run.history else "the model as it is now"
            say(f"interrupted at iteration {run.iteration:,}; {self.path} holds {holds}. To go on, "
                "give the same command with --resume")
        else:
            try:
                os.unlink(f"{self.path}.state")
            except OSError as e:
                say(f"warning: {self.path}.state is no longer needed ({e.strerror})", sys.stderr)
            row, puzzle = best(run.history), side_of(data.record) and not run.ema.config.causal
            how = " --infill=assets/puzzle.txt" if puzzle else ""
            say(f"done in {run.minutes:.1f} minutes: iteration {row['iteration']:,} is the best, "
                f"{row['val']:.4f} nats per character on validation. Now: python main.py "
                f"--path={shlex.quote(str(self.path))}{how}")


# -----------------------------------------------------------------------------
# the terminal

class Progress(tqdm):
    """A progress bar or, where stderr is no terminal, a line every 15 seconds; nothing for any
    process but the first."""

    def __init__(self, run, config, data, processes):
        self.visible = processes.rank == 0
        self.characters = config.tokens_per_iteration * data.characters_per_token
        super().__init__(total=config.max_iters, initial=run.iteration, unit="it",
                         disable=None if self.visible else True)  # None: unless it is a terminal
        self.read, self.clock, self.shown = run.iteration, time.perf_counter(), -1e9

    def show(self, iteration, loss):
        """Show the loss, the speed since the last call and, in a line, the time that is left."""
        now = time.perf_counter()
        speed = (iteration - self.read) * self.characters / (now - self.clock)
        self.read, self.clock = iteration, now
        text = f"loss {loss:.2f}, {speed:,.0f} characters/s"
        self.set_postfix_str(text, refresh=False)
        if self.visible and self.disable and now - self.shown > 15:
            self.shown, left = now, (self.total - iteration) * self.characters / speed / 60
            text += f", {left:.1f} minutes left"
            say(f"iteration {iteration:,} of {self.total:,}: {text}", sys.stderr)


@contextmanager
def stop_on_signals():
    """Note Ctrl-C and SIGTERM, which schedulers send, in the list that this yields, so that the run
    can stop after the iteration. A second signal ends it at once."""
    signals = []

    def note(number, _):
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        say("stopping soon")

    previous = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
