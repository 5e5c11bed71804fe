"""`python -m edge_tcur` is `edge-tcur`."""

from __future__ import annotations

from edge_tcur.cli import main

if __name__ == "__main__":
    main()
