"""A plan: parts of memory, the peak of each phase beside what stays resident, a bound on speed."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import jax
from ml_collections import ConfigDict

from opsdc_jax import continuous, sampler, sharding, tiny
from opsdc_jax.config import InputError
from opsdc_jax.models import hf, qwen3
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.shapes import SHAPES
from opsdc_jax.planner import memory, programs, roofline
from opsdc_jax.planner.topology import Topology
from opsdc_jax.planner.verdicts import Verdict, verdicts

# Entries of the published Qwen3 tokenizer; its embedding has 151,936 rows.
_PUBLISHED_VOCABULARY = 151_669


@dataclasses.dataclass(frozen=True)
class Phase:
    """One program within the run; bytes are per device.

    Attributes:
      program: of the program alone, arguments included; None where it does not compile.
      resident: of the train state beside it, that is no argument of it.
      runs: how often it runs in one optimizer step (its amortised part for the refresh).
      flops, moved: of one run on one device: matrix products, and memory traffic at the least.
      seconds: least time of one run; None where the device's peaks are unknown.
    """

    name: str
    program: int | None
    resident: int
    runs: float
    flops: float
    moved: float
    seconds: float | None
    collectives: Mapping[str, Mapping[str, int]]
    error: str = ""

    @property
    def peak(self) -> int | None:
        return None if self.program is None else self.program + self.resident

    def excess(self, topology: Topology) -> int:
        """Bytes above what a device has to give; positive where it does not compile."""
        return 1 if self.peak is None else self.peak - topology.budget_bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a configuration on a topology.

    Attributes:
      model: of the parameters, a name.
      parameters: their number.
      assumed: settings taken other than the configuration's, as overrides to pass to the run.
      parts: bytes per device by name; those of `memory.state_parts` stay resident throughout.
      tokens: response tokens of one step, at most.
      compile_seconds: that the verdicts took when they were made.
    """

    model: str
    parameters: int
    topology: Topology
    mesh: Mapping[str, int]
    assumed: tuple[str, ...]
    parts: Mapping[str, int]
    phases: tuple[Phase, ...]
    tokens: int
    compile_seconds: float

    @property
    def peak(self) -> int | None:
        """The highest of all phases; None where one does not compile."""
        peaks = [phase.peak for phase in self.phases]
        return None if None in peaks else max(peak for peak in peaks if peak is not None)

    @property
    def fits(self) -> bool:
        return self.peak is not None and self.peak <= self.topology.budget_bytes

    @property
    def step_seconds(self) -> float | None:
        """Least time of an optimizer step whose rollouts all use their budget."""
        seconds = [phase.seconds for phase in self.phases if phase.runs]
        if any(second is None for second in seconds):
            return None
        return sum(phase.runs * (phase.seconds or 0.0) for phase in self.phases)


def architecture(settings: ConfigDict) -> tuple[Qwen3Config, int]:
    """The model of a configuration and its tokenizer's entries; a published size needs no files.

    Raises:
      InputError: model.path is neither a published Qwen3 nor a folder.
    """
    path, model = settings.model.path, settings.model
    name = path.partition("@")[0].rpartition("/")[2].lower().replace("-", "_").replace(".", "p")
    if path.startswith("Qwen/") and name in SHAPES:
        shape = dataclasses.replace(
            SHAPES[name],
            compute_dtype=model.compute_dtype,
            remat=model.remat,
            attention=model.attention,
        )
        return shape, _PUBLISHED_VOCABULARY
    # Only a folder: a plan downloads nothing.
    if path not in tiny.BASE_FOLDERS and not pathlib.Path(path).is_dir():
        sizes = ", ".join(name.removeprefix("qwen3_").replace("p", ".").upper() for name in SHAPES)
        raise InputError(
            f"model.path={path!r} is neither a folder nor Qwen/Qwen3-SIZE ({sizes}): to "
            "plan for another model, download it and give its folder"
        )
    folder = hf.resolve_folder(path)
    shape = hf.load_config(folder, model.compute_dtype, model.remat, model.attention)
    return shape, len(hf.load_tokenizer(folder))


def mesh_sizes(settings: ConfigDict, topology: Topology) -> dict[str, int]:
    """The size of each mesh axis on a topology.

    Raises:
      InputError: the sizes do not multiply to its devices.
    """
    shape = sharding.mesh_shape(settings.mesh, topology.devices)
    return dict(zip(sharding.MESH_AXES, shape, strict=True))


def adapted(settings: ConfigDict, model: Qwen3Config, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Raises train.micro_batch_size to what the mesh's batch axes ask for, in place.

    Returns:
      the overrides to pass to the run for it.

    Raises:
      InputError: the mesh does not fit the model, or other batch sizes cannot be split over it.
    """
    mesh = memory.abstract_mesh(sizes)
    qwen3.shardings(model, mesh)
    decoding = sampler.decode_mesh(model, mesh, settings.mesh.decode_tensor)
    batch, slots = settings.train.batch_size, settings.sampler.slots
    sharding.check_divides(mesh, "train.batch_size", batch)
    if continuous.refilled(slots, batch):
        sharding.check_divides(decoding, "sampler.slots", slots)
    else:
        sharding.check_divides(decoding, "train.batch_size", batch)
    if settings.eval.source != "none":
        sharding.check_divides(decoding, "eval.batch_size", settings.eval.batch_size)
    parts = sizes["replica"] * sizes["fsdp"]
    if settings.train.micro_batch_size % parts == 0:
        return ()
    settings.train.micro_batch_size = parts
    return (f"--config.train.micro_batch_size={parts}",)


def make_plan(
    settings: ConfigDict, topology: Topology, *, assumed: Sequence[str] = (), early: bool = False
) -> Plan:
    """Compiles the programs of the run for the topology and adds up.

    But few: the token views (log.token_views) take less than a micro-batch, see token_view.py. Of
    continuous batching (evaluation, and rollouts in segments) it compiles a segment with the
    largest cache, and beside it the prefill where prompts wait for a slot. Where none waits, all
    prompts run beside the smallest cache, a quarter of the rows at a time: not counted, nor are the
    weights' way into decoding's layout, a layer at a time before there is a cache, a refill, which
    works on one row, and a new size, which works on one layer.

    Args:
      settings: a validated configuration; not changed.
      assumed: overrides already made to it that the plan is to name.
      early: where the first program does not fit, compile no other; they are then missing.

    Raises:
      InputError: the mesh does not fit the model or the topology, or libtpu is missing.
    """
    settings = settings.copy_and_resolve_references()
    sizes = mesh_sizes(settings, topology)
    model, vocabulary = architecture(settings)
    assumed = (*assumed, *adapted(settings, model, sizes))
    spec = programs.make_spec(settings, model, vocabulary, sizes)
    step = programs.train_step(spec, memory.abstract_mesh(sizes))
    parts = memory.state_parts(step.like)
    resident = sum(parts.values())
    names = [name for name in programs.KEYS if name != "evaluate" or settings.eval.source != "none"]
    found: dict[str, Verdict] = {}
    # The program that most often does not fit comes first, alone.
    for group in [names[:1], names[1:]] if early else [names]:
        found |= verdicts(group, spec, topology)
        peaks = [found[name].peak for name in group]
        if any(
            peak is None or peak + resident - found[name].state > topology.budget_bytes
            for name, peak in zip(group, peaks, strict=True)
        ):
            break
    for name, verdict in found.items():
        if name != "evaluate":  # the same kinds as the rollout's, at another size
            parts |= verdict.parts
    if "accumulate" in found and found["accumulate"].peak is not None:
        parts["activations"] = found["accumulate"].peak - found["accumulate"].arguments
    return Plan(
        model=settings.model.path,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(step.like.student)),
        topology=topology,
        mesh=sizes,
        assumed=assumed,
        parts=parts,
        phases=tuple(
            _phase(name, verdict, settings, topology, parts) for name, verdict in found.items()
        ),
        tokens=settings.train.batch_size * settings.sampler.max_response_tokens,
        compile_seconds=round(sum(verdict.seconds for verdict in found.values()), 1),
    )


def _phase(
    name: str,
    verdict: Verdict,
    settings: ConfigDict,
    topology: Topology,
    parts: Mapping[str, int],
) -> Phase:
    """A verdict in its place in the run."""
    batch, every = settings.train.batch_size, settings.teacher.every
    state = parts["weights"] + parts["optimizer"]
    resident = state + parts["teacher"] - verdict.state
    flops = verdict.cost.get("flops", 0.0) / topology.devices
    runs, moved = {
        "accumulate": (
            batch / settings.train.micro_batch_size,
            verdict.cost.get("bytes", 0.0) / topology.devices,
        ),
        # Reads the state and the gradients, writes the state but for the teacher.
        "apply": (1.0, verdict.arguments - parts["teacher"] + state),
        "refresh": (1 / every if every else 0.0, verdict.arguments),
        "rollout": (
            math.ceil(batch / programs.rows(name, programs.values(settings))),
            _decode_traffic(verdict, settings.sampler.max_prompt_tokens, settings.sampler),
        ),
        "evaluate": (
            0.0,
            _decode_traffic(verdict, settings.sampler.max_prompt_tokens, settings.eval),
        ),
    }[name]
    return Phase(
        name=name,
        program=verdict.peak,
        resident=resident,
        runs=runs,
        flops=flops,
        moved=moved,
        seconds=roofline.seconds(flops, moved, topology.device),
        collectives=verdict.collectives,
        error=verdict.error,
    )


def _decode_traffic(verdict: Verdict, prompt: int, section: ConfigDict) -> float:
    """Bytes a device must read to decode: its weights for each token, and the cache so far."""
    tokens = section.max_response_tokens
    filled = (prompt + tokens / 2) / (prompt + tokens)
    parts = verdict.parts
    return tokens * (parts.get("decode_weights", 0) + filled * parts.get("kv_cache", 0))
