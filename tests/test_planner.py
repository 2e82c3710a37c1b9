"""The planner: arithmetic against real trees, counting, reports, decisions; one real verdict."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers import SMALL, load_script, random_params

from opsdc_jax import config, sharding
from opsdc_jax.config import InputError, default_config
from opsdc_jax.models import qwen3
from opsdc_jax.models.shapes import SHAPES
from opsdc_jax.planner import (
    changes,
    hlo,
    memory,
    plan,
    programs,
    roofline,
    search,
    text,
    topology,
    verdicts,
)
from opsdc_jax.planner.verdicts import Verdict

GIB = 2**30


def settings_for(path="tiny", **values):
    settings = default_config()
    settings.model.path = path
    settings.eval.source = "none"
    for key, value in values.items():
        section, _, name = key.partition("__")
        settings[section][name] = value
    config.validate(settings)
    return settings


# Topologies


@pytest.mark.parametrize(
    ("name", "devices", "hbm"),
    [
        ("v5e:4x4", 16, 15.75),
        ("v5p:2x2x2", 8, 95.73),
        ("tpu7x:2x2x1", 8, 94.74),
        ("gpu:8xh200", 8, 139.8),
    ],
)
def test_a_topology_is_read_from_its_name(name, devices, hbm):
    found = topology.parse(name)
    assert (found.devices, found.device.hbm_gib) == (devices, hbm)
    assert found.budget_bytes == int(found.hbm_bytes * 0.95)


def test_host_devices_share_the_memory_of_this_machine():
    one, four = topology.parse("cpu:1"), topology.parse("cpu:4")
    assert one.hbm_bytes == pytest.approx(4 * four.hbm_bytes, abs=8)
    assert roofline.seconds(1.0, 1.0, four.device) is None, "no peak is known of any CPU"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e-8", "v5e:4x4"),
        ("v5e:4", "2 sizes"),
        ("v5p:2x2", "3 sizes"),
        ("v5e:0x4", "2 sizes"),
        ("gpu:8xT4", "H200"),
        ("gpu:H200", "COUNTxKIND"),
        ("cpu:x", "cpu:COUNT"),
    ],
)
def test_a_bad_topology_is_one_sentence(name, says):
    with pytest.raises(InputError, match=says):
        topology.parse(name)


@pytest.mark.parametrize("family", [*topology.TPUS, "gpu:H200"])
def test_slices_grow(family):
    devices = [found.devices for found in topology.slices(family)]
    assert devices == sorted(devices)
    assert len(set(devices)) == len(devices)


def test_an_architecture_needs_no_download():
    model, vocabulary = plan.architecture(settings_for("Qwen/Qwen3-0.6B@main"))
    assert (model.num_hidden_layers, model.compute_dtype, vocabulary) == (28, "bfloat16", 151_669)
    tiny, vocabulary = plan.architecture(settings_for("tiny"))
    assert vocabulary <= tiny.vocab_size < 1000


# Memory by arithmetic


def test_parts_are_those_of_a_real_state():
    sizes = {"replica": 1, "fsdp": 1, "tensor": 1}
    spec = programs.make_spec(settings_for(), SMALL, 40, sizes)
    parts = memory.state_parts(programs.train_step(spec, memory.abstract_mesh(sizes)).like)
    mesh = sharding.make_mesh(sizes)
    state = programs.train_step(spec, mesh).init(random_params(SMALL, 0))

    def nbytes(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    assert parts == {
        "weights": nbytes(state.student),
        "teacher": nbytes(state.teacher),
        "optimizer": nbytes((state.optimizer, state.step)),
    }
    assert 2 * parts["teacher"] == parts["weights"], "a bfloat16 copy"


def test_parts_shrink_with_the_mesh_and_the_host_takes_the_moments():
    whole = _parts({"replica": 1, "fsdp": 1, "tensor": 1})
    split = _parts({"replica": 2, "fsdp": 8, "tensor": 1})
    # Norms over the head width are whole everywhere, all else is split.
    assert 8 * split["weights"] == pytest.approx(whole["weights"], rel=1e-3)
    hosted = _parts({"replica": 1, "fsdp": 1, "tensor": 1}, optim__offload=True)
    assert hosted["optimizer"] < 100, "only counters stay on the device"
    assert hosted["weights"] == whole["weights"]


def _parts(sizes, **values):
    settings = settings_for("Qwen/Qwen3-0.6B", **values)
    model, vocabulary = plan.architecture(settings)
    spec = programs.make_spec(settings, model, vocabulary, sizes)
    return memory.state_parts(programs.train_step(spec, memory.abstract_mesh(sizes)).like)


# Counting


def test_products_in_loops_and_branches_are_counted():
    def program(x_4x8, w_8x8):
        def body(x, _):
            return jax.lax.cond(x[0, 0] > 0, lambda x: (x @ w_8x8) @ w_8x8, lambda x: x, x), None

        x, _ = jax.lax.scan(body, x_4x8, length=5)
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w_8x8, x)

    jaxpr = jax.make_jaxpr(program)(jnp.ones((4, 8)), jnp.ones((8, 8)))
    one = 2 * 4 * 8 * 8
    assert roofline.count(jaxpr).flops == (5 * 2 + 1) * one
    assert roofline.count(jaxpr, steps=7).flops == (5 * 2 + 7) * one
    assert roofline.count(jaxpr).bytes == 11 * 4 * (4 * 8 + 8 * 8 + 4 * 8)


def test_recomputation_counts():
    def loss(w_8x8, x_4x8):
        return jax.checkpoint(lambda x: jnp.sin(x @ w_8x8) @ w_8x8)(x_4x8).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.ones((8, 8)), jnp.ones((4, 8)))
    products = roofline.count(jaxpr).flops / (2 * 4 * 8 * 8)
    assert products == 2 + 1 + 3, "forward; the first again; 3 of the backward pass, x needs none"


def test_the_train_step_counts_as_by_hand(monkeypatch):
    """2 FLOPs a parameter and token and pass, and attention's; prompts of one length."""
    model = dataclasses.replace(SMALL, remat="full", num_hidden_layers=3)
    monkeypatch.setattr(programs, "_INSTRUCTION", 0)
    settings = settings_for(
        sampler__max_prompt_tokens=16, sampler__max_response_tokens=16, train__micro_batch_size=4
    )
    sizes = {"replica": 1, "fsdp": 1, "tensor": 1}
    spec = programs.make_spec(settings, model, 40, sizes)
    program = programs.build("accumulate", spec, sharding.make_mesh(sizes))
    flops = roofline.count(program.jitted.trace(*program.args).jaxpr).flops
    layers = qwen3.abstract_params(model)["layers"]
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(layers) if leaf.ndim > 2)
    T, R, B = 32, 16, 4
    attention = 2 * model.num_hidden_layers * model.num_attention_heads * T * T * model.head_dim
    forward = 2 * B * (T * weights + attention)
    head = 2 * B * R * model.vocab_size * model.hidden_size
    down = 2 * B * T * model.num_hidden_layers * model.hidden_size * model.intermediate_size
    # The student: forward, again (but for what the next layer only adds), backward twice, for
    # which attention forms its scores once more; the teacher: forward. The head: two logits, two
    # gradients.
    assert flops == 5 * forward - down + B * attention + 4 * head


def test_the_roofline_is_the_longer_side():
    device = topology.Device(1.0, tflops=2.0, gb_s=10.0)
    assert roofline.seconds(4e12, 1e9, device) == pytest.approx(2.0)
    assert roofline.seconds(4e12, 50e9, device) == pytest.approx(5.0)


# Reports and HLO

HLO = """\
HloModule jit_f, entry_computation_layout={()->f32[8]}

%cond.1 (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%fused.1 (p: f32[4]) -> f32[8] {
  ROOT %g = f32[8]{0} all-gather(%p), channel_id=3, dimensions={0}
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %start = (f32[4], f32[8]) fusion(%p), kind=kCustom, calls=%fused.1
  %done = f32[8] fusion(%start), kind=kCustom, calls=%fused.1
  %r = bf16[16]{0} all-reduce(%q), channel_id=4, to_apply=%add
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %kernel = f32[8] custom-call(%p), backend_config="{
}"
  %w = (s32[], f32[8]) while(%t), condition=%cond.1, body=%body.1
  ROOT %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), channel_id=9
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    assert hlo.collectives(HLO) == {
        "all-gather": {"count": 6, "bytes": 6 * 32},
        "all-reduce": {"count": 5, "bytes": 5 * 32},
    }
    known = HLO.replace(
        "body=%body.1", 'body=%body.1, backend_config={"known_trip_count":{"n":"2"}}'
    )
    assert hlo.collectives(known)["all-reduce"]["count"] == 2
    assert hlo.collectives("") == {}


def test_collectives_of_a_real_program():
    mesh = sharding.make_mesh({"replica": 1, "fsdp": jax.device_count(), "tensor": 1})
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding.batch_sharding(mesh))
    compiled = jax.jit(lambda x: x @ x).lower(x).compile()
    found = hlo.collectives(compiled.as_text())
    assert bool(found) == (jax.device_count() > 1)


def test_a_memory_report_is_read(tmp_path):
    assert verdicts.read_report(tmp_path) is None
    (tmp_path / "module.after_optimizations-memory-usage-report.txt").write_text(
        "Memory Space: vmem (color=1)\nTotal bytes: 7 (7B)\n"
        "Memory Space: default (color=0)\nTotal bytes: 2402659328 (2.24GiB)\n  cumulative; 1\n"
    )
    assert verdicts.read_report(tmp_path) == 2402659328


def test_sources_cover_what_the_programs_import():
    """A file that a program is made of, but that is not listed, would leave old verdicts alive."""
    code = (
        "import sys, opsdc_jax.planner.programs\n"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('opsdc_jax.')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    package = pathlib.Path(verdicts.__file__).parent.parent
    loaded = {str(pathlib.Path(name).relative_to(package)) for name in out.stdout.split()}
    loaded -= {"planner/__init__.py", "planner/topology.py"}
    missing = [name for name in loaded if not name.startswith(verdicts.SOURCES)]
    assert not missing


# Plans, from verdicts that are given


class Fake:
    """In place of compiling: bytes of a program by its name, and by the rows it samples."""

    def __init__(self, monkeypatch, **peaks):
        self.peaks, self.asked = peaks, []
        monkeypatch.setattr(plan, "verdicts", self)

    def __call__(self, names, spec, devices):
        self.asked.append((devices.name, tuple(spec["mesh"].values()), tuple(names)))
        return {name: self.one(name, spec, devices) for name in names}

    def one(self, name, spec, devices):
        peak = self.peaks.get(name, 0)
        if callable(peak):
            peak = peak(programs.rows(name, spec["settings"]), devices.devices)
        cost = {"flops": 1e12, "bytes": 1e9}
        parts = {"rollout": {"decode_weights": 10**8, "kv_cache": 10**9}}.get(name, {})
        return Verdict(int(peak * GIB), 1000, 0, parts, cost)


def test_a_verdict_is_kept_and_a_damaged_file_of_one_is_none(tmp_path):
    path = tmp_path / "plans" / "one.json"
    assert verdicts._kept(path) is None
    verdicts._keep(path, Verdict(7, parts={"text": 1}))
    assert verdicts._kept(path) == Verdict(7, parts={"text": 1})
    for content in ("{", '{"peak": 7, "speed": 1}', '{"arguments": 7}', "[]"):
        path.write_text(content)
        assert verdicts._kept(path) is None


def test_a_phase_is_judged_beside_what_stays_resident(monkeypatch):
    settings = settings_for("Qwen/Qwen3-0.6B")
    resident = 14 * 596_049_920 / GIB  # 4 + 2 + 8 bytes a parameter
    Fake(monkeypatch, rollout=14.9 - resident)
    made = plan.make_plan(settings, topology.parse("v5e:1x1"))
    assert made.fits
    assert made.peak == pytest.approx(14.9 * GIB, rel=1e-3)
    assert changes.changes(made, settings) == []
    Fake(monkeypatch, rollout=15.1 - resident)
    made = plan.make_plan(settings, topology.parse("v5e:1x1"))
    assert not made.fits, "it would fit 15.75 GiB, but not with 5% to spare"
    assert "0.14 more than 14.96 GiB" in text.verdict(made)
    help_ = changes.changes(made, settings)
    assert any(line.startswith("--config.sampler.slots=") for line in help_)
    assert any(line.startswith("--config.optim.offload=True") for line in help_)
    assert any(line.startswith("--topology v5e:2x2") for line in help_)


def test_a_state_too_large_says_how_many_devices_it_takes(monkeypatch):
    Fake(monkeypatch, apply=40)
    settings = settings_for("Qwen/Qwen3-8B")
    made = plan.make_plan(settings, topology.parse("v5e:2x2"))
    assert not made.fits
    needed = math.ceil(14 * 8_190_735_360 / (0.95 * 15.75 * GIB))
    assert any(line.startswith(f"{needed} devices") for line in changes.changes(made, settings))


def test_what_does_not_compile_does_not_fit(monkeypatch):
    monkeypatch.setattr(
        plan, "verdicts", lambda names, *_: dict.fromkeys(names, Verdict(None, error="why"))
    )
    settings = settings_for("Qwen/Qwen3-0.6B")
    made = plan.make_plan(settings, topology.parse("v5e:1x1"))
    assert (made.fits, made.peak) == (False, None)
    assert "why" in text.as_text(made, changes.changes(made, settings))


def test_the_bound_adds_the_phases_as_often_as_they_run(monkeypatch):
    Fake(monkeypatch)
    settings = settings_for("Qwen/Qwen3-0.6B", sampler__slots=8, teacher__every=50)
    made = plan.make_plan(settings, topology.parse("v5e:1x1"))
    runs = {phase.name: phase.runs for phase in made.phases}
    assert runs == {"accumulate": 8, "apply": 1, "refresh": 1 / 50, "rollout": 4}
    total = sum(phase.runs * phase.seconds for phase in made.phases)
    assert made.step_seconds == pytest.approx(total)
    rollout = made.phases[-1]
    # 8,192 tokens, each reading the weights and on average 5/9 of the cache, at 819 GB/s.
    assert rollout.seconds == pytest.approx(8192 * (1e8 + 5 / 9 * 1e9) / 819e9)
    as_json = json.loads(json.dumps(text.as_json(made, [])))
    assert as_json["bound_tokens_per_second"] == pytest.approx(32 * 8192 / total)
    assert "bound" in text.as_text(made, [])


def test_the_micro_batch_is_raised_to_the_mesh_and_said(monkeypatch):
    Fake(monkeypatch)
    settings = settings_for("Qwen/Qwen3-0.6B", mesh__fsdp=8, mesh__tensor=2)
    made = plan.make_plan(settings, topology.parse("v5e:4x4"))
    assert made.assumed == ("--config.train.micro_batch_size=8",)
    assert settings.train.micro_batch_size == 4, "the caller's settings are left alone"


def test_a_search_takes_the_smallest_slice_then_the_least_tensor_parallelism(monkeypatch):
    fake = Fake(
        monkeypatch,
        accumulate=lambda rows, devices: 9 if devices >= 4 else 20,
        rollout=lambda rows, devices: rows / 3,
    )
    settings = settings_for("Qwen/Qwen3-0.6B")
    monkeypatch.setattr(programs, "rows", lambda name, values: values["sampler.slots"] or 32)
    made = search.smallest(settings, topology.slices("v5e"))
    assert made.topology.name == "v5e:2x2"
    assert made.mesh == {"replica": 1, "fsdp": 4, "tensor": 1}
    # Beside 2.0 GiB of state: 32 rows take 10.7 GiB.
    assert made.assumed == ()
    assert fake.asked[0][2] == ("accumulate",), "the likeliest to fail comes first"


@pytest.mark.parametrize("within", [0, 2], ids=["no state", "the student"])
def test_fewer_rows_leave_what_no_row_takes(within):
    """Of 32 rows of 0.7 GiB, 8 fit beside 8 GiB of state and weights, within the program or not."""
    parts = {"weights": 2, "teacher": 1, "optimizer": 4, "decode_weights": 1}
    phase = plan.Phase(
        name="rollout",
        program=int((within + 1 + 32 * 0.7) * GIB),
        resident=(7 - within) * GIB,
        runs=1,
        flops=0,
        moved=0,
        seconds=None,
        collectives={},
    )
    made = plan.Plan(
        model="",
        parameters=0,
        topology=topology.parse("v5e:1x1"),
        mesh={"replica": 1, "fsdp": 1, "tensor": 1},
        assumed=(),
        parts={name: size * GIB for name, size in parts.items()},
        phases=(phase,),
        tokens=0,
        compile_seconds=0,
    )
    assert search.fewer_rows(phase, made, settings_for("Qwen/Qwen3-0.6B")) == 8


def test_a_search_compiles_nothing_that_cannot_fit(monkeypatch):
    fake = Fake(monkeypatch)
    made = search.smallest(settings_for("Qwen/Qwen3-32B"), [topology.parse("v5e:2x2")])
    assert made is None
    assert not fake.asked


# The script


def run(capsys, *arguments):
    code = load_script("plan").cli.run(load_script("plan").main, ["plan.py", *arguments])
    return code, capsys.readouterr()


CONFIG = ("--config", "configs/qwen3_0p6b.py")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (CONFIG, "--topology is required"),
        ((*CONFIG, "--topology", "v5e-4"), "is not known"),
        ((*CONFIG, "--topology", "v5e:2x2", "--mesh", "fsdp=3"), "does not multiply to the 4"),
        ((*CONFIG, "--topology", "v5e:2x2", "--mesh", "data=4"), "AXIS=SIZE"),
        ((*CONFIG, "--topology", "v5e:4x8", "--mesh", "tensor=32"), "sizes that work"),
        ((*CONFIG, "--search", "--topology", "v9"), "choose from"),
        ((*CONFIG, "--search", "--topology", "v5e,v9"), "choose from"),
        ((*CONFIG, "--search", "--mesh", "fsdp=4"), "leave out --mesh"),
        ((*CONFIG, "--topology", "v5e:1x1", "--config.model.path=me/mine"), "give its folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, arguments, says):
    code, printed = run(capsys, *arguments)
    assert code == 2
    assert says in printed.err
    assert printed.err.count("\n") == 1


def test_exit_codes_say_whether_it_fits(capsys, monkeypatch):
    Fake(monkeypatch)
    monkeypatch.setattr(verdicts, "libtpu_version", lambda: "0")
    code, printed = run(capsys, *CONFIG, "--topology", "v5e:1x1", "--json")
    assert code == 0
    assert json.loads(printed.out)["fits"]
    Fake(monkeypatch, apply=40)
    code, printed = run(capsys, *CONFIG, "--topology", "v5e:1x1")
    assert code == 1
    assert "does not fit" in printed.out


def test_a_tpu_without_libtpu_is_refused(monkeypatch):
    monkeypatch.setattr(verdicts, "libtpu_version", lambda: None)
    with pytest.raises(InputError, match=r"\[plan\]"):
        verdicts.verdicts(["apply"], {}, topology.parse("v5e:1x1"))


# Real verdicts


def short_settings(**values):
    return settings_for(
        sampler__max_prompt_tokens=32,
        sampler__max_response_tokens=96,
        train__batch_size=8,
        **values,
    )


def test_a_host_mesh_is_planned_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(plan, "architecture", lambda settings: (SMALL, 40))
    settings = short_settings(mesh__fsdp=1)
    made = plan.make_plan(settings, topology.parse("cpu:1"))
    assert made.fits
    assert made.step_seconds is None
    reported = {phase.name: phase.program for phase in made.phases}
    spec = programs.make_spec(settings, SMALL, 40, made.mesh)
    for name in ("accumulate", "refresh"):
        program = programs.build(name, spec, sharding.make_mesh(made.mesh))
        compiled = program.jitted.lower(*program.args, **program.static).compile()
        used = compiled.memory_analysis()
        total = used.argument_size_in_bytes + used.temp_size_in_bytes
        total += used.output_size_in_bytes - used.alias_size_in_bytes
        assert reported[name] == pytest.approx(total, rel=0.01), name
    monkeypatch.setattr(verdicts, "_start", None)  # a second time, nothing is started
    assert plan.make_plan(settings, topology.parse("cpu:1")) == made


needs_libtpu = pytest.mark.skipif(
    verdicts.libtpu_version() is None, reason="libtpu is not installed (pip install '.[plan]')"
)


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Plans two layers of real width: kernels, layouts and collectives of a v5e, in seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = dataclasses.replace(
        SHAPES["qwen3_0p6b"], vocab_size=4096, num_hidden_layers=2, compute_dtype="bfloat16"
    )
    monkeypatch.setattr(plan, "architecture", lambda settings: (model, 4000))

    def make(**values):
        settings = short_settings(mesh__fsdp=2, mesh__tensor=2, train__micro_batch_size=8, **values)
        made = plan.make_plan(settings, topology.parse("v5e:2x2"))
        assert made.fits, [phase.error for phase in made.phases]
        return made.parts, {phase.name: phase for phase in made.phases}

    return make


@needs_libtpu
def test_a_tpu_slice_is_planned_without_a_tpu(planned):
    parts, phases = planned()
    state = sum(parts[name] for name in memory.STATE)
    assert phases["apply"].peak >= state + parts["gradients"]
    assert phases["rollout"].peak >= state + parts["kv_cache"]
    assert phases["accumulate"].collectives["all-gather"]["count"] >= 2
    assert phases["refresh"].program <= 1.01 * (parts["weights"] + parts["teacher"])


@needs_libtpu
def test_a_tpu_slice_holds_decodings_weights_once_while_prompts_wait(planned):
    """Eight rollouts in four slots; a second layout of the layers would be half as much again."""
    parts, phases = planned(sampler__slots=4)
    names = (*memory.STATE, "decode_weights", "kv_cache", "prompts")
    sampled = sum(parts[name] for name in names)
    assert sampled <= phases["rollout"].peak <= sampled + parts["decode_weights"] / 2
