"""Privacy accounting on the command line: ``python -m dpkit.accountants epsilon|delta|calibrate|tradeoff``."""

from __future__ import annotations

import argparse
import sys

from . import commands


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0, or 2 with the reason on standard error (with --json, on standard output)."""
    parser = argparse.ArgumentParser(prog="python -m dpkit.accountants", description=__doc__)
    commands.add_to(parser.add_subparsers(dest="command", required=True), parser.prog)
    return commands.shown(parser.parse_args(argv), sys.stdout, sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
