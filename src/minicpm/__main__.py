"""`python -m minicpm` is the command `minicpm`."""

from __future__ import annotations

from minicpm.cli.main import main

if __name__ == "__main__":
    main()
