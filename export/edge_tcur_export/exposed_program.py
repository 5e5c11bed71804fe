"""An ExecuTorch program with its inner values as outputs, compared one by one with what torch computed.

`edge_tcur_export.program_divergence` writes both and starts this module as a process of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.numpy import load_file

from edge_tcur_export.exposed import FEED, VALUE, distance
from edge_tcur_runtime.engines.executorch import import_training


def output_errors(program: Path, reference: Path) -> list[float]:
    """How far each output of a program is from the reference, relative to its largest entry: the worst of two
    runs. Values that are outputs share no memory, and it is zero at first: a kernel that adds to what lies
    there (the backward pass of max pooling in ExecuTorch 1.5.1) is right in a first run.

    Args:
        program: a ``.pte`` file with its weights.
        reference: safetensors: ``feed/<place>`` of each input, ``value/<place>`` of each output.
    """
    torch, _, portable_lib = import_training()
    tensors = load_file(reference)
    feeds, values = (
        [tensors[f"{kind}{place}"] for place in range(sum(name.startswith(kind) for name in tensors))]
        for kind in (FEED, VALUE)
    )
    module = portable_lib._load_for_executorch(str(program))
    errors = [0.0] * len(values)
    for _ in range(2):
        outputs = module.run_method("forward", [torch.from_numpy(value) for value in feeds])
        found = [distance(output.numpy(), value) for output, value in zip(outputs, values, strict=True)]
        errors = [max(pair) for pair in zip(errors, found, strict=True)]
    return errors


if __name__ == "__main__":
    sys.stdout.write(json.dumps(output_errors(Path(sys.argv[1]), Path(sys.argv[2]))) + "\n")
