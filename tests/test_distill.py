"""The train step: gradients, invariances, the teacher, donation, compilations."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SMALL, random_params, relative_error

from opsdc_jax import distill, objective, sharding
from opsdc_jax.metrics import CompileCounter
from opsdc_jax.models import qwen3
from opsdc_jax.rollout import DistillBatch, Rollout, micro_batches, pair

ENTRIES, PAD = 37, 0
PROMPT_WIDTH, WIDTH = 9, 16
ROWS = 4
OPTIM = types.SimpleNamespace(
    lr=1e-2, warmup_steps=4, b1=0.9, b2=0.95, weight_decay=0.01, clip_norm=1.0
)


def make_train_step(teacher_dtype="float32", divergence="reverse_kl", optim=OPTIM, **options):
    mesh = sharding.make_mesh({"replica": 1, "fsdp": -1, "tensor": 1})
    return distill.make_train_step(
        SMALL,
        distill.make_optimizer(optim),
        divergence=divergence,
        chunk_tokens=16,
        vocab_size=ENTRIES,
        shardings=qwen3.shardings(SMALL, mesh),
        teacher_dtype=teacher_dtype,
        **options,
    )


@pytest.fixture(scope="module")
def jitted():
    return make_train_step()


@pytest.fixture(scope="module")
def student():
    return random_params(SMALL, 0)


@pytest.fixture(scope="module")
def teacher():
    return random_params(SMALL, 1)


def random_batch():
    """A rollout with lengths 1 to 16, and prompts of different lengths on the two sides."""
    rng = np.random.default_rng(0)
    lengths = np.array([16, 3, 1, 9], np.int32)
    rollout = Rollout(
        tokens_BxR=rng.integers(1, ENTRIES, (ROWS, WIDTH)).astype(np.int32),
        lengths_B=lengths,
        stopped_B=lengths < WIDTH,
        logprobs_BxR=-rng.random((ROWS, WIDTH)).astype(np.float32),
    )

    def prompts(low, high):
        return [rng.integers(1, ENTRIES, rng.integers(low, high)).tolist() for _ in range(ROWS)]

    return rollout, prompts(2, 5), prompts(6, 10)


@pytest.fixture(scope="module")
def batch_inputs():
    return random_batch()


def accumulated(jitted, student, teacher, batches):
    if len(batches) == 1 and len(batches[0].lengths_B) >= ROWS:
        return jitted.single(student, teacher, *batches)
    accumulator = jitted.zeros(student)
    for batch in batches:
        accumulator = jitted.accumulate(student, teacher, accumulator, batch)
    return accumulator


def cut(batch_inputs, micro_batch_size, **options):
    longest = PROMPT_WIDTH + WIDTH
    return micro_batches(
        *batch_inputs, micro_batch_size=micro_batch_size, longest=longest, pad_id=PAD, **options
    )


def mean(jitted, student, teacher, batches):
    """(loss, gradient) of a step."""
    parts = accumulated(jitted, student, teacher, batches)
    return jax.tree.map(lambda leaf: leaf / parts.shares, (parts.sums.divergence, parts.gradients))


@pytest.fixture(scope="module")
def whole(jitted, student, teacher, batch_inputs):
    return accumulated(jitted, student, teacher, cut(batch_inputs, ROWS))


def row_by_row_loss(student, teacher, batch_inputs):
    """Summed reverse KL: each row alone, unpadded, dense logits."""
    rollout, student_prompts, teacher_prompts = batch_inputs
    total = 0.0
    for row, length in enumerate(rollout.lengths_B):
        response = rollout.tokens_BxR[row, :length].tolist()

        def log_probs(params, prompt, response=response):
            hidden = qwen3.forward(params, SMALL, jnp.array([prompt + response]))[0]
            logits = hidden[len(prompt) - 1 : -1] @ qwen3.unembedding(params)[:ENTRIES].T
            return jax.nn.log_softmax(logits)

        log_q = log_probs(student, student_prompts[row])
        log_p = log_probs(teacher, teacher_prompts[row])
        total += jnp.sum(jnp.exp(log_q) * (log_q - log_p))
    return total


def test_loss_and_gradient_are_those_of_each_row_alone(student, teacher, batch_inputs, whole):
    loss = jax.jit(lambda *params: row_by_row_loss(*params, batch_inputs))
    value, gradient = jax.value_and_grad(loss)(student, teacher)
    assert value / batch_inputs[0].lengths_B.sum() >= 0.1
    assert int(whole.tokens) == batch_inputs[0].lengths_B.sum()
    assert float(whole.sums.divergence) == pytest.approx(float(value), rel=1e-5)
    assert relative_error(whole.gradients, gradient) <= 1e-5


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_micro_batches_and_their_widths_change_nothing(
    jitted, student, teacher, batch_inputs, whole, micro_batch_size
):
    batches = cut(batch_inputs, micro_batch_size)
    assert len({batch.student_BxT.shape for batch in batches}) > 1
    parts = accumulated(jitted, student, teacher, batches)
    assert int(parts.tokens) == int(whole.tokens)
    for name, expected in whole.sums._asdict().items():
        assert float(getattr(parts.sums, name)) == pytest.approx(float(expected), rel=1e-6)
    assert relative_error(parts.gradients, whole.gradients) <= 1e-5


def test_padding_rows_and_padding_tokens_change_nothing(
    jitted, student, teacher, batch_inputs, whole
):
    rollout, student_prompts, teacher_prompts = batch_inputs
    padded = jax.tree.map(lambda leaf: np.concatenate([leaf, np.zeros_like(leaf)]), rollout)
    batch = pair(
        padded,
        [*student_prompts, [], [5], [7, 7], []],
        [*teacher_prompts, [], [5], [7, 7], []],
        student_width=PROMPT_WIDTH + WIDTH,
        teacher_width=PROMPT_WIDTH + WIDTH,
        response_width=WIDTH,
        pad_id=PAD,
    )
    wide = dataclasses.replace(
        batch,
        response_BxR=np.pad(batch.response_BxR, ((0, 0), (0, 8))),
        logprobs_BxR=np.pad(batch.logprobs_BxR, ((0, 0), (0, 8))),
        student_BxT=np.pad(batch.student_BxT, ((0, 0), (0, 8))),
        teacher_BxT=np.pad(batch.teacher_BxT, ((0, 0), (0, 8))),
    )
    parts = accumulated(jitted, student, teacher, [wide])
    assert int(parts.tokens) == int(whole.tokens)
    assert float(parts.sums.divergence) == pytest.approx(float(whole.sums.divergence), rel=1e-6)
    assert relative_error(parts.gradients, whole.gradients) <= 1e-5


@pytest.fixture(scope="module")
def row_means(jitted, student, teacher, batch_inputs):
    """The (loss, gradient) of each row alone, in the order of their lengths."""
    batches = cut(batch_inputs, 1)
    assert [int(batch.lengths_B[0]) for batch in batches] == [1, 3, 9, 16]
    return [mean(jitted, student, teacher, [batch]) for batch in batches]


def averaged(means, weights):
    return jax.tree.map(lambda *leaves: np.average(leaves, axis=0, weights=weights), *means)


# Rows have 1, 3, 9 and 16 tokens, in this order.
@pytest.mark.parametrize(
    ("rule", "micro_batch_size", "weights"),
    [
        ("sequences", 4, (1, 1, 1, 1)),
        ("sequences", 2, (1, 1, 1, 1)),
        ("micro_batches", 4, (1, 3, 9, 16)),
        ("micro_batches", 2, (1 / 4, 3 / 4, 9 / 25, 16 / 25)),
    ],
)
def test_means_are_those_of_the_rows(
    jitted, student, teacher, batch_inputs, row_means, rule, micro_batch_size, weights
):
    """The cut into micro-batches decides in "micro_batches", as in the reference code, alone."""
    batches = cut(batch_inputs, micro_batch_size, weights=rule)
    got, expected = mean(jitted, student, teacher, batches), averaged(row_means, weights)
    assert float(got[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    assert relative_error(got[1], expected[1]) <= 1e-5
    by_tokens = averaged(row_means, (1, 3, 9, 16))
    assert weights == (1, 3, 9, 16) or relative_error(got[1], by_tokens[1]) > 0.1


@pytest.mark.parametrize("rule", ["tokens", "sequences", "micro_batches"])
def test_rows_without_credit_are_as_good_as_removed(jitted, student, teacher, batch_inputs, rule):
    rollout, *prompts = batch_inputs
    kept = [0, 3]  # the two longest, which fill a micro-batch of two
    fewer = (
        jax.tree.map(lambda leaf: leaf[kept], rollout),
        *([side[row] for row in kept] for side in prompts),
    )
    credit = np.isin(np.arange(ROWS), kept)
    got = mean(jitted, student, teacher, cut(batch_inputs, 2, weights=rule, credit_B=credit))
    expected = mean(jitted, student, teacher, cut(fewer, 2, weights=rule))
    assert relative_error(got, expected) <= 1e-5


def test_a_step_without_credit_has_no_gradient(jitted, student, teacher, batch_inputs):
    batches = cut(batch_inputs, ROWS, credit_B=np.zeros(ROWS))
    accumulator = accumulated(jitted, student, teacher, batches)
    _, metrics = jitted.apply(jitted.init(copy(student)), accumulator)
    assert (metrics["loss"], metrics["grad_norm"], metrics["skipped"]) == (0, 0, False)
    assert metrics["student_entropy"] > 0


def test_advantages_give_the_policy_gradient(student, teacher, batch_inputs):
    """Of REINFORCE: each row's advantage times its log-likelihood, from dense logits."""
    advantages = np.array([1.5, -0.5, 0.25, -1.25])
    (batch,) = cut(batch_inputs, ROWS, weights="advantages", credit_B=advantages)
    tokens, first = jnp.asarray(batch.student_BxT), batch.student_prompt_B[:, None] - 1
    positions = np.arange(tokens.shape[1] - 1)
    predicts = (positions >= first) & (positions < first + batch.lengths_B[:, None])

    def objective(params):
        hidden = qwen3.forward(params, SMALL, tokens)[:, :-1]
        logprobs = jax.nn.log_softmax(hidden @ qwen3.unembedding(params)[:ENTRIES].T)
        chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[:, :, 0]
        rows = jnp.sum(jnp.where(predicts, chosen, 0.0), axis=-1)
        return rows @ advantages[[2, 1, 3, 0]] / batch.lengths_B.sum()  # in order of length

    loss, gradient = mean(make_train_step(divergence="nll"), student, teacher, [batch])
    expected, ascent = jax.jit(jax.value_and_grad(objective))(student)
    assert float(loss) == pytest.approx(-float(expected), rel=1e-5)
    assert relative_error(gradient, jax.tree.map(jnp.negative, ascent)) <= 1e-5


@pytest.fixture(scope="module")
def anchored():
    return make_train_step(anchor=0.5)


@pytest.mark.parametrize("rule", ["sequences", "advantages"])
def test_the_anchor_adds_the_divergence_to_the_base(
    jitted, anchored, student, teacher, batch_inputs, rule
):
    """Both sides at the student's prompt; weighted as a mean, also beside advantages."""
    rollout, prompts, _ = batch_inputs
    base = random_params(SMALL, 2)
    credit = np.array([1.0, -1.0, 0.5, -0.5]) if rule == "advantages" else None
    (batch,) = cut(batch_inputs, ROWS, weights=rule, credit_B=credit)
    means = "tokens" if rule == "advantages" else rule
    plain = cut((rollout, prompts, prompts), ROWS, weights=means)
    to_base, pull = mean(jitted, student, base, plain)
    loss, gradient = mean(jitted, student, teacher, [batch])
    got = anchored.single(student, teacher, batch, base)
    expected = jax.tree.map(lambda own, other: own + 0.5 * other, gradient, pull)
    assert relative_error(got.gradients, jax.tree.map(lambda x: x * got.shares, expected)) <= 1e-5
    state = dataclasses.replace(anchored.init(copy(student)), base=base)
    _, metrics = anchored.apply(state, got)
    assert float(metrics["anchor_kl"]) == pytest.approx(float(to_base), rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(float(loss + 0.5 * to_base), rel=1e-5)


def test_the_base_is_a_tree_of_its_own_that_stays(jitted, anchored, student, whole):
    assert jitted.init(copy(student)).base is None
    state = anchored.init(copy(student))
    held = buffers(state.base)
    assert trees_equal(state.base, student)
    assert not held & (buffers(state.student) | buffers(state.teacher))
    state, _ = anchored.apply(state, whole)
    assert trees_equal(state.base, student)
    assert buffers(state.base) == held
    assert not trees_equal(state.student, student)


def test_off_policy_steps_have_no_gap_to_the_sampler(student, whole):
    off_policy = make_train_step(on_policy=False)
    _, metrics = off_policy.apply(off_policy.init(copy(student)), whole)
    assert not {"logprob_gap_mean", "logprob_gap_max"} & metrics.keys()


@pytest.mark.parametrize("clipped", [False, True])
def test_apply_is_clipped_adamw_on_the_token_mean(student, whole, clipped):
    mean = jax.tree.map(lambda leaf: leaf / whole.tokens, whole.gradients)
    limit = float(optax.tree.norm(mean)) * (0.5 if clipped else 2.0)
    optim = types.SimpleNamespace(**{**vars(OPTIM), "clip_norm": limit})
    jitted = make_train_step(optim=optim)
    reference = optax.chain(
        optax.clip_by_global_norm(limit),
        optax.adamw(OPTIM.lr / 4, b1=OPTIM.b1, b2=OPTIM.b2, weight_decay=OPTIM.weight_decay),
    )
    updates, moments = reference.update(mean, reference.init(student), student)
    expected = optax.apply_updates(student, updates)
    state, metrics = jitted.apply(jitted.init(copy(student)), whole)
    assert int(state.step) == 1
    assert relative_error(state.student, expected) <= 1e-6
    for name in ("mu", "nu"):  # AdamW's first step is the same for every scale of the gradient
        ours, theirs = (optax.tree.get(state, name) for state in (state.optimizer, moments))
        assert relative_error(ours, theirs) <= 1e-6
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(mean)), rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(
        float(whole.sums.divergence) / int(whole.tokens), rel=1e-6
    )
    assert float(metrics["logprob_gap_max"]) >= float(metrics["logprob_gap_mean"]) > 0


def test_moments_on_the_host_change_nothing_and_stay_there(jitted, student, whole):
    """Two updates: the second starts from moments that are not zero."""
    offloaded = make_train_step(teacher_dtype="float32", offload_optimizer=True)
    states = []
    for step in (jitted, offloaded):
        state = step.init(copy(student))
        for _ in range(2):
            state, _ = step.apply(state, whole)
        states.append(state)
    assert trees_equal(*(jax.device_get((state.student, state.optimizer)) for state in states))
    for state, expected in zip(states, ("device", "pinned_host"), strict=True):
        moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
        assert {leaf.sharding.memory_kind for leaf in moments} == {expected}
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.student)} == {"device"}


def test_learning_rate_warms_up_linearly_to_a_constant():
    """With unit gradients and b1 = b2 = 0, the first AdamW updates are the rate itself."""
    settings = types.SimpleNamespace(**{**vars(OPTIM), "weight_decay": 0.0, "b1": 0.0, "b2": 0.0})
    optimizer = distill.make_optimizer(settings)
    params = {"w": jnp.zeros(())}
    state, rates = optimizer.init(params), []
    for _ in range(6):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params, norm=jnp.ones(()))
        rates.append(-float(updates["w"]))
    np.testing.assert_allclose(rates, [2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2, 1e-2], rtol=1e-5)


def test_training_pulls_the_student_to_the_teacher(jitted, student, teacher, batch_inputs):
    batches = list(cut(batch_inputs, ROWS))
    state = dataclasses.replace(jitted.init(copy(student)), teacher=copy(teacher))
    losses = []
    for _ in range(20):
        accumulator = accumulated(jitted, state.student, state.teacher, batches)
        state, metrics = jitted.apply(state, accumulator)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert trees_equal(state.teacher, teacher), "a step must not move the teacher"


def test_the_first_teacher_is_a_copy_not_an_alias(jitted, student):
    state = jitted.init(copy(student))
    assert trees_equal(state.teacher, student)
    assert not buffers(state.teacher) & buffers(state.student)


def test_refresh_copies_into_the_teachers_own_buffers(jitted, student, teacher):
    new, old = copy(student), copy(teacher)
    held = buffers(old)
    refreshed = jitted.refresh(new, old)
    assert trees_equal(refreshed, student)
    assert buffers(refreshed) == held
    assert not buffers(refreshed) & buffers(new)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    compiled = jitted.refresh.lower(student, teacher).compile().as_text()
    aliased = compiled.split("entry_computation_layout")[0].count("may-alias")
    assert aliased == len(jax.tree.leaves(student))


def test_refresh_with_a_decay_is_a_mean_in_the_teachers_own_buffers(student, teacher):
    jitted = make_train_step(teacher_decay=0.75)
    new, old = copy(student), copy(teacher)
    held = buffers(old)
    refreshed = jitted.refresh(new, old)
    expected = jax.tree.map(lambda ours, theirs: (ours + 3 * theirs) / 4, student, teacher)
    assert relative_error(refreshed, expected) <= 1e-6
    assert buffers(refreshed) == held
    assert not buffers(refreshed) & buffers(new)


def test_refresh_casts_to_the_teachers_dtype(student):
    jitted = make_train_step(teacher_dtype="bfloat16")
    state = jitted.init(copy(student))
    teacher = jitted.refresh(state.student, state.teacher)
    for tree in (state.teacher, teacher):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.student)} == {jnp.dtype("float32")}


def test_steady_state_compiles_nothing(jitted, student, teacher, batch_inputs):
    """After the first use of each shape, other data, step numbers and weights compile nothing."""

    def step(state, seed):
        rollout, *prompts = batch_inputs
        rng = np.random.default_rng(seed)
        rows = rng.permutation(ROWS)
        shuffled = jax.tree.map(lambda leaf: leaf[rows], rollout)
        inputs = (shuffled, *([side[row] for row in rows] for side in prompts))
        accumulator = accumulated(jitted, state.student, state.teacher, cut(inputs, 2))
        state, _ = jitted.apply(state, accumulator)
        return dataclasses.replace(state, teacher=jitted.refresh(state.student, state.teacher))

    state = step(jitted.init(copy(student)), seed=0)
    counter = CompileCounter()
    for seed in (1, 2, 3):
        state = step(state, seed)
    jax.block_until_ready(state)
    assert counter.count == 0
    jax.jit(lambda x: x + seed)(1)  # the counter does count
    assert counter.count == 1


@pytest.mark.parametrize(
    ("every", "due"),
    [(0, []), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (5, [5]), (7, [])],
)
def test_refresh_schedule(every, due):
    assert [step for step in range(1, 7) if distill.refresh_due(step, every)] == due


def test_response_positions_predict_the_response(student):
    """Row t of the response's hidden states is the one whose successor is response token t."""
    tokens = jnp.array([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
    hidden = qwen3.forward(student, SMALL, tokens)
    got = objective.response_hidden(
        student,
        SMALL,
        None,
        qwen3.embed(student, tokens),
        jnp.array([2, 4]),
        jnp.array([2, 2]),
        2,
    )
    np.testing.assert_array_equal(got[0], hidden[0, 1:3])
    np.testing.assert_array_equal(got[1], hidden[1, 3:5])


def test_response_mask():
    fields = {field.name: None for field in dataclasses.fields(DistillBatch)}
    batch = DistillBatch(**fields | {"response_BxR": np.zeros((3, 4)), "lengths_B": np.arange(3)})
    expected = [[False] * 4, [True, False, False, False], [True, True, False, False]]
    assert objective.response_mask(batch).tolist() == expected


def copy(params):
    return jax.tree.map(jnp.copy, params)


def buffers(params):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}


def trees_equal(left, right):
    return jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), left, right))


@pytest.mark.parametrize(
    ("where", "offload"), [("loss", False), ("gradient", False), ("gradient", True)]
)
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(
    jitted, student, whole, where, offload
):
    if offload:
        jitted = make_train_step(offload_optimizer=True)
    state, metrics = jitted.apply(jitted.init(copy(student)), whole)
    assert not metrics["skipped"]
    if where == "loss":
        bad = dataclasses.replace(whole, sums=whole.sums._replace(divergence=jnp.float32(jnp.nan)))
    else:
        gradients = copy(whole.gradients)
        gradients["embedding"] = gradients["embedding"].at[3, 5].set(jnp.inf)
        bad = dataclasses.replace(whole, gradients=gradients)
    before = jax.device_get(state)
    after, metrics = jitted.apply(state, bad)
    assert metrics["skipped"]
    for part in ("student", "teacher", "optimizer"):
        assert trees_equal(jax.device_get(getattr(after, part)), getattr(before, part))
    assert [leaf.sharding for leaf in jax.tree.leaves(after)] == [
        leaf.sharding for leaf in jax.tree.leaves(jitted.like)
    ]
    assert int(after.step) == 2
    after, metrics = jitted.apply(after, whole)
    assert not metrics["skipped"]
    assert not trees_equal(after.student, before.student)
