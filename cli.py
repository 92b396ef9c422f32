#!/usr/bin/env python3
"""Launcher: ``./cli.py match ...`` is ``difftap match ...``, run by the checkout's own .venv where there is one."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
PYTHON = VENV / "bin" / "python"

if __name__ == "__main__":
    if PYTHON.exists() and Path(sys.prefix).resolve() != VENV:
        os.execv(PYTHON, [str(PYTHON), str(HERE / "cli.py"), *sys.argv[1:]])
    sys.path.insert(0, str(HERE))
    try:
        from difftap.cli import main
    except ImportError as error:
        sys.exit(f"error: difftap's requirements are not installed ({error}); run 'make setup' first")
    main()
