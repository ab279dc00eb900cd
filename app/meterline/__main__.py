"""`python -m meterline` is the command `meterline`."""

from __future__ import annotations

from meterline.cli.main import main

if __name__ == "__main__":
    main()
