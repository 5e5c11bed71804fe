"""`plan` and `export --dry-run`: what an export would write, lack and need, without writing it.

Graphs are made as an export makes them, in a temporary directory; the base is counted and not written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from edge_tcur.errors import ExportError
from edge_tcur.models import Base
from edge_tcur.training.evaluate import load_run_base
from edge_tcur.training.run import Run
from edge_tcur.training.train import set_threads
from edge_tcur_devices import DeviceProfile, load_profile
from edge_tcur_export.bundle import SAMPLES, BundleWriter
from edge_tcur_export.choices import STEP, Choices, FormMaker, calibrate, choose, forms_of_bundle, stand_in
from edge_tcur_export.executorch import require_executorch
from edge_tcur_export.kernels import kernel_instead, modules_of_weights
from edge_tcur_export.lowering import VULKAN
from edge_tcur_export.memory_model import MemoryEstimate, estimate_memory, input_shapes
from edge_tcur_export.operator_checks import CHECKS, can_write_checks
from edge_tcur_export.operators import Undifferentiable, find_undifferentiable, replacement
from edge_tcur_export.ort_training import require_training
from edge_tcur_export.precision import planned_weights
from edge_tcur_export.program_memory import GRAPHS, LIBRARY_BYTES, expected_program, written_program
from edge_tcur_export.providers import PROVIDERS, Unsupported, find_provider, find_unsupported
from edge_tcur_export.quantized_graph import WeightTable
from edge_tcur_export.report import Stages
from edge_tcur_export.settings import EXECUTORCH, ExportSettings
from edge_tcur_export.trace import FactorModel, Traced
from edge_tcur_runtime.errors import UsageError
from edge_tcur_runtime.formats.bundle import (
    BASE_FILE,
    STEP_VARIANTS,
    Bundle,
    BundleGroup,
    InputSpec,
    Manifest,
)
from edge_tcur_runtime.formats.weights import FP32, PRECISIONS
from edge_tcur_runtime.units import format_size

_ENGINES = {"step": "ort-step", "train": "ort-training"}  # role of a graph -> the engine that runs it
_PLANNED = ("infer", *_ENGINES, *STEP_VARIANTS)
_TRAINING = "ort-training"
_LENGTH = 128  # tokens that are planned for unless told otherwise, where the base takes as many


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is for.

    Attributes:
        batch: samples of a step.
        length: tokens of each; 0: the base's, at most 128.
        provider: execution provider whose kernels are looked up; None: those of the device that have a
            table (`edge_tcur_export.providers`), or the CPU's.
        budget: bytes that may be used; None: what the device leaves an app.
        required: targets that were asked for by name; on a device that cannot run one, the plan fails.
    """

    batch: int = 8
    length: int = 0
    provider: str | None = None
    budget: int | None = None
    required: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.provider is not None:
            find_provider(self.provider)
        if self.batch < 1 or self.length < 0:
            raise UsageError(f"a batch of {self.batch} and a length of {self.length} cannot be planned for")


@dataclass(frozen=True)
class GraphMemory:
    """Peak memory of a run of one graph.

    Attributes:
        estimate: at the batch of the request.
        fits: whether that is within the budget; None without one.
        largest_batch: largest batch within the budget, 0 where not one sample fits; None without a budget.
    """

    estimate: MemoryEstimate
    fits: bool | None = None
    largest_batch: int | None = None


@dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
        groups: adapted weights by group: count, n1, n2, rank, trained numbers.
        files: file -> bytes.
        open_files: files whose size is known only when an export writes them.
        no_gradient: nodes that ONNX Runtime Training cannot differentiate.
        no_kernel: provider -> role of a graph -> nodes without a kernel in it.
        memory: role of a graph, or name of an ExecuTorch program -> its peak.
        batch, length: that `memory` of the graphs is for; a length of 0 where the base has none. Programs
            take their limits.
        device, budget: what the memory is compared with, if anything.
        impossible: target -> why it cannot work at all.
        notes: what else should be known.
        choices: precision, recompute and micro-batch of the step graph, with peaks and times.
    """

    groups: dict[str, dict[str, int]]
    files: dict[str, int]
    open_files: tuple[str, ...]
    no_gradient: tuple[Undifferentiable, ...]
    no_kernel: dict[str, dict[str, list[Unsupported]]]
    memory: dict[str, GraphMemory]
    batch: int
    length: int
    device: str | None = None
    budget: int | None = None
    impossible: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    choices: Choices = field(default_factory=Choices)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; sizes in bytes."""
        content = asdict(self)
        content["memory"] = {
            role: {**asdict(found), "estimate": found.estimate.to_dict()}
            for role, found in self.memory.items()
        }
        content["no_gradient"] = [
            {**asdict(node), "instead": replacement(node.operator)} for node in self.no_gradient
        ]
        content["no_kernel"] = {
            name: {
                role: [{**asdict(node), "instead": kernel_instead(node, name)} for node in nodes]
                for role, nodes in roles.items()
            }
            for name, roles in self.no_kernel.items()
        }
        content["choices"] = self.choices.to_dict()
        content["sources"] = {name: PROVIDERS[name].source for name in self.no_kernel}
        return content


def plan_run(
    run: Run,
    settings: ExportSettings,
    request: PlanRequest,
    on_stage: Callable[[str], None] | None = None,
) -> Plan:
    """The plan of an export of `run`; nothing is written but temporary files.

    Raises:
        BaseMismatchError: the base changed since training.
        ExportError: the model cannot be traced or converted.
        UsageError: no such device or provider.
    """
    device = None if settings.device is None else load_profile(settings.device)
    stages = Stages(on_stage)
    stages.begin("loading the base")
    set_threads(run.config.threads)
    base, targets = load_run_base(run), list(settings.targets)
    impossible: dict[str, str] = {}
    with TemporaryDirectory() as work:
        root = Path(work)
        writer = BundleWriter(run, base, run.adapter(), root, stages, settings)
        weights, unquantised = _weights(base, run)
        model, forward, converted = writer.convert()
        lacking = find_undifferentiable(converted, writer.trained) if _TRAINING in targets else []
        if lacking:
            targets.remove(_TRAINING)
            impossible[_TRAINING] = f"it has no gradient for {len(lacking)} operators of the model"
        impossible |= _missing_libraries(targets)
        if _TRAINING in impossible and _TRAINING in targets:
            targets.remove(_TRAINING)
        counted, length = writer.base_file(write=False), _length(base.preprocessing, request)
        maker = FormMaker(weights, base.inputs, writer.groups, length, root)
        writer.steps.on_step = maker
        roles = writer.write_graphs(model, forward, converted, counted, targets)
        stages.begin("estimating memory")
        files = {path.name: path.stat().st_size for path in root.iterdir()} | {BASE_FILE: counted.size}
        found = {
            role: onnx.load(str(root / name), load_external_data=False)
            for role, name in roles.items()
            if role in _PLANNED
        }
        modules = {role: writer.sources[role].modules for role in found}
        plan = _plan(found, base.inputs, writer.groups, length, request, device)
        plan = _look_up(plan, found, modules, request, device)
        stages.begin("comparing precisions")
        choices = _compared(
            maker, root / roles.get(STEP, ""), counted.size, settings, request.batch, plan.budget
        )
        if EXECUTORCH in targets:
            limits = settings.programs.limits(run, base, batch=SAMPLES)
            graphs = {**found, **({} if "step" in found else _step_graph(writer, forward, root))}
            frozen = _frozen_bytes(model)
            plan = _with_programs(plan, graphs, base.inputs, limits, settings.programs.backends, frozen)
            plan = _look_for_engine(plan, EXECUTORCH, EXECUTORCH, request, device)
    stages.begin(None)
    lowered = EXECUTORCH in targets
    later = (*(_PROGRAM_FILES if lowered else ()), *((CHECKS,) if can_write_checks() else ()))
    return replace(
        plan,
        files=dict(sorted(files.items())),
        open_files=later,
        no_gradient=tuple(lacking),
        impossible=impossible | plan.impossible,
        choices=replace(choices, lacking=(*unquantised, *choices.lacking)),
        notes=(*plan.notes, *(_program_notes(frozen) if lowered else ())),
    )


def _compared(
    maker: FormMaker, step: Path, size: int, settings: ExportSettings, batch: int, budget: int | None
) -> Choices:
    """The forms of a step graph against each other, timed by the one that is asked for, at `step`."""
    rate = None
    if maker.forms:
        stand_in(step.parent, size)
        own = next(form for form in maker.forms if form.precision == settings.precision)
        rate = calibrate(step, own, maker.inputs, maker.groups, maker.length)
    return choose(maker.forms, batch, maker.length, budget, rate=rate, lacking=tuple(maker.lacking))


def plan_bundle(bundle: Bundle, device_name: str | None, request: PlanRequest) -> Plan:
    """The plan of a bundle that is there already: its files, kernels and memory.

    Raises:
        UsageError: no such device or provider.
    """
    device = None if device_name is None else load_profile(device_name)
    manifest = bundle.manifest
    found = {}
    for role in _PLANNED:
        path = bundle.graph(role)
        if path is not None:
            found[role] = onnx.load(str(path), load_external_data=False)
    length = _length(manifest.preprocessing, request)
    plan = _plan(found, manifest.inputs, manifest.groups, length, request, device)
    plan = _look_up(plan, found, {}, request, device)
    if manifest.programs:
        plan = _look_for_engine(_with_written(plan, found, manifest), EXECUTORCH, EXECUTORCH, request, device)
    files = {name: entry.size for name, entry in sorted(manifest.files.items())}
    return replace(plan, files=files, choices=_choices_of(bundle, plan, request))


def _choices_of(bundle: Bundle, plan: Plan, request: PlanRequest) -> Choices:
    """Of a bundle, which has one precision."""
    manifest = bundle.manifest
    tables = manifest.memory
    if tables is None or STEP not in tables.graphs:
        return Choices()
    size = manifest.files[BASE_FILE].size
    forms = forms_of_bundle(tables, manifest.precision, size, plan.length)
    path, own = bundle.graph(STEP), next(form for form in forms if form.graph == STEP)
    rate = None
    if path is not None:
        rate = calibrate(path, own, manifest.inputs, manifest.groups, plan.length, tables.samples)
    return choose(forms, request.batch, plan.length, plan.budget, samples=tables.samples, rate=rate)


def _weights(base: Base, run: Run) -> tuple[dict[str, WeightTable], tuple[str, ...]]:
    """Precision -> the weights of the base in it, and what cannot be quantised."""
    trained = base.extra_parameters(run.config.method().modules_to_save)
    found: dict[str, WeightTable] = {}
    for precision in PRECISIONS:
        try:
            table = planned_weights(base, precision, trained)
        except ExportError as error:
            return found, (f"--precision {precision}: {error.message}",)
        if precision != FP32 and not table:
            return found, (f"--precision {precision}: the base has no large linear weight in float32",)
        found[precision] = table
    return found, ()


def _with_written(plan: Plan, graphs: Mapping[str, onnx.ModelProto], manifest: Manifest) -> Plan:
    """The plan with the memory of the programs of a bundle."""
    memory, ranks = dict(plan.memory), {name: group.rank for name, group in manifest.groups.items()}
    programs = {n: spec for n, spec in manifest.programs.items() if not n.endswith(f"-{VULKAN}")}
    for name, program in programs.items():
        model, limits = graphs.get(GRAPHS[name.partition("-")[0]], graphs["infer"]), program.limits
        shapes = input_shapes(model, manifest.inputs, limits["batch"], limits.get("sequence", 0), ranks)
        estimate = written_program(manifest, name, model, shapes)
        fits = None if plan.budget is None else estimate.total <= plan.budget
        memory[name] = GraphMemory(estimate, fits, None if fits is None else limits["batch"] * fits)
    found = next((program.limits for program in programs.values()), None)
    return plan if found is None else _noted(replace(plan, memory=memory), found)


_PROGRAM_FILES = ("infer.pte", "train.pte", "base.ptd", "adapter.ptd")


def _missing_libraries(targets: Collection[str]) -> dict[str, str]:
    """Target -> what is not installed, and how to get it."""
    missing = {}
    for target, require in ((EXECUTORCH, require_executorch), (_TRAINING, require_training)):
        if target in targets:
            try:
                require()
            except ExportError as error:
                missing[target] = f"{error.message}; {error.hint}"
    return missing


def _frozen_bytes(model: FactorModel) -> int:
    return sum({value.data_ptr(): value.nbytes for _, value in model.named_buffers()}.values())


def _program_notes(frozen: int) -> tuple[str, ...]:
    return (
        f"base.ptd will hold about {frozen} bytes of frozen tensors; the sizes of programs, and exactly what "
        "they reserve, are known after their lowering, which an export does",
    )


def _step_graph(writer: BundleWriter, forward: Traced, root: Path) -> dict[str, onnx.ModelProto]:
    """The step graph of a plan without that target, for what a training program keeps of the forward pass;
    empty where the model's backward pass has no ONNX form."""
    try:
        path = root / writer.write_step_alone(forward)
        return {"step": onnx.load(str(path), load_external_data=False)}
    except ExportError:
        return {}


def _with_programs(
    plan: Plan,
    graphs: Mapping[str, onnx.ModelProto],
    inputs: Mapping[str, InputSpec],
    limits: Mapping[str, int],
    backends: Sequence[str],
    frozen: int,
) -> Plan:
    """The plan with the memory of ExecuTorch's programs, which are not lowered for it."""
    ranks = {name: group["rank"] for name, group in plan.groups.items()}

    def at(name: str, batch: int) -> MemoryEstimate:
        model = graphs[GRAPHS[name.partition("-")[0]]]
        shapes = input_shapes(model, inputs, batch, limits.get("sequence", 0), ranks)
        return expected_program(model, shapes, name, frozen)

    names = [
        f"{kind}-{backend}"
        for kind, graph in GRAPHS.items()
        for backend in backends
        if backend != VULKAN and graph in graphs
    ]
    memory = {
        name: measure(lambda batch, name=name: at(name, batch), limits["batch"], plan.budget)  # type: ignore[misc]
        for name in names
    }
    return _noted(replace(plan, memory={**plan.memory, **memory}), limits)


def _noted(plan: Plan, limits: Mapping[str, int]) -> Plan:
    most = f"{limits['batch']} samples" + (f" of {limits['sequence']} tokens" if "sequence" in limits else "")
    note = (
        f"ExecuTorch's programs reserve memory for at most {most} at once, whatever the batch; "
        f"{format_size(LIBRARY_BYTES)} of their peak are Python and torch, which an app does not have"
    )
    return replace(plan, notes=(*plan.notes, note))


def _length(preprocessing: Mapping[str, Any], request: PlanRequest) -> int:
    """Tokens to plan for; 0 where the base has no such axis."""
    if "max_length" not in preprocessing:
        return 0
    longest = int(preprocessing["max_length"])
    if request.length > longest:
        raise UsageError(f"a length of {request.length} is above the base's {longest}")
    return request.length or min(longest, _LENGTH)


def _plan(
    found: Mapping[str, onnx.ModelProto],
    inputs: Mapping[str, InputSpec],
    groups: Mapping[str, BundleGroup],
    length: int,
    request: PlanRequest,
    device: DeviceProfile | None,
) -> Plan:
    """Groups and memory."""
    ranks = {name: group.rank for name, group in groups.items()}
    budget = request.budget
    if budget is None and device is not None:
        budget = device.app_memory_bytes

    def at(role: str, batch: int) -> MemoryEstimate:
        model = found[role]
        return estimate_memory(model, input_shapes(model, inputs, batch, length, ranks), role=role)

    return Plan(
        groups={
            name: {
                "count": len(group.parameters),
                "n1": group.n1,
                "n2": group.n2,
                "rank": group.rank,
                "trained_numbers": len(group.parameters) * group.rank**2,
            }
            for name, group in groups.items()
        },
        files={},
        open_files=(),
        no_gradient=(),
        no_kernel={},
        memory={
            role: measure(lambda batch, role=role: at(role, batch), request.batch, budget)  # type: ignore[misc]
            for role in found
        },
        batch=request.batch,
        length=length,
        device=None if device is None else device.name,
        budget=budget,
    )


def measure(at: Callable[[int], MemoryEstimate], batch: int, budget: int | None) -> GraphMemory:
    """The peak at a batch, and the largest batch within the budget.

    Args:
        at: the estimate for a number of samples; it grows with it.
    """
    estimate = at(batch)
    if budget is None:
        return GraphMemory(estimate)
    if at(1).total > budget:
        return GraphMemory(estimate, False, 0)
    return GraphMemory(estimate, estimate.total <= budget, _largest(at, batch, budget))


def _largest(at: Callable[[int], MemoryEstimate], batch: int, budget: int) -> int:
    """Largest batch within the budget, by the line through two estimates; checked, and lowered if need be."""
    one, more = at(1).total, max(batch, 2)
    slope = max((at(more).total - one) / (more - 1), 1.0)
    largest = min(1 + int((budget - one) / slope), _MOST)
    while largest > 1 and at(largest).total > budget:
        largest = max(1, largest * 15 // 16)
    return largest


_MOST = 4096  # samples; a larger micro-batch is of no use


def _look_up(
    plan: Plan,
    found: Mapping[str, onnx.ModelProto],
    modules: Mapping[str, Mapping[str, str]],
    request: PlanRequest,
    device: DeviceProfile | None,
) -> Plan:
    """The plan with kernels of the providers, and what the device has no engine for."""
    names, notes = _providers(request, device)
    known = {role: {**modules_of_weights(model), **modules.get(role, {})} for role, model in found.items()}
    no_kernel = {
        name: {role: find_unsupported(model, PROVIDERS[name], known[role]) for role, model in found.items()}
        for name in names
    }
    plan = replace(plan, no_kernel=no_kernel, notes=tuple(notes))
    for role, engine in _ENGINES.items():
        if role in found:
            plan = _look_for_engine(plan, engine, role if role == "step" else _TRAINING, request, device)
    return plan


def _look_for_engine(
    plan: Plan, engine: str, target: str, request: PlanRequest, device: DeviceProfile | None
) -> Plan:
    """The plan with what is to be said where a device has no package of a target's engine."""
    if device is None or engine in device.engines:
        return plan
    reason = f"{device.name} has no package of the engine {engine}"
    if target in request.required:
        return replace(plan, impossible={**plan.impossible, target: reason})
    return replace(plan, notes=(*plan.notes, reason))


def _providers(request: PlanRequest, device: DeviceProfile | None) -> tuple[Collection[str], list[str]]:
    """Providers to look up, and what is to be said of those without a table."""
    if request.provider is not None:
        notes = []
        if device is not None and request.provider not in device.providers:
            notes.append(f"the profile {device.name} does not list the provider {request.provider}")
        return [request.provider], notes
    names = ("cpu",) if device is None else device.providers
    missing = [name for name in names if name not in PROVIDERS]
    notes = [f"there is no table of operators for {', '.join(missing)}"] if missing else []
    return [name for name in names if name in PROVIDERS], notes
