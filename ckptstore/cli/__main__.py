"""``python -m ckptstore.cli`` is the command ``ckptstore``."""

from __future__ import annotations

from ckptstore.cli.main import main

if __name__ == "__main__":
    main()
