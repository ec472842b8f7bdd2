"""dpkit on the command line: what a run will cost or has cost, and what that means. ``dpkit COMMAND --help`` says more.

Exit codes: 0; 1 if a budget is exceeded; 2 with what was seen, why it matters and the cure, on standard error (with
--json on standard output).
"""

from __future__ import annotations

import argparse
import sys

from dpkit.accountants import commands

from . import __version__, reports
from .errors import PrivacyError


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    about, _, codes = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="dpkit", description=about, epilog=codes)
    parser.add_argument("--version", action="version", version=f"dpkit {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True)
    commands.add_to(parsers, parser.prog)
    reports.add_to(parsers, parser.prog)
    return commands.shown(parser.parse_args(argv), sys.stdout, sys.stderr, (PrivacyError,))


if __name__ == "__main__":
    sys.exit(main())
