"""
Pairs of a prompt and an answer, for models that answer and know where an answer ends. A record is
the prompt, filled up with END at its left; ANSWER; and the answer, filled up with END at its right.
"""

import sys

RECORD, PROMPT = 256, 128       # tokens of a record, and of its prompt with ANSWER
ANSWER, END = "\x02", "\x03"    # the ASCII control characters STX and ETX


def prompt_tokens(text):
    """Return the part of a record before the answer. Of a text that is too long, the end counts."""
    return text[-(PROMPT - 1):].rjust(PROMPT - 1, END) + ANSWER


def readable(record):
    """Return the text of a record as prompt -> answer."""
    prompt, _, answer = record.partition(ANSWER)
    return f"{prompt.lstrip(END)} -> {answer.split(END)[0]}"


def at_terminal():
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def converse(answer):
    """Read lines from the terminal until Ctrl-D, and print what answer(text) returns for each; text
    is the exchange so far."""
    exchange = ""
    while True:
        try:
            line = input("> ") + "\n"
            exchange += line + answer(exchange + line.rstrip("\n")) + "\n"
        except EOFError:
            return print()
        except ValueError as e:  # a character that the model does not know
            print(e, file=sys.stderr)
