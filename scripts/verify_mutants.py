"""Change checkpoints in one place at a time, and list what `pessa verify --level weights` says to each change.

    python scripts/verify_mutants.py
    python scripts/verify_mutants.py --only llama

Dense, factored and compact tiny models are changed: a tensor, a value of a config, a token. The exit code is 1 if
verify misses a change, or reports one that leaves the model the same. The changes are in tests/helpers/altered.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

import altered


def main() -> int:
    """Run all changes; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="pairs whose name contains this")
    parser.add_argument("--wide", action="store_true", help="print all that verify says, not 120 characters of it")
    arguments = parser.parse_args()
    wrong = noticed = accepted = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, pair in altered.pairs(place).items():
            if arguments.only not in name:
                continue
            for change in altered.changes(pair.candidate):
                found = altered.said(pair, change, place)
                noticed += bool(found)
                wrong += not found
                shown = found.replace(str(place), "") if arguments.wide else found.replace(str(place), "")[:120]
                print(f"{'noticed' if found else 'MISSED '}  {name}: {change.name}: {shown}")
            for change in altered.harmless(pair.candidate):
                found = altered.said(pair, change, place)
                accepted += not found
                wrong += bool(found)
                print(f"{'REPORTED' if found else 'the same'}  {name}: {change.name}: {found.replace(str(place), '')}")
    print(f"{noticed} changes noticed, {accepted} harmless ones accepted, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
