"""`python -m edge_tcur_runtime` is `edge-tcur-device`."""

from __future__ import annotations

from edge_tcur_runtime.cli import main

if __name__ == "__main__":
    main()
