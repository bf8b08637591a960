"""learn/: the exercises' checks know right answers from wrong ones, and the walkthrough runs."""

import ast
import importlib.util
import itertools
import json
import re
import sys
import warnings

import pytest
import torch
from conftest import ROOT

import diffusion
import lib.data
from lib.likelihood import exact_nll
from lib.twin import next_token_losses

LEARN = ROOT / "learn"


def load(name):
    spec = importlib.util.spec_from_file_location(name, LEARN / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = load("check")
NAMES = list(check.CHECKS)


# -----------------------------------------------------------------------------
# right answers: the functions of the repository, where it has them

def average_loss(cross_entropy):
    """By drawing: forward_process and diffusion_loss on many copies of the text [0, 0]."""
    losses = torch.tensor([[cross_entropy[a, b] for b in (False, True)] for a in (False, True)])
    p = torch.stack([(-losses).exp(), 1 - (-losses).exp(), 0 * losses], dim=-1)   # (2, 2, T, 3)
    ids, g = torch.zeros(400_000, 2, dtype=torch.long), torch.Generator().manual_seed(0)

    def model(x):
        return p[x[:, 0] // 2, x[:, 1] // 2].log()
    return diffusion.diffusion_loss(model, 2, ids, *diffusion.forward_process(ids, 2, 1e-6, g))


def average_loss_by_enumeration(cross_entropy, weight=lambda p, masked: 1 / p / 2, n=1000):
    total = 0.0
    for i in range(n):
        p = (i + 0.5) / n
        for masked in itertools.product((False, True), repeat=2):
            probability = (p if masked[0] else 1 - p) * (p if masked[1] else 1 - p)
            total += probability * sum(cross_entropy[masked]) * weight(p, masked) / n
    return total


def unmask_step(model, x, mask_id, k, rows=None, **settings):
    settings = {"temperature": 0.0, "remasking": "low_confidence", **settings}
    steps = [max(1, int(n) // k) for n in (x == mask_id).sum(dim=1)]
    return torch.cat([next(diffusion.unmask(model, row[None], mask_id, n, **settings))
                      for row, n in zip(x, steps)])


def num_transfer_tokens(n_masks, steps):
    """What unmask writes, step by step."""
    rows = []
    for n in n_masks[:, 0].tolist():
        x, counts = torch.full((1, n + 1), 1).index_fill(1, torch.tensor([n]), 0), []
        for state in diffusion.unmask(lambda x: torch.zeros(*x.shape, 2), x, 1, steps):
            counts.append(int((x == 1).sum() - (state == 1).sum()))
            x = state
        rows.append(counts + [0] * (steps - len(counts)))
    return torch.tensor(rows)


def from_both_ends(noise):
    place = torch.arange(noise.shape[1])
    rank = torch.minimum(2 * place, 2 * place.flip(0) + 1)
    return -rank.float().expand(noise.shape)


def order_nll(model, ids, mask_id, order):
    def in_order(teacher, x, mask_id, steps, temperature):
        for place in order:
            teacher(x)
            x = x.index_fill(1, torch.tensor([place]), 0)
            yield x
    return exact_nll(model, ids[None], mask_id, len(ids), in_order).item() * len(ids)


def squared_forward_process(input_ids, mask_id, generator=None, p_of=lambda t: t ** 2,
                            third=lambda t: t / 2, rows=True):
    shape = (len(input_ids), 1) if rows else input_ids.shape
    t = (1 - torch.rand(shape, generator=generator)).expand(input_ids.shape)
    masked = torch.rand(input_ids.shape, generator=generator) < p_of(t)
    return torch.where(masked, mask_id, input_ids), masked, third(t)


RIGHT = [("forward_process", diffusion.forward_process),
         ("diffusion_loss", diffusion.diffusion_loss),
         ("average_loss", average_loss), ("average_loss", average_loss_by_enumeration),
         ("unmask_step", unmask_step), ("num_transfer_tokens", num_transfer_tokens),
         ("from_both_ends", from_both_ends), ("order_nll", order_nll),
         ("squared_forward_process", squared_forward_process)]


@pytest.mark.parametrize("name, answer", RIGHT)
def test_the_repository_s_own_functions_are_right(name, answer):
    verdict = check.verdict(name, answer)
    assert re.match("right. (.* )?Its counterpart: ", verdict), verdict
    [(function, path)] = re.findall(r"(\w+) in ((?:lib/)?\w+\.py)", check.CHECKS[name][1])
    assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8")


def test_every_exercise_has_a_right_answer_here():
    assert {name for name, _ in RIGHT} == set(NAMES)


# -----------------------------------------------------------------------------
# wrong answers get a hint that fits

def masked_by(p_of_rows, u_of=lambda shape, g: torch.rand(shape, generator=g)):
    """A forward process: p_of_rows(B, T, eps, generator) is p_mask, u_of the random numbers."""
    def answer(input_ids, mask_id, eps=1e-3, generator=None):
        p_mask = p_of_rows(*input_ids.shape, eps, generator).expand(input_ids.shape)
        masked = u_of(input_ids.shape, generator) < p_mask
        return torch.where(masked, mask_id, input_ids), masked, p_mask
    return answer


def linear(B, T, eps, g, shape=None):
    return (1 - eps) * torch.rand(shape or (B, 1), generator=g) + eps


def in_place(input_ids, mask_id, eps=1e-3, generator=None):
    noisy, masked, p_mask = diffusion.forward_process(input_ids, mask_id, eps, generator)
    input_ids[masked] = mask_id
    return input_ids, masked, p_mask


def exact_count(input_ids, mask_id, eps=1e-3, generator=None):
    B, T = input_ids.shape
    p_mask = linear(B, T, eps, generator).expand(B, T)
    rank = torch.rand(B, T, generator=generator).argsort(dim=1).argsort(dim=1)
    masked = rank < (p_mask * T).round()
    return torch.where(masked, mask_id, input_ids), masked, p_mask


def first_place_visible(input_ids, mask_id, eps=1e-3, generator=None):
    noisy, masked, p_mask = diffusion.forward_process(input_ids, mask_id, eps, generator)
    noisy[:, 0], masked[:, 0] = input_ids[:, 0], False
    return noisy, masked, p_mask


def third_of(change, name="forward_process"):
    def answer(*args, **kwargs):
        return change(*dict(RIGHT)[name](*args, **kwargs))
    return answer


def loss(model, mask_id, input_ids, noisy_batch, masked_indices, p_mask):
    return diffusion.diffusion_loss(model, mask_id, input_ids, noisy_batch, masked_indices, p_mask)


def changed_loss(scale=lambda ids, masked: 1, add_mask=0, **changes):
    def answer(model, mask_id, ids, noisy, masked, p_mask):
        args = dict(input_ids=ids, noisy_batch=noisy, masked_indices=masked, p_mask=p_mask)
        args |= {name: change(args) for name, change in changes.items()}
        return loss(model, mask_id + add_mask, **args) * scale(ids, masked)
    return answer


ones = dict(p_mask=lambda args: torch.ones_like(args["p_mask"]))


def per_mask(ids, masked):
    return ids.numel() / masked.sum()


def step(confidence_of=lambda logits, x0_p: x0_p, cut=True, keep=True, over_batch=False,
         k_of=lambda k: k, token_of=lambda logits: logits.argmax(dim=-1)):
    def answer(model, x, mask_id, k):
        logits = model(x)[..., :mask_id if cut else None]
        p = logits.softmax(dim=-1)
        confidence = confidence_of(logits, p.amax(dim=-1))
        if keep:
            confidence = confidence.where(x == mask_id, -torch.inf)
        if over_batch:
            chosen = diffusion.highest(confidence.view(1, -1), k * len(x)).view(x.shape)
        else:
            chosen = diffusion.highest(confidence, k_of(k))
        return torch.where(chosen & (x == mask_id), token_of(logits), x)
    return answer


def margin(logits):
    first, second = logits.softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
    return first - second


def topk_step(model, x, mask_id, k):
    confidence = model(x)[..., :mask_id].softmax(dim=-1).amax(dim=-1)
    out = x.clone()
    out.scatter_(1, confidence.topk(k, dim=1).indices, 0)
    return out


def overwritten_in_place(model, x, mask_id, k):
    x.copy_(unmask_step(model, x, mask_id, k))
    return x


def all_rewritten(model, x, mask_id, k):
    return model(x)[..., :mask_id].argmax(dim=-1)


def counts(divide):
    return lambda n_masks, steps: torch.tensor([divide(n, steps) for n in n_masks[:, 0].tolist()])


def walk(places_of=list, reveal=True, predicted=False, before=False, extra=0, reduce=sum):
    def answer(model, ids, mask_id, order):
        x, terms = torch.full_like(ids, mask_id), []
        for place in places_of(order):
            if before:
                x[place] = ids[place]
            log_p = model(x[None])[0, place, :mask_id + extra].log_softmax(dim=-1)
            terms.append(-log_p[ids[place]].item())
            if reveal:
                x[place] = log_p.argmax() if predicted else ids[place]
        return reduce(terms)
    return answer


def squared(**settings):
    return lambda *args, generator: squared_forward_process(*args, generator=generator, **settings)


WRONG = {
    "forward_process": [
        (masked_by(lambda B, T, eps, g: linear(B, T, eps, g, (1, 1))), "same in all rows"),
        (masked_by(lambda B, T, eps, g: linear(B, T, eps, g, (B, T))), "differs within a row"),
        (masked_by(lambda B, T, eps, g: torch.rand((B, 1), generator=g)), "from eps to 1"),
        (masked_by(lambda B, T, eps, g: eps + (1 - eps) * linear(B, T, 0, g) ** 2),
         "not uniform"),
        (masked_by(linear, lambda shape, g: torch.rand(shape[1], generator=g)), "same random numb"),
        (masked_by(linear, lambda shape, g: torch.rand(shape)), "pass generator=generator"),
        (exact_count, "on its own"), (in_place, "changes input_ids"),
        (third_of(lambda noisy, masked, p: (noisy, ~masked, p)), "True exactly where"),
        (third_of(lambda noisy, masked, p: (noisy, masked, p[:, 0])), "has the shape"),
        (third_of(lambda noisy, masked, p: (noisy, masked, 1.1 - p)), "of its tokens are masked"),
        (third_of(lambda noisy, masked, p: (noisy, masked, p ** 1.1)), "from eps to 1"),
        (third_of(lambda noisy, masked, p: (noisy, masked, p.clamp(max=0.9) + 0.05)), "are masked"),
        (third_of(lambda noisy, masked, p: (noisy.where(~masked, 6), masked, p)), "exactly where"),
        (third_of(lambda noisy, masked, p: (noisy.where(~masked, 0), masked, p)), "exactly where"),
        (first_place_visible, "never masked"),
        (third_of(lambda noisy, masked, p: (noisy, masked)), "three tensors"),
        (lambda *args, **kwargs: None, "returns nothing"),
        (lambda ids, mask_id: None, "TypeError")],
    "diffusion_loss": [
        (changed_loss(**ones), "does not divide by p_mask"),
        (changed_loss(per_mask, **ones), "BERT"),
        (changed_loss(per_mask), "divide by B * T"),
        (changed_loss(masked_indices=lambda args: args["masked_indices"] | True), "all tokens"),
        (changed_loss(add_mask=1), "cut its logit off"),
        (changed_loss(noisy_batch=lambda args: args["input_ids"]), "must read noisy_batch"),
        (changed_loss(p_mask=lambda args: 1 / args["p_mask"]), "multiplies by p_mask"),
        (changed_loss(lambda ids, masked: ids.numel()), "not divided by B * T"),
        (changed_loss(lambda ids, masked: ids.shape[1]), "B alone"),
        (changed_loss(lambda ids, masked: -1), "sign"),
        (changed_loss(lambda ids, masked: 1.5), "is right"),
        (lambda *args: loss(*args).item(), "no gradient"),
        (lambda *args: torch.tensor(1.0), "never calls the model"),
        (lambda *args: torch.ones(3), "one number")],
    "average_loss": [
        (lambda c: average_loss_by_enumeration(c, lambda p, masked: 1 / 2), "not divide by p_mask"),
        (lambda c: average_loss_by_enumeration(c, lambda p, masked: 1 / p), "B * T = 2"),
        (lambda c: average_loss_by_enumeration(
            c, lambda p, masked: 1 / p / max(1, sum(masked))), "number of masks"),
        (lambda c: average_loss_by_enumeration(
            c, lambda p, masked: 1 / max(1, sum(masked))), "and not by p_mask"),
        (lambda c: sum(map(sum, c.values())) / 8, "equally likely"),
        (lambda c: sum(c[True, True]) / 4, "one token is masked"),
        (lambda c: (c[True, False][0] + c[False, True][1]) / 4, "both tokens are masked")],
    "unmask_step": [
        (step(cut=False), "[MASK] among the answers"), (step(keep=False), "without a mask"),
        (step(over_batch=True), "in each row"), (step(k_of=lambda k: k + 1), "in each row"),
        (step(lambda logits, x0_p: -x0_p), "reversed"),
        (step(lambda logits, x0_p: logits.amax(dim=-1)), "logits compared"),
        (step(lambda logits, x0_p: -torch.arange(9.0).expand(x0_p.shape)), "other places"),
        (step(token_of=lambda logits: logits.argmin(dim=-1)), "but not the tokens"),
        (step(lambda logits, x0_p: margin(logits)), "other places"),
        (step(token_of=lambda logits: torch.distributions.Categorical(logits=logits).sample()),
         "not the tokens"),
        (overwritten_in_place, "changes x"), (all_rewritten, "no masks"),
        (topk_step, "no masks"), (lambda *args: None, "returns nothing")],
    "num_transfer_tokens": [
        (counts(lambda n, steps: [n // steps] * steps), "never written"),
        (counts(lambda n, steps: [-(-n // steps)] * steps), "more than there are"),
        (counts(lambda n, steps: [n] + [0] * (steps - 1)),
         "even as possible"),
        (counts(lambda n, steps: [n // steps + (i >= steps - n % steps) for i in range(steps)]),
         "come first"),
        (lambda n_masks, steps: n_masks / steps, "shape")],
    "from_both_ends": [
        (lambda noise: -from_both_ends(noise), "reversed"),
        (lambda noise: -torch.arange(noise.shape[1]).expand(noise.shape).float(), "must be"),
        (lambda noise: torch.maximum(torch.arange(noise.shape[1]), torch.arange(
            noise.shape[1] - 1, -1, -1)).expand(noise.shape), "same confidence"),
        (lambda noise: from_both_ends(noise)[0], "shape")],
    "order_nll": [
        (walk(places_of=lambda order: order[::-1]), "reversed"),
        (walk(places_of=sorted), "left to right"),
        (walk(places_of=lambda order: torch.tensor(order).argsort().tolist()), "inverse"),
        (walk(reveal=False), "nothing but masks"), (walk(predicted=True), "not a prediction"),
        (walk(before=True), "predict first"), (walk(extra=1), "[MASK]'s logit"),
        (walk(reduce=lambda terms: sum(terms) / len(terms)), "return the sum"),
        (walk(reduce=lambda terms: -sum(terms)), "sign"),
        (lambda model, ids, mask_id, order: model(ids), "the shape (B, T)"),
        (lambda model, ids, mask_id, order: next_token_losses(model, mask_id, ids[None]).sum(),
         "sees a wrong token")],
    "squared_forward_process": [
        (squared(third=lambda t: t ** 2), "third tensor is p(t);"),
        (squared(third=lambda t: t), "third tensor is t;"),
        (squared(third=lambda t: 2 / t), "third tensor is p'(t) / p(t);"),
        (squared(third=lambda t: 2 * t), "third tensor is p'(t);"),
        (squared(p_of=lambda t: t), "p(t) = t."), (squared(p_of=lambda t: t ** 3), "a third: 33%"),
        (squared(p_of=lambda t: t ** 1.9), "are masked"),
        (squared(p_of=lambda t: t.flip(0) ** 2), "masked"),
        (squared(rows=False), "differs within a row")],
}
CASES = [(name, *case) for name, cases in WRONG.items() for case in cases]


@pytest.mark.parametrize("name, answer, hint", CASES)
def test_a_plausible_wrong_answer_gets_a_hint_that_fits(name, answer, hint):
    verdict = check.verdict(name, answer)
    assert verdict.startswith("not yet: ") and hint in verdict, verdict
    assert "\n" not in verdict


def test_every_exercise_has_at_least_three_wrong_answers_here():
    assert set(WRONG) == set(NAMES) and min(map(len, WRONG.values())) >= 3


# -----------------------------------------------------------------------------
# the command line

EXERCISES = (LEARN / "exercises.py").read_text(encoding="utf-8")


@pytest.fixture
def exercises(tmp_path, monkeypatch, capsys):
    """exercises(text, *numbers) checks a file of this text; returns what is printed, and the exit
    status."""
    def run(text, *numbers):
        path = tmp_path / "exercises.py"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setattr(check, "EXERCISES", path)
        monkeypatch.setattr("sys.argv", ["check.py", *numbers])
        code = 0
        try:
            check.main()
        except SystemExit as e:
            code = e.code
        return *capsys.readouterr(), code
    return run


def test_empty_exercises_say_on_one_screen_what_to_do(exercises):
    out, err, code = exercises(EXERCISES)
    lines = out.splitlines()
    assert [line.split() for line in lines[:8]] == [[str(n), name, "empty"]
                                                    for n, name in enumerate(NAMES, 1)]
    assert "python learn/check.py 1" in lines[-1] and "learn/exercises.py" in out
    assert len(lines) <= 12 and (err, code) == ("", 0)


def test_one_exercise_is_checked_alone_and_the_next_one_is_named(exercises):
    begun = EXERCISES.replace('0.5005 in each place."""', '0.5005 in each place."""\n    eps = 0')
    out, _, _ = exercises(begun, "1", "4")
    assert len(out.splitlines()) == 5 and "1 forward_process          not yet: the function" in out
    assert "4 unmask_step              empty" in out and "check.py 1" in out


def test_after_a_right_answer_the_next_exercise_is_named(exercises):
    given = "from diffusion import *\n" + EXERCISES
    for name in ("forward_process", "diffusion_loss"):
        given = given.replace(f"def {name}(", f"def {name}_(")
    out, _, _ = exercises(given, "1", "2")
    assert out.count("right. Its counterpart") == 2 and "python learn/check.py 3" in out
    solved = "from test_learn import *\nfrom diffusion import *\n"
    out, _, _ = exercises(solved)
    assert out.count("right. ") == 8 and "You have written the algorithm." in out


def test_an_error_in_an_answer_names_its_line(exercises):
    end = 'order 0, 4, 1, 3, 2."""'
    wrong = EXERCISES.replace(end, f"{end}\n    return 1 / 0")
    line = wrong[:wrong.index("return 1 / 0")].count("\n") + 1
    out, _, code = exercises(wrong, "6")
    assert f"not yet: ZeroDivisionError: division by zero (line {line} of exercises.py)" in out
    assert code == 0


@pytest.mark.parametrize("text, numbers, message", [
    (EXERCISES, ["9"], "there is no exercise 9: give numbers from 1 to 8"),
    (EXERCISES, ["--help"], "there is no exercise --help"),
    ("x = 1\nreturn (", [], "exercises.py, line 2: "),
    ("import a_module_that_nobody_has", [], "exercises.py can't be imported: ModuleNotFound")])
def test_bad_input_gets_one_line(exercises, text, numbers, message):
    out, err, code = exercises(text, *numbers)
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: ") and message in err


@pytest.mark.parametrize("text", ["", "def diffusion_loss(*args):\n    ...\n",
                                  "def diffusion_loss(*args):\n    'Text.'\n    pass\n"])
def test_a_deleted_exercise_or_one_that_does_nothing_is_empty(exercises, text):
    assert exercises(text, "2")[0].startswith("2 diffusion_loss           empty")


def test_a_single_line_without_a_docstring_is_an_answer(exercises):
    out, _, _ = exercises("def diffusion_loss(*args):\n    return 1.0\n", "2")
    assert out.startswith("2 diffusion_loss           not yet: it never calls the model")


def test_no_answer_stands_in_the_exercises():
    """Each body is its docstring."""
    functions = [node for node in ast.parse(EXERCISES).body if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions] == NAMES
    assert all(len(f.body) == 1 and ast.get_docstring(f) for f in functions)


def test_the_script_runs_as_the_docstring_says(run):
    result = run(LEARN / "check.py", "3")
    assert result.returncode == 0 and result.stdout.startswith("3 average_loss             empty")


# -----------------------------------------------------------------------------
# the walkthrough

CELLS = json.loads((LEARN / "walkthrough.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
PROSE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]


@pytest.fixture
def notebook(monkeypatch):
    """notebook(cells, folder, names) runs cells, with a short training on the data of folder."""
    def run(cells, folder, names):
        monkeypatch.setattr(lib.data, "data_folder", lambda name: folder)
        names["data_folder"] = lib.data.data_folder
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")
            for code in cells:
                exec(code.replace("iterations = 500\n", "iterations = 3\n"), names)
        return names
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(LEARN)
    monkeypatch.setattr("sys.path", [*sys.path])
    return run


def test_the_walkthrough_runs_and_prints_what_it_shows(notebook, data_dir, capsys):
    """Nearly: probabilities depend a little on the machine, and so does, rarely, what is drawn."""
    names = notebook(CODE, data_dir, {})
    assert len(names["losses"]) == 4 and set(names["nelbos"]) == {0, 1, 2, 3}
    assert names["weighted"] == pytest.approx((names["a_first"] + names["b_first"]) / 2)
    assert names["weighted"] > names["random_order"] > names["unweighted"]    # a bound, and none
    assert not any("recording" in str(block.attn.attend) for block in names["model"].h)
    out = capsys.readouterr().out
    assert "Shall I compare thee to a summer's day?" in out
    stored = ["".join(output["text"]) for cell in CELLS if cell["cell_type"] == "code"
              for output in cell["outputs"] if output["output_type"] == "stream"]
    lines = [line for line in "".join(stored).splitlines() if not line.startswith("iteration ")]
    assert sum(line in out for line in lines) > 0.8 * len(lines)


def test_without_the_text_the_walkthrough_skips_the_training(notebook, tmp_path, capsys):
    [training] = [code for code in CODE if code.startswith("iterations = 500\n")]
    notebook([training], tmp_path, {})
    assert "There is no text yet: run python data/shakesp" in capsys.readouterr().out


def test_the_walkthrough_says_what_to_do_without_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="Clone it"):
        exec(CODE[0], {})


def test_the_walkthrough_reads_well_without_being_run():
    """It was run from top to bottom, and holds its outputs and pictures; it is short enough."""
    cells = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert (LEARN / "walkthrough.ipynb").stat().st_size < 700_000
    assert len(" ".join(PROSE).split()) <= 1800
    headings = [line for text in PROSE for line in text.splitlines() if line.startswith("## ")]
    assert [line.split()[1] for line in headings] == [f"{n}." for n in range(1, 11)]


def test_files_that_learn_names_exist():
    questions = (LEARN / "questions.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\((?!https?:)([^)#]+)\)", "\n".join([*PROSE, questions])):
        assert (LEARN / name).exists(), name


def test_each_answer_to_a_question_is_short():
    answers = (LEARN / "questions.md").read_text(encoding="utf-8")
    assert len(answers.split()) <= 1200
    answers = re.sub(r"\n## .*", "", answers)
    for answer in re.split(r"\n\*\*.*?\*\* ?", answers, flags=re.DOTALL)[1:]:
        assert len(answer.split()) <= 90, answer
