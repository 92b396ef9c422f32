#!/usr/bin/env python3
"""Launcher: ``./cli.py match ...`` is ``difftap match ...``, from a checkout with its .venv or any environment."""

import os
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_OWN_PYTHON = _HERE / ".venv" / "bin" / "python"

if __name__ == "__main__":
    try:
        import click  # noqa: F401 - the cheapest sign of an environment that has our requirements
    except ImportError:
        if _OWN_PYTHON.exists() and Path(sys.prefix) != _HERE / ".venv":
            os.execv(_OWN_PYTHON, [str(_OWN_PYTHON), str(_HERE / "cli.py"), *sys.argv[1:]])
        sys.exit("error: difftap's requirements are not installed; run 'make setup' first")
    sys.path.insert(0, str(_HERE))
    from difftap.cli import main

    main()
