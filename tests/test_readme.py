"""What the README shows must be what the code is."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_listing_is_the_code_s_own():
    listing = re.search(r"```python\n(def forward_process.*?)```", README, re.DOTALL).group(1)
    code = re.sub(r'    """.*?"""\n', "", (ROOT / "train.py").read_text(encoding="utf-8"), flags=re.DOTALL)
    functions = [part.strip() for part in re.split(r"\n\n+", listing)]
    assert len(functions) == 3
    for function in functions:
        assert function in code, function


def test_flags_and_files_that_it_names_exist():
    names = ("train.py", "main.py", "data/shakespeare_char/prepare.py")
    scripts = "".join((ROOT / name).read_text(encoding="utf-8") for name in names)
    for flag in set(re.findall(r"--(\w+)", README)) - {"help", "standalone", "nproc_per_node"}:
        assert f"    {flag}: " in scripts or f'"--{flag}"' in scripts, flag
    for path in set(re.findall(r"\b(?:tests|data|assets)/[\w/.]*\w", README)) - {"data/mine"}:
        assert (ROOT / path).exists(), path
