"""
How long does a page take beside other programs that keep the cores busy? With the default spin of
PyTorch's threads on Linux, and with the short one that lib/__init__.py sets.

    python tests/benchmarks/busy.py              # beside no, two and six busy loops
    python tests/benchmarks/busy.py --busy=0,4 --pages=5

Each number is the median of some pages (--pages), in seconds of sampling, without the start of
Python. Run it on a quiet machine: the busy loops are its own.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIDES = {"default spin": {"GOMP_SPINCOUNT": "300000"}, "short spin": {}}


def seconds_of_a_page(environment):
    page = subprocess.run([sys.executable, str(ROOT / "main.py")], check=True, text=True,
                          capture_output=True, env={**os.environ, **environment})
    return float(re.search(r"steps in ([\d.]+) s", page.stderr)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", default="0,2,6", help="numbers of busy loops, between commas")
    parser.add_argument("--pages", type=int, default=3, help="per number")
    args = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores\n\n| busy loops | "
          + " | ".join(SIDES) + " | ratio |\n|---|---|---|---|", flush=True)
    for n in map(int, args.busy.split(",")):
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
        try:
            seconds = [statistics.median(seconds_of_a_page(environment) for _ in range(args.pages))
                       for environment in SIDES.values()]
        finally:
            for loop in loops:
                loop.kill()
        print(f"| {n} | {seconds[0]:.1f} | {seconds[1]:.1f} | {seconds[0] / seconds[1]:.1f} |",
              flush=True)


if __name__ == "__main__":
    main()
