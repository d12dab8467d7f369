"""How a command begins and ends: its parser, and what becomes of all that goes wrong."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from typing import Callable, NoReturn

from sglang_vlkv.commands import Problem
from sglang_vlkv.printable import printable

FAILED, INTERRUPTED = 2, 130  # exit statuses


class Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong with a command line."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: {printable(message)} (--help says more)\n")


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Makes a program's ``main`` return an exit status whatever happens to it.

    A :class:`Problem`, and a file that cannot be read or written, are one sentence on standard error and the
    status 2; so is a command line that :class:`Parser` refuses.
    """

    @functools.wraps(main)
    def run(*arguments, **options) -> int:
        # A terminal of another encoding shows the rest.
        sys.stdout.reconfigure(errors="backslashreplace")
        try:
            status = main(*arguments, **options) or 0
            sys.stdout.flush()
            return status
        except Problem as problem:
            return complain(problem)
        except BrokenPipeError:  # nobody reads on, and Python would say so when it flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return complain(f"{where}{error.strerror or error}.")
        except KeyboardInterrupt:
            return INTERRUPTED

    return run


def complain(problem: object) -> int:
    """Tells the problem; the exit status that goes with it."""
    print(printable(problem), file=sys.stderr)
    return FAILED
