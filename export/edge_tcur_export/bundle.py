"""`export`: from a training run to a bundle that a device can open, verified before it appears."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from safetensors.numpy import save

from edge_tcur import __version__
from edge_tcur.errors import ExportError
from edge_tcur.method.targets import Group, find_targets, saved_parameters
from edge_tcur.models import Base
from edge_tcur.tasks import find_task
from edge_tcur.training.evaluate import apply_adapter, load_run_base
from edge_tcur.training.run import ADAPTER_FILE, Run, new_directory
from edge_tcur.training.train import set_threads, value_of
from edge_tcur_devices import load_profile
from edge_tcur_export import graph as graphs
from edge_tcur_export.base_file import BaseFile
from edge_tcur_export.executorch import (
    BACKENDS,
    ProgramReport,
    ProgramWriter,
    require_executorch,
    tensor_file,
)
from edge_tcur_export.ort_training import check_gradients, write_artifacts
from edge_tcur_export.parity import OPTIMIZER, STEPS, Case, verify_bundle
from edge_tcur_export.trace import (
    EXAMPLE_LENGTH,
    Example,
    FactorModel,
    Traced,
    make_example,
    stored_weight,
    trace_forward,
    trace_step,
)
from edge_tcur_runtime.errors import UsageError
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import (
    BASE_FILE,
    MANIFEST,
    BundleGroup,
    FileEntry,
    Manifest,
    TensorPlace,
    serialize_manifest,
)
from edge_tcur_runtime.formats.digest import digest_file
from edge_tcur_runtime.formats.factors import INDEX_PARTS, SKETCH, factor_parts
from edge_tcur_runtime.installed import version_of
from edge_tcur_runtime.preprocess import build_preprocessor

TARGETS = ("onnx", "step", "ort-training")
EXECUTORCH = "executorch"
ALL_TARGETS = (*TARGETS, EXECUTORCH)
ADAPTER_PTD = "adapter.ptd"
CANARY = "canary.safetensors"
EXTRAS = "extras.safetensors"
_VERSIONS = ("torch", "onnx", "onnxscript", "transformers", "onnxruntime-training-cpu", "executorch")
_LONGEST = 128  # tokens that ExecuTorch's programs reserve memory for unless told otherwise
_SAMPLES = 3  # of the example that is traced
_CANARY_TEXTS = ("The quick brown fox jumps over the lazy dog.", "What can you do for me today?")


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        root: the bundle.
        manifest: its manifest.
        parity: target -> largest relative error against torch per quantity; empty when not verified.
        graph_bytes: graph file -> bytes without the base.
        base_bytes: bytes of ``base.bin``.
        adapter_bytes: bytes of the adapter file.
        seconds: of the whole export; `stages`: of each stage.
        executorch: ExecuTorch's programs; empty where they were not asked for.
    """

    root: Path
    manifest: Manifest
    parity: Mapping[str, Mapping[str, float]]
    graph_bytes: Mapping[str, int]
    base_bytes: int
    adapter_bytes: int
    seconds: float
    stages: Mapping[str, float] = field(default_factory=dict)
    executorch: ProgramReport = field(default_factory=ProgramReport)

    def to_dict(self) -> dict[str, object]:
        """JSON values; sizes in bytes."""
        return {
            "bundle": str(self.root),
            "base_digest": self.manifest.base_digest,
            "parity": {target: dict(errors) for target, errors in self.parity.items()},
            "graph_bytes": dict(self.graph_bytes),
            "base_bytes": self.base_bytes,
            "adapter_bytes": self.adapter_bytes,
            "files": {name: asdict(entry) for name, entry in self.manifest.files.items()},
            "seconds": self.seconds,
            "stages": dict(self.stages),
            "executorch": asdict(self.executorch),
        }


@dataclass(frozen=True)
class ProgramSettings:
    """What the target ``executorch`` is given.

    Attributes:
        backends: out of `BACKENDS`.
        max_batch: samples that memory is reserved for; 0: the batch size of the run.
        max_length: tokens that memory is reserved for; 0: the base's, at most 128.
    """

    backends: tuple[str, ...] = BACKENDS
    max_batch: int = 0
    max_length: int = 0

    def limits(self, run: Run, base: Base, *, batch: int) -> dict[str, int]:
        """Largest size of each dynamic axis, none below that of the example that is traced.

        Args:
            batch: of the example.

        Raises:
            UsageError: an unknown backend, or a limit below the example's or above the base's.
        """
        unknown = set(self.backends) - set(BACKENDS)
        if unknown or not self.backends:
            raise UsageError(f"the backends are {', '.join(self.backends)}; expected {', '.join(BACKENDS)}")
        limits = {"batch": self.max_batch or max(batch, run.config.batch_size)}
        if limits["batch"] < batch:
            raise UsageError(f"--max-batch {self.max_batch}: expected at least {batch}")
        if "max_length" in base.preprocessing:
            longest = int(base.preprocessing["max_length"])
            limits["sequence"] = self.max_length or min(longest, _LONGEST)
            if not min(EXAMPLE_LENGTH, longest) <= limits["sequence"] <= longest:
                raise UsageError(f"--max-length {self.max_length}: expected {EXAMPLE_LENGTH} to {longest}")
        return limits


class _Stages:
    """Names each stage as it begins, and keeps its seconds."""

    def __init__(self, on_stage: Callable[[str], None] | None) -> None:
        self._on_stage = on_stage
        self._name: str | None = None
        self._since = self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def begin(self, name: str | None) -> None:
        """Ends the stage that runs and begins the next one; None ends the last."""
        now = time.perf_counter()
        if self._name is not None:
            self.seconds[self._name] = now - self._since
        self._name, self._since = name, now
        if name is not None and self._on_stage is not None:
            self._on_stage(name)


def export_run(
    run: Run,
    out: Path,
    *,
    targets: tuple[str, ...] = TARGETS,
    device: str | None = None,
    verify: bool = True,
    force: bool = False,
    programs: ProgramSettings | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> ExportReport:
    """Exports the frozen base and the factors of a run separately.

    Args:
        run: a finished training run.
        out: the bundle's directory; appears whole or not at all.
        targets: out of `ALL_TARGETS`; the inference graph (``onnx``) is always written.
        device: name of a device profile, or the path of one; recorded, and its memory compared.
        verify: compare every graph with torch in a fresh process before the bundle appears.
        force: replace what is at `out`.
        programs: of the target ``executorch``; None takes the defaults.
        on_stage: called with the name of each stage, for progress.

    Raises:
        BaseMismatchError: the base changed since training.
        ExportError: the model cannot be traced, or a graph does not agree with torch.
        OutputExistsError, DiskError: `out` cannot be written; nothing is left behind.
    """
    unknown = set(targets) - set(ALL_TARGETS)
    if unknown:
        raise UsageError(f"unknown target {unknown.pop()!r}; expected {', '.join(ALL_TARGETS)}")
    if EXECUTORCH in targets:
        require_executorch()
    stages = _Stages(on_stage)
    stages.begin("loading the base")
    profile = load_profile(device) if device is not None else None
    set_threads(run.config.threads)
    adapter, base = run.adapter(), load_run_base(run)
    with new_directory(out, force=force) as work:
        writer = _Writer(run, base, adapter, work, stages, programs or ProgramSettings())
        manifest = writer.write(targets, None if profile is None else profile.name)
        parity = {}
        if verify:
            stages.begin("comparing with torch in a fresh process")
            parity = verify_bundle(work, writer.cases, programs=bool(manifest.programs))
        stages.begin("moving the bundle into place")
    stages.begin(None)
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    return ExportReport(
        root=out,
        manifest=manifest,
        parity=parity,
        graph_bytes={name: size for name, size in sizes.items() if name.endswith(".onnx")},
        base_bytes=sizes[BASE_FILE],
        adapter_bytes=sizes[ADAPTER_FILE],
        seconds=time.perf_counter() - stages.started,
        stages=stages.seconds,
        executorch=writer.programs,
    )


class _Writer:
    """Writes one bundle into `work`."""

    def __init__(
        self,
        run: Run,
        base: Base,
        adapter: Adapter,
        work: Path,
        stages: _Stages,
        settings: ProgramSettings,
    ) -> None:
        self._run, self._base, self._adapter, self._work, self._stages = run, base, adapter, work, stages
        self._settings, self.programs = settings, ProgramReport()
        self._task = find_task(run.config.task)
        self._groups: tuple[Group, ...] = find_targets(base.model, run.config.method(), keep=base.head).groups
        if base.tokenizer is not None:
            (work / "tokenizer.json").write_text(base.tokenizer, encoding="utf-8")
        (work / ADAPTER_FILE).write_bytes(run.adapter_path.read_bytes())
        self._write_canary()
        self._config = run.config.method()

        def rank(group: Group) -> int:
            return adapter.factors[group.name].rank

        def make(rank_of: Callable[[Group], int], batch: int, seed: int) -> Example:
            return make_example(base, self._groups, rank_of, batch=batch, seed=seed, config=self._config)

        # Sizes of 1 are taken as constants by the tracer, so it is shown larger ones.
        self._example = make(lambda group: min(max(2, rank(group)), group.n1, group.n2), _SAMPLES, 0)
        self._tests = [
            make(rank, _SAMPLES, 0),
            make(lambda group: max(1, rank(group) // 2), 5, 1),
            make(rank, 1, 2),
        ]
        saved = saved_parameters(base.model, self._config.modules_to_save)
        self._saved = {name: value_of(value) for name, value in saved.items()}
        extras = base.extra_parameters(self._config.modules_to_save)
        self._extras = {name: tuple(value.shape) for name, value in extras.items()}
        self.cases: list[Case] = []

    def write(self, targets: tuple[str, ...], device: str | None) -> Manifest:
        """Writes graphs, base file and manifest."""
        stages = self._stages
        limits = self._settings.limits(self._run, self._base, batch=_SAMPLES)
        stages.begin("tracing the forward pass")
        model = FactorModel(self._base, self._groups, self._task, self._config)
        example = self._example
        forward = trace_forward(model, self._base, self._groups, self._task, example)
        self.cases = [_case(model, test) for test in self._tests]
        stages.begin("writing the inference graph")
        converted = graphs.to_graph(forward)
        if "ort-training" in targets:
            check_gradients(converted, example.trained())
        base_file = BaseFile(self._work)
        roles = {"infer": self._write_infer(graphs.clone(converted), base_file)}
        if "step" in targets:
            stages.begin("writing the step graph (forward and backward)")
            roles["step"] = self._write_step(forward, example, base_file)
        if "ort-training" in targets:
            stages.begin("writing ONNX Runtime Training's graphs")
            values = self._trained_values()
            training = graphs.inputs_to_initializers(converted, values)
            roles |= write_artifacts(training, values, base_file, self._work)
        if EXECUTORCH in targets:
            self._write_programs(model, limits)
        stages.begin("writing the manifest")
        if self._saved:
            (self._work / EXTRAS).write_bytes(save(self._saved))
        manifest = self._manifest(roles, base_file, device)
        (self._work / MANIFEST).write_bytes(serialize_manifest(manifest))
        return manifest

    def _write_infer(self, model: ir.Model, base_file: BaseFile) -> str:
        graphs.keep_outputs(model, ("logits",))
        # Nothing fed is the base: a new head is zero there, a module trained in full has its own values.
        defaults = {name: np.zeros(shape, np.float32) for name, shape in self._extras.items()} | self._saved
        for group in self._groups:
            defaults[f"{group.name}.core"] = np.zeros((len(group.modules), 1, 1), np.float32)
            if self._adapter.header.frame == SKETCH:
                defaults[f"{group.name}.left"] = np.zeros((len(group.modules), group.n1, 1), np.float32)
                defaults[f"{group.name}.right"] = np.zeros((len(group.modules), 1, group.n2), np.float32)
            else:
                unused = np.zeros((group.blocks, 1), np.int32)
                defaults |= {f"{group.name}.{part}": unused for part in INDEX_PARTS}
        graphs.add_defaults(model, defaults)
        base_file.externalize(model, keep=frozenset(defaults))
        ir.save(model, self._work / "infer.onnx")
        return "infer.onnx"

    def _write_step(self, forward: Traced, example: Example, base_file: BaseFile) -> str:
        model = graphs.to_graph(trace_step(forward, example))
        base_file.externalize(model)
        ir.save(model, self._work / "step.onnx")
        return "step.onnx"

    def _write_programs(self, model: FactorModel, limits: Mapping[str, int]) -> None:
        """ExecuTorch's programs and the adapter as they read it."""
        writer = ProgramWriter(
            model,
            self._base,
            self._task,
            self._tests[0],
            values=self._trained_values(),
            limits=limits,
            directory=self._work,
        )
        self.programs = writer.write(self._settings.backends, self._stages.begin)
        content = tensor_file(self._adapter.feeds())
        (self._work / ADAPTER_PTD).write_bytes(content)
        self.programs.bytes[ADAPTER_PTD] = len(content)

    def _trained_values(self) -> dict[str, np.ndarray]:
        """The run's cores and head: the parameters of ONNX Runtime Training."""
        values = {f"{name}.core": factors.core for name, factors in self._adapter.factors.items()}
        return values | dict(self._adapter.extras)

    def _write_canary(self) -> None:
        """Fixed inputs and torch's outputs of base and adapter on them."""
        preprocess = build_preprocessor(self._base.preprocessing, self._work)
        inputs = preprocess(_canary_samples(self._base))
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        with torch.no_grad():
            base_outputs = self._base.model(**tensors).numpy()
            head = {name: value.clone() for name, value in self._base.head_parameters().items()}
            injection = apply_adapter(self._base, self._run, self._adapter)
            adapter_outputs = self._base.model(**tensors).numpy()
            injection.remove()
            for name, value in self._base.head_parameters().items():
                value.copy_(head[name])
        content = {f"input.{name}": value for name, value in inputs.items()}
        content |= {"output.base": base_outputs, "output.adapter": adapter_outputs}
        # Written by Python: safetensors' own writer hides why a write failed.
        (self._work / CANARY).write_bytes(save(content))

    def _manifest(self, roles: dict[str, str], base_file: BaseFile, device: str | None) -> Manifest:
        files = {
            path.name: FileEntry(path.stat().st_size, digest_file(path))
            for path in sorted(self._work.iterdir())
        }
        return Manifest(
            base_digest=self._base.digest,
            files=files,
            graphs=roles,
            inputs=self._base.inputs,
            groups={group.name: self._group(group) for group in self._groups},
            tensors=_places(self._groups, base_file),
            extras=self._extras,
            task=self._run.config.task,
            labels=self._run.labels,
            preprocessing=self._base.preprocessing,
            opset=graphs.OPSET,
            ir_version=graphs.IR_VERSION,
            coupling=self._adapter.header.coupling,
            transform=self._adapter.header.transform,
            parts=factor_parts(self._adapter.header.frame),
            canary=CANARY,
            adapter=ADAPTER_FILE,
            base_extras=EXTRAS if self._saved else None,
            versions=_versions(),
            device=device,
            programs=self.programs.programs,
        )

    def _group(self, group: Group) -> BundleGroup:
        parameters = tuple(f"{name}.weight" for name in group.modules)
        return BundleGroup(
            parameters, group.n1, group.n2, self._adapter.factors[group.name].rank, group.blocks
        )


def _canary_samples(base: Base) -> list[str] | np.ndarray:
    spec = base.preprocessing
    if spec["kind"] == "text":
        return list(_CANARY_TEXTS)
    shape = (2, spec["height"], spec["width"], spec["channels"])
    generator = np.random.Generator(np.random.PCG64(0))
    scans = generator.random(shape) / max(float(spec["scale"]), 1e-6)
    return np.asarray(scans, dtype=np.float32)


def _places(groups: tuple[Group, ...], base_file: BaseFile) -> dict[str, TensorPlace]:
    result = {}
    for group in groups:
        for name in group.modules:
            stored, _ = stored_weight(f"{name}.weight")
            if stored not in base_file.offsets:
                raise ExportError(f"the weight {name} did not come out as a tensor of the graph")
            offset = base_file.offsets[stored]
            result[f"{name}.weight"] = TensorPlace(offset, "float32", (group.n2, group.n1), True)
    return result


def _case(model: FactorModel, example: Example) -> Case:
    """What torch computes for one example: outputs, loss, the gradient of every core and extra, and the
    loss after some steps of the optimiser."""
    feeds = {name: value.detach().numpy().copy() for name, value in example.named().items()}
    trained = example.trained()
    loss, outputs = model(*example.arguments())
    gradients = torch.autograd.grad(loss, list(trained.values()))
    later = _later_loss(model, example)
    return Case(
        feeds=feeds,
        outputs=outputs.numpy(),
        loss=loss.item(),
        gradients={name: value.numpy() for name, value in zip(trained, gradients, strict=True)},
        later=later,
    )


def _later_loss(model: FactorModel, example: Example) -> float:
    """The loss after torch's own AdamW; the example's factors are as before afterwards."""
    trained = example.trained()
    before = {name: value.detach().clone() for name, value in trained.items()}
    optimizer = torch.optim.AdamW(
        list(trained.values()),
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.epsilon,
        weight_decay=OPTIMIZER.weight_decay,
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(*example.arguments())[0].backward()
        optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        loss = model(*example.arguments())[0].item()
        for name, value in trained.items():
            value.copy_(before[name])
    return float(loss)


def _versions() -> dict[str, str]:
    versions = {"edge-tcur": __version__, "python": platform.python_version()}
    found = {name: version_of(name) for name in _VERSIONS}
    return versions | {name: version for name, version in found.items() if version is not None}
