"""Fixtures of the workstation's tests."""

import json

import pytest

from edge_tcur.cli import edge_tcur
from edge_tcur_runtime.cli.framework import run


@pytest.fixture
def cli(capsys):
    """Runs `edge-tcur`; returns exit code, stdout (parsed with --json) and stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            run(edge_tcur, list(map(str, arguments)))
        out, err = capsys.readouterr()
        return caught.value.code, json.loads(out) if "--json" in arguments else out, err

    return call
