"""Peak memory of a step under each session setting: ``python tests/benchmarks/session_memory.py BUNDLE``.

Each row is a fresh process that loads ``step.onnx`` and runs one step of 16 samples (of 32 tokens) with the
bundle's adapter. The first two rows are the import of ONNX Runtime alone, as it comes and as the
runtime does it. Peaks are VmHWM.
"""

import argparse
import subprocess
import sys
from pathlib import Path

_SETTINGS = {  # name -> (prepacking off, constant folding off, arena and memory patterns off)
    "defaults": (False, False, False),
    "no arena, no patterns": (False, False, True),
    "and no prepacking": (True, False, True),
    "and no constant folding (ours)": (True, True, True),
}


def run_child(mode: str, bundle: Path) -> None:
    from edge_tcur_runtime.budget import read_memory

    if mode == "plain import":
        import onnxruntime  # noqa: F401
    elif mode == "our import":
        from edge_tcur_runtime.engines.session import import_onnxruntime

        import_onnxruntime()
    else:
        run_step(mode, bundle)
    sys.stdout.write(f"{read_memory().peak}\n")


def run_step(mode: str, root: Path) -> None:
    import numpy as np

    from edge_tcur_runtime.engines.session import import_onnxruntime
    from edge_tcur_runtime.formats.bundle import open_bundle
    from edge_tcur_runtime.personalize import bundle_adapter

    bundle = open_bundle(root)
    prepacking_off, folding_off, arena_off = _SETTINGS[mode]
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = options.enable_mem_pattern = not arena_off
    if prepacking_off:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if folding_off:
        options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    session = onnxruntime.InferenceSession(
        str(bundle.graph("step")), options, providers=["CPUExecutionProvider"]
    )
    sizes = {"batch": 16, "sequence": 32}
    feeds = {**bundle_adapter(bundle).tensors(), "labels": np.zeros(16, np.int64)}
    for name, spec in bundle.manifest.inputs.items():
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        feeds[name] = np.ones(shape, spec.dtype)
    session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options.child, options.bundle)
        return
    for mode in ("plain import", "our import", *_SETTINGS):
        command = [sys.executable, __file__, str(options.bundle), "--child", mode]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        sys.stdout.write(f"{mode:<32}{int(done.stdout) / 2**20:8.0f} MiB\n")


if __name__ == "__main__":
    main()
