"""`export`: from a training run to a bundle that a device can open, verified before it appears."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save

from edge_tcur import __version__
from edge_tcur.method.targets import Group, find_targets, saved_parameters
from edge_tcur.models import Base
from edge_tcur.tasks import find_task
from edge_tcur.training.evaluate import load_run_base
from edge_tcur.training.run import ADAPTER_FILE, Run, new_directory
from edge_tcur.training.train import set_threads, value_of
from edge_tcur_devices import load_profile
from edge_tcur_export import graph as graphs
from edge_tcur_export import vocabulary
from edge_tcur_export.base_file import BaseFile
from edge_tcur_export.cases import make_canary, make_case
from edge_tcur_export.divergence import Source
from edge_tcur_export.dtypes import to_float32
from edge_tcur_export.executorch import ProgramReport, ProgramWriter, require_executorch, tensor_file
from edge_tcur_export.held_out import HeldOut, held_out_example
from edge_tcur_export.infer_graph import multiply_cores_first, split_stacks
from edge_tcur_export.memory_tables import make_tables
from edge_tcur_export.operator_checks import can_write_checks, write_checks
from edge_tcur_export.ort_training import check_gradients, require_training, write_artifacts
from edge_tcur_export.parity import Case
from edge_tcur_export.picks import pick_by_index
from edge_tcur_export.precision import QuantizedBase
from edge_tcur_export.program_divergence import ProgramSource
from edge_tcur_export.quantization import Quantization, QuantizationReport
from edge_tcur_export.reference import write_reference
from edge_tcur_export.report import ExportReport, Stages
from edge_tcur_export.saved import save_graph
from edge_tcur_export.settings import EXECUTORCH, ExportSettings
from edge_tcur_export.step_graphs import StepGraphs
from edge_tcur_export.trace import (
    Example,
    FactorModel,
    Traced,
    make_example,
    stored_weight,
    trace_forward,
)
from edge_tcur_export.verification import ADAPTER_PTD, settle, unverified
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.bundle import (
    BASE_FILE,
    MANIFEST,
    BundleGroup,
    FileEntry,
    Manifest,
    serialize_manifest,
)
from edge_tcur_runtime.formats.digest import digest_file
from edge_tcur_runtime.formats.factors import INDEX_PARTS, SKETCH, factor_parts
from edge_tcur_runtime.formats.memory import MemoryTables
from edge_tcur_runtime.formats.weights import FP32, TensorPlace
from edge_tcur_runtime.installed import version_of

CANARY = "canary.safetensors"
EXTRAS = "extras.safetensors"
_VERSIONS = ("torch", "onnx", "onnxscript", "transformers", "onnxruntime-training-cpu", "executorch")
SAMPLES = 3  # of the example that is traced


def export_run(
    run: Run,
    out: Path,
    settings: ExportSettings | None = None,
    *,
    force: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> ExportReport:
    """Exports the frozen base and the factors of a run separately.

    Args:
        run: a finished training run.
        out: the bundle's directory; appears whole, or without the targets that do not agree with torch, or
            not at all.
        settings: None takes the defaults.
        force: replace what is at `out`.
        on_stage: called with the name of each stage, for progress.

    Raises:
        BaseMismatchError: the base changed since training.
        ExportError: the model cannot be traced, or a target does not agree with torch: it is named with the
            first operator that differs, and is not in the bundle. Without the inference graph there is none.
        OutputExistsError, DiskError: `out` cannot be written; nothing is left behind.
    """
    settings = settings or ExportSettings()
    if EXECUTORCH in settings.targets:
        require_executorch()
    if "ort-training" in settings.targets:
        require_training()
    stages = Stages(on_stage)
    stages.begin("loading the base")
    profile = None if settings.device is None else load_profile(settings.device)
    set_threads(run.config.threads)
    adapter, base = run.adapter(), load_run_base(run)
    with new_directory(out, force=force) as work:
        writer = BundleWriter(run, base, adapter, work, stages, settings)
        manifest = writer.write(None if profile is None else profile.name)
        if settings.verify:
            stages.begin("comparing with torch in fresh processes")
            outcome = settle(
                work,
                manifest,
                writer.cases,
                {**writer.sources, **writer.program_sources},
                writer.steps.cases,
                inputs=writer.held_out.inputs,
            )
        else:
            outcome = unverified(work, manifest)
        stages.begin("moving the bundle into place")
    stages.begin(None)
    outcome.raise_failures(out)
    manifest = outcome.manifest
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    return ExportReport(
        root=out,
        manifest=manifest,
        parity=outcome.errors,
        not_run=outcome.skipped,
        graph_bytes={name: size for name, size in sizes.items() if name.endswith(".onnx")},
        base_bytes=sizes[BASE_FILE],
        adapter_bytes=sizes[ADAPTER_FILE],
        seconds=time.perf_counter() - stages.started,
        stages=stages.seconds,
        executorch=writer.programs,
        quantization=writer.quantization,
        converted=writer.converted,
        held_out=writer.held_out,
    )


class BundleWriter:
    """Writes one bundle into `work`."""

    def __init__(
        self,
        run: Run,
        base: Base,
        adapter: Adapter,
        work: Path,
        stages: Stages,
        settings: ExportSettings,
    ) -> None:
        self._run, self._base, self._adapter, self._work, self._stages = run, base, adapter, work, stages
        self._settings, self.programs = settings, ProgramReport()
        self.converted = to_float32(base)
        self._task = find_task(run.config.task)
        self._groups: tuple[Group, ...] = find_targets(base.model, run.config.method(), keep=base.head).groups
        self.steps = StepGraphs(base, self._groups, self._task, settings, work)
        if base.tokenizer is not None:
            (work / "tokenizer.json").write_text(base.tokenizer, encoding="utf-8")
        (work / ADAPTER_FILE).write_bytes(run.adapter_path.read_bytes())
        if settings.precision != FP32:
            stages.begin(f"quantising the base to {settings.precision}, and scoring what that changes")
        self._quantised = Quantization(base, run, adapter, work, settings.precision)
        self.quantization = QuantizationReport()
        # Written by Python: safetensors' own writer hides why a write failed.
        (work / CANARY).write_bytes(save(make_canary(base, run, adapter, work)))
        reference = settings.reference
        self._reference = None if reference is None else write_reference(base, run, adapter, work, reference)
        self._config = run.config.method()

        def rank(group: Group) -> int:
            return adapter.factors[group.name].rank

        def make(rank_of: Callable[[Group], int], batch: int, seed: int) -> Example:
            return make_example(
                base, self._groups, rank_of, batch=batch, seed=seed, config=self._config, task=self._task
            )

        # Sizes of 1 are taken as constants by the tracer, so it is shown larger ones.
        self._example = make(lambda group: min(max(2, rank(group)), group.n1, group.n2), SAMPLES, 0)
        self._tests = [
            make(rank, SAMPLES, 0),
            make(lambda group: max(1, rank(group) // 2), 5, 1),
            make(rank, 1, 2),
        ]
        saved = saved_parameters(base.model, self._config.modules_to_save)
        self._saved = {name: value_of(value) for name, value in saved.items()}
        extras = base.extra_parameters(self._config.modules_to_save)
        self._extras = {name: tuple(value.shape) for name, value in extras.items()}
        self.cases: list[Case] = []
        self.sources: dict[str, Source] = {}
        self.program_sources: dict[str, ProgramSource] = {}
        self.held_out = HeldOut()

    def write(self, device: str | None) -> Manifest:
        """Writes graphs, base file and manifest."""
        stages, targets = self._stages, self._settings.targets
        limits = self._settings.programs.limits(self._run, self._base, batch=SAMPLES)
        model, forward, converted = self.convert()
        if self._settings.verify:
            self._add_held_out(model, limits)
        self.cases = [make_case(model, test) for test in self._tests]
        if "ort-training" in targets:
            check_gradients(converted, self.trained)
        base_file = self.base_file()
        roles = self.write_graphs(model, forward, converted, base_file)
        if EXECUTORCH in targets:
            self._write_programs(model, limits)
        if can_write_checks():
            stages.begin("writing the checks of single operators")
            roles["checks"] = write_checks(self._work, roles, self.cases[0].feeds)
        stages.begin("writing the manifest")
        if self._saved:
            (self._work / EXTRAS).write_bytes(save(self._saved))
        self.quantization = self._quantised.report(base_file.offsets, base_file.size)
        manifest = self._manifest(roles, base_file, device)
        (self._work / MANIFEST).write_bytes(serialize_manifest(manifest))
        return manifest

    def _add_held_out(self, model: FactorModel, limits: Mapping[str, int]) -> None:
        """Samples that the run held out, to what is compared."""
        self.held_out = held_out_example(model, self._base, self._run, self._adapter, self._tests[0], limits)
        if self.held_out.example is not None:
            self._tests.append(self.held_out.example)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of what gets gradients: every core, and the extras."""
        return tuple(self._example.trained())

    @property
    def groups(self) -> dict[str, BundleGroup]:
        """The adapted groups."""
        return {group.name: self._group(group) for group in self._groups}

    def convert(self) -> tuple[FactorModel, Traced, ir.Model]:
        """The model over the base, its traced forward pass, and the graph of that: loss and logits."""
        self._stages.begin("tracing the forward pass")
        model = FactorModel(self._base, self._groups, self._task, self._config)
        forward = trace_forward(model, self._base, self._groups, self._task, self._example)
        self._stages.begin("writing the inference graph")
        converted = graphs.to_graph(forward)
        self.sources["infer"] = self.sources["train"] = Source.of(converted, forward.signature.inputs)
        return model, forward, converted

    def base_file(self, *, write: bool = True) -> BaseFile:
        """An empty base file for the graphs; see `BaseFile`."""
        always = _adapted_weights(self._groups)
        return BaseFile(self._work, self._quantised.base.table(), always=always, write=write)

    def write_graphs(
        self,
        model: FactorModel,
        forward: Traced,
        converted: ir.Model,
        base_file: BaseFile,
        targets: Sequence[str] | None = None,
    ) -> dict[str, str]:
        """Writes the ONNX graphs of `targets` (None: of the settings); role -> file name.

        `converted` is used up.
        """
        stages, targets = self._stages, self._settings.targets if targets is None else targets
        roles = {"infer": self._write_infer(graphs.clone(converted), base_file)}
        if "step" in targets:
            stages.begin("writing the step graph (forward and backward)")
            roles |= self.steps.write(forward, self._example, base_file)
            roles |= self.steps.write_last(model, self._example, self._tests, base_file)
            self.sources |= self.steps.sources
        if "ort-training" in targets:
            stages.begin("writing ONNX Runtime Training's graphs")
            values = self._trained_values()
            training = graphs.inputs_to_initializers(converted, values)
            roles |= write_artifacts(training, values, base_file, self._work, self._settings.optimizer)
        return roles

    def write_step_alone(self, forward: Traced) -> str:
        """The step graph without its base: the file's name. For a plan of other targets."""
        return self.steps.write(forward, self._example, self.base_file(write=False))["step"]

    def _write_infer(self, model: ir.Model, base_file: BaseFile) -> str:
        graphs.keep_outputs(model, ("logits",))
        pick_by_index(model)
        multiply_cores_first(model)
        split_stacks(model)
        vocabulary.split_head(model, vocabulary.PIECE_BYTES)
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
        save_graph(model, self._work / "infer.onnx")
        return "infer.onnx"

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
        self.programs = writer.write(self._settings.programs.backends, self._stages.begin)
        self.program_sources = writer.sources
        content = tensor_file(self._adapter.feeds())
        (self._work / ADAPTER_PTD).write_bytes(content)
        self.programs.bytes[ADAPTER_PTD] = len(content)

    def _trained_values(self) -> dict[str, np.ndarray]:
        """The run's cores and head: the parameters of ONNX Runtime Training."""
        values = {f"{name}.core": factors.core for name, factors in self._adapter.factors.items()}
        return values | dict(self._adapter.extras)

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
            groups=self.groups,
            tensors=_places(self._groups, self._quantised.base, base_file),
            extras=self._extras,
            task=self._run.config.task,
            labels=self._run.labels,
            preprocessing=self._base.preprocessing,
            opset=self._quantised.base.opset,
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
            metric=self._task.metric.name,
            optimizer=self._settings.optimizer if "optimizer" in roles else None,
            precision=self._settings.precision,
            recomputed_blocks=self.steps.recomputed,
            last_blocks=self.steps.learning,
            memory=self._memory(roles),
            reference=self._reference,
        )

    def _memory(self, roles: Mapping[str, str]) -> MemoryTables | None:
        """Tables of the training graphs; None where there is none."""
        lengths = self._base.preprocessing.get("buckets", ())
        return make_tables(self._work, roles, self._base.inputs, self.groups, lengths)

    def _group(self, group: Group) -> BundleGroup:
        parameters = tuple(f"{name}.weight" for name in group.modules)
        return BundleGroup(
            parameters, group.n1, group.n2, self._adapter.factors[group.name].rank, group.blocks
        )


def _adapted_weights(groups: tuple[Group, ...]) -> set[str]:
    """Names in the graphs of the weights whose places the manifest gives."""
    names = (f"{name}.weight" for group in groups for name in group.modules)
    return {stored for name in names for stored in stored_weight(name)}


def _places(
    groups: tuple[Group, ...], quantised: QuantizedBase, base_file: BaseFile
) -> dict[str, TensorPlace]:
    return {
        f"{name}.weight": quantised.place(f"{name}.weight", (group.n1, group.n2), base_file.offsets)
        for group in groups
        for name in group.modules
    }


def _versions() -> dict[str, str]:
    versions = {"edge-tcur": __version__, "python": platform.python_version()}
    found = {name: version_of(name) for name in _VERSIONS}
    return versions | {name: version for name, version in found.items() if version is not None}
