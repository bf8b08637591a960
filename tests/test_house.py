"""The rules of this house: which file may import which, what an import may do, and how long things
may be."""

import ast
import io
import re
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

import diffusion
import main as main_script
import train as train_script

FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), *ROOT.glob("data/*/*.py")])
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
MODULES = [name.removesuffix(".py").replace("/", ".") for name in NAMES
           if not name.startswith("data") and not name.endswith("__init__.py")]
OWN = {name.split(".")[0] for name in MODULES}


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def modules_of(name):
    """Return the names of all modules that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(tree_of(ROOT / name)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def imports_of(name):
    """Return the first parts of these names."""
    return {module.split(".")[0] for module in modules_of(name)}


def reached_from(name):
    """Return the files of ours that a file needs, directly or through others, and itself."""
    files = {name}
    while new := {f"{module.replace('.', '/')}.py" for file in files
                  for module in modules_of(file) if module in MODULES} - files:
        files |= new
    return files


def functions_of(path):
    return [node for node in ast.walk(tree_of(path))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_the_files_are_found():
    assert {"diffusion.py", "model.py", "train.py", "main.py", "lib/common.py", "lib/run.py",
            "data/sudoku/prepare.py", "data/shakespeare_char/prepare.py"} <= set(NAMES)
    assert OWN == {"diffusion", "model", "train", "main", "lib"}


# -----------------------------------------------------------------------------
# arrows point down: train, main -> lib -> model, diffusion

@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("lib/")])
def test_lib_does_not_import_the_scripts(name):
    assert not imports_of(name) & {"train", "main"}


@pytest.mark.parametrize("name", ["diffusion.py", "model.py"])
def test_the_algorithm_and_the_network_need_torch_alone(name):
    """So each can be copied into another project."""
    assert imports_of(name) - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("data/")])
def test_the_prepare_scripts_do_not_wait_for_torch(name):
    files = reached_from(name)
    assert "lib/common.py" in files and "lib/tokenizer.py" in files
    assert [file for file in files if "torch" in imports_of(file)] == []


def test_the_scripts_do_not_import_each_other():
    assert "main" not in imports_of("train.py") and "train" not in imports_of("main.py")


def test_the_algorithm_can_be_imported_from_the_script_that_uses_it():
    for script, names in ((train_script, ("forward_process", "diffusion_loss")),
                          (main_script, ("unmask",))):
        for name in names:
            assert getattr(script, name) is getattr(diffusion, name)


# -----------------------------------------------------------------------------
# an import does nothing but define

IMPORTS = """
import importlib, os, random, signal, sys
import numpy, torch, tqdm, torch.distributed, torch.nn.parallel

def state():
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return dict(
        signals=[signal.getsignal(number) for number in sorted(signal.valid_signals())],
        hooks=[sys.excepthook, sys.stdout, sys.stderr, sys.stdin, sys.argv[:]],
        environment=dict(os.environ), folder=os.getcwd(), path=sys.path[:],
        draws=[hash(random.getstate()), numpy.random.get_state()[2],
               hash(bytes(torch.get_rng_state()))],
        torch=[torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device(),
               torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
               torch.get_float32_matmul_precision(), torch.is_anomaly_enabled()],
        attention=[cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
                   cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
                   cuda.fp16_bf16_reduction_math_sdp_allowed()],
        kernels=[cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic])

import lib                                 # which sets two defaults, and says so
before = state()
for name in sys.argv[1:]:
    for module in [m for m in sys.modules if m.split(".")[0] in OWN and m != "lib"]:
        del sys.modules[module]          # so that each is imported first
    importlib.import_module(name)
    after = state()
    for what in before:
        assert before[what] == after[what], f"to import {name} changes {what}"
"""


def test_importing_a_module_prints_nothing_and_changes_no_global_state():
    run = subprocess.run([sys.executable, "-c", f"OWN = {OWN}" + IMPORTS, *MODULES], cwd=ROOT,
                         capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


# -----------------------------------------------------------------------------
# how long things may be: what CONTRIBUTING.md says of it

CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
[LIMITS] = re.findall(r"\* \*\*Limits\*\*.*?(?=\n\* )", CONTRIBUTING, re.DOTALL)
LIMITS = LIMITS.replace("\n ", "")
LINES_OF_CODE = {name: int(n) for name, n in re.findall(r"`([\w.]+)` (\d+)", LIMITS)}


def limit(sentence):
    """Return the number that stands for N in a sentence of the limits."""
    [number] = re.findall(re.sub(r"\bN\b", r"([\\d,]+)", sentence), LIMITS)
    return int(number.replace(",", ""))


def code_of(path):
    """Return the numbers of the lines of a file on which there is anything but comments and
    docstrings."""
    text = path.read_text(encoding="utf-8")
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER}
    code = {token.start[0] for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type not in layout}
    for node in ast.walk(ast.parse(text)):
        may_have_one = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if may_have_one and ast.get_docstring(node):
            code -= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return code


def test_lines_of_code_are_counted_without_comments_docstrings_and_empty_lines(tmp_path):
    path = tmp_path / "a.py"
    path.write_text('"""Two\nlines."""\n\nimport a  # one\n\ndef f(x,\n      y):\n'
                    '    """One."""\n    # none\n    return (x +\n            y)\n')
    assert code_of(path) == {4, 6, 7, 10, 11}


def test_the_four_files_and_the_sampler_have_their_limits():
    assert set(LINES_OF_CODE) == {"model.py", "diffusion.py", "train.py", "main.py", "unmask"}


@pytest.mark.parametrize("name", LINES_OF_CODE)
def test_no_file_has_more_lines_of_code_than_its_limit(name):
    path = ROOT / name if name.endswith(".py") else ROOT / "diffusion.py"
    lines = code_of(path)
    if path.name != name:
        [function] = [f for f in functions_of(path) if f.name == name]
        lines &= {*range(function.lineno, function.end_lineno + 1)}
    assert len(lines) <= LINES_OF_CODE[name]


def test_all_files_together_have_no_more_lines_of_code_than_their_limit():
    assert sum(len(code_of(path)) for path in FILES) <= limit("`lib/` and `data/` together N")


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_line_is_too_long(path):
    most, lines = limit("at most N columns"), path.read_text(encoding="utf-8").splitlines()
    assert [f"line {i}" for i, line in enumerate(lines, 1) if len(line) > most] == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_function_is_too_long(path):
    assert [f"{f.name}: {f.end_lineno - f.lineno + 1} lines" for f in functions_of(path)
            if f.end_lineno - f.lineno + 1 > limit("No function has more than N lines")] == []


def count_arguments(function):
    a = function.args
    return (len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs) + (a.vararg is not None)
            + (a.kwarg is not None))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_function_but_unmask_takes_too_many_arguments(path):
    most = limit("or N arguments .`unmask` excepted")
    assert [f"{f.name}: {count_arguments(f)} arguments" for f in functions_of(path)
            if count_arguments(f) > most and f.name != "unmask"] == []


def test_every_file_says_at_its_top_what_it_is_for():
    assert [name for name, path in zip(NAMES, FILES) if not ast.get_docstring(tree_of(path))] == []
