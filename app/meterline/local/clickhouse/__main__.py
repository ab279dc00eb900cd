"""`python -m meterline.local.clickhouse --tcp PORT --http PORT --data-dir DIR`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from meterline.errors import UserError
from meterline.local.clickhouse.server import serve


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m meterline.local.clickhouse", description=__doc__)
    parser.add_argument("--tcp", type=int, required=True, help="port of the native protocol")
    parser.add_argument("--http", type=int, required=True, help="port of the HTTP interface")
    parser.add_argument("--data-dir", type=Path, required=True, help="where the tables are")
    arguments = parser.parse_args()
    try:
        serve(arguments.tcp, arguments.http, arguments.data_dir)
    except UserError as error:
        sys.exit(f"Error: {error}")
    # The engine's own threads may still work for clients that were cut; nothing they do now is acknowledged.
    os._exit(0)


if __name__ == "__main__":
    main()
