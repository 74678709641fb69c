"""`python -m pessa_cli` is the `pessa` command."""

from __future__ import annotations

from pessa_cli.cli.main import main

if __name__ == "__main__":
    main()
