"""Continuous batching gives what one batch gives, whatever starts and ends when."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hf_reference import NEW_TOKENS, PAD_ID, PROMPT_WIDTH, load
from test_sampler import (
    GREEDY,
    NEVER,
    ROWS,
    assert_same,
    constant_model,
    host_sampler,
    sample,
    sampled,
    training_keys,
)

from opsdc_jax import continuous, prefill, sharding, slots
from opsdc_jax.continuous import Layout
from opsdc_jax.metrics import CompileCounter
from opsdc_jax.models import decode, qwen3
from opsdc_jax.models.layers import COLUMNS
from opsdc_jax.rollout import left_pad
from opsdc_jax.sampling import SamplingParams

SLOTS = 4
WORTHWHILE = continuous.worthwhile


@pytest.fixture(autouse=True)
def _short_rings(monkeypatch):
    """Rings of these short responses have more than one size too.

    What is expected is of one program, at whatever length.
    """
    monkeypatch.setattr(continuous, "LEAST_COLUMNS", 16)
    monkeypatch.setattr(
        continuous, "worthwhile", lambda slots, responses, *_: 0 < slots < responses
    )


def continuously(sampling, *, stop=NEVER, rows=None, prompts=None):
    """What `test_sampler.sample` returns, in 4 slots; under the guards of the training loop."""
    model = load("untied")
    rows = np.arange(ROWS) if rows is None else np.asarray(rows)
    keys = training_keys(rows)
    with sharding.explicit_transfers():
        return dataclasses.replace(host_sampler(model, stop), slots=SLOTS)(
            jax.device_put(model.params),
            [model.inputs.prompts[row] for row in rows] if prompts is None else prompts,
            keys,
            sampling,
        )


def test_responses_that_all_use_their_budget():
    """The ring grows for each set of four, and shrinks for the next."""
    assert_same(continuously(SamplingParams()), sampled("untied"))


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(0.8, 0.9, 12),
        GREEDY,
        SamplingParams(max_tokens=20),
        SamplingParams(max_tokens=1),
    ],
    ids=["temperature 1", "top-p and top-k", "greedy", "a budget in a segment", "one token"],
)
def test_responses_of_any_length(sampling):
    """Two end with their first token, others anywhere, some by the budget; prompts are ragged."""
    model = load("untied")
    first = sample(model, sampling).tokens_BxR[[1, 6], 0]
    stop = (int(first[0]), int(first[1]))
    expected = sample(model, sampling, stop=stop)
    assert (expected.lengths_B[[1, 6]] == 1).all()
    assert len({len(prompt) for prompt in model.inputs.prompts}) > 3
    if sampling == SamplingParams():
        assert len(set(expected.lengths_B)) > 8
        assert 2 < expected.stopped_B.sum() < ROWS
    assert_same(continuously(sampling, stop=stop), expected)


@pytest.mark.parametrize(
    ("slots", "responses", "widths", "expected"),
    [
        (0, 8, (1024, 8192), True),  # a ring of 1,152 columns where one program has 5,120
        (0, 8, (1024, 2048), False),  # 1,152 and 2,048, of which the half is 1,024
        (0, 8, (32, 800), False),  # a ring has 256 at least; 432
        (0, 8, (320, 128), False),  # 352 and 384
        (8, 8, (320, 128), False),
        (4, 8, (320, 128), True),  # a slot is refilled
    ],
)
def test_segments_where_slots_are_refilled_or_contexts_grow(
    monkeypatch, slots, responses, widths, expected
):
    monkeypatch.undo()
    assert continuous.worthwhile(slots, responses, *widths) == expected


def test_long_contexts_go_in_segments_also_where_every_row_has_a_slot(monkeypatch):
    """And the first segment is under way before anybody waits."""
    model, stop = load("untied"), (5, 9)
    expected = sample(model, SamplingParams(), stop=stop)
    monkeypatch.setattr(continuous, "worthwhile", WORTHWHILE)
    monkeypatch.setattr(continuous, "SEGMENT", 4)
    columns, advance, read = [], slots.advance, []

    def noted(weights, config, state, *args, **static):
        columns.append(slots.columns_of(state.caches[0]))
        return advance(weights, config, state, *args, **static)

    get = jax.device_get
    monkeypatch.setattr(slots, "advance", noted)
    monkeypatch.setattr(jax, "device_get", lambda tree: read.append(len(columns)) or get(tree))
    keys, params = training_keys(np.arange(ROWS)), jax.device_put(model.params)
    with sharding.explicit_transfers():
        finish = host_sampler(model, stop).start(
            params, model.inputs.prompts, keys, SamplingParams()
        )
        assert len(columns) == 1
        assert 1 not in read, "nothing of it was read"
        assert_same(finish(), expected)
    assert len(columns) > 1
    assert columns == sorted(columns)
    assert columns[0] < columns[-1] == PROMPT_WIDTH + NEW_TOKENS


def test_embeddings_that_lie_as_decoding_wants_them_are_not_copied():
    model = load("untied")
    mesh = host_sampler(model).mesh
    given = jax.device_put(model.params, qwen3.shardings(model.config, mesh, sharding.DECODE_RULES))
    weights = decode.prepare(given, model.config, mesh)
    same = jax.tree.map(lambda a, b: a is b, weights.params, decode.outside_layers(given))
    assert jax.tree.all(same)
    half = dataclasses.replace(model.config, compute_dtype="bfloat16")
    cast = jax.tree.leaves(decode.prepare(given, half, mesh))
    assert {leaf.dtype.name for leaf in cast} == {"bfloat16"}


def test_layers_are_there_once_while_prompts_wait(monkeypatch):
    """In compute dtype, beside the rings and the prompts that are next in line."""
    model = load("untied")
    half = dataclasses.replace(model.config, compute_dtype="bfloat16")
    params = jax.device_put(model.params)

    def held():
        return sum(leaf.nbytes for leaf in jax.live_arrays() if leaf.dtype == half.compute_dtype)

    def size(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    seen, advance = [], slots.advance

    def noted(weights, config, state, *args, **static):
        beside = held() - before - size(weights) - size(state.caches)
        seen.append(beside / size(weights.layers))
        return advance(weights, config, state, *args, **static)

    monkeypatch.setattr(slots, "advance", noted)
    sampler = dataclasses.replace(host_sampler(model), model=half, slots=SLOTS)
    before = held()
    sampler(params, model.inputs.prompts, training_keys(np.arange(ROWS)), SamplingParams())
    assert len(seen) > ROWS // SLOTS
    assert max(seen) < 0.5


def test_a_layer_laid_out_for_decoding_is_the_trained_one():
    """To the last bit, each in its place."""
    model = load("untied")
    weights = decode.prepare(model.params, model.config, host_sampler(model).mesh)
    got = jax.tree.map(lambda *layers: np.stack(layers), *map(decode.as_trained, weights.layers))
    jax.tree.map(np.testing.assert_array_equal, got, model.params["layers"])


def test_a_prefill_by_the_weights_of_decoding_is_that_by_the_stack():
    model = load("untied")
    config, mesh = model.config, host_sampler(model).mesh
    params = jax.device_put(model.params)
    lengths = np.array([len(prompt) for prompt in model.inputs.prompts], np.int32)
    given = left_pad(model.inputs.prompts, PROMPT_WIDTH, PAD_ID), lengths
    by_stack = jax.jit(prefill.by_stack, static_argnames=("config", "mesh"))
    expected = by_stack(params, config, mesh, *given)
    got = prefill.by_layers(decode.prepare(params, config, mesh), config, mesh, *given)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    np.testing.assert_allclose(got.hidden_MxD, expected.hidden_MxD, rtol=1e-5, atol=1e-5)
    real = np.arange(PROMPT_WIDTH) >= PROMPT_WIDTH - lengths[:, None]

    def check(ours, theirs, axis):
        a, b = (np.moveaxis(cache, axis, 1)[real] for cache in (ours, theirs))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    for ours, theirs in zip(got.caches, expected.caches, strict=True):
        jax.tree.map(check, ours, theirs, COLUMNS)


def test_a_deep_model_prepares_and_prefills_by_no_more_programs():
    model = load("untied")
    mesh = host_sampler(model).mesh

    def programs(layers):
        config = dataclasses.replace(model.config, num_hidden_layers=layers)
        params = jax.jit(qwen3.init_params, static_argnums=0)(config, jax.random.key(0))
        given = sharding.place(
            (np.ones((SLOTS, PROMPT_WIDTH), np.int32), np.full(SLOTS, 3, np.int32)),
            sharding.whole(mesh),
        )
        counter = CompileCounter()
        weights = decode.prepare(params, config, mesh)
        prefill.by_layers(weights, config, mesh, *given)
        return counter.count

    assert programs(5) == programs(7) > 0


def test_neither_order_nor_number_of_prompts_changes_a_response():
    """Also numbers that are no multiple of the slots."""
    model, stop = load("untied"), (5, 9)
    expected = sample(model, SamplingParams(), stop=stop)
    for rows in ([11, 3, 7, 0, 2], np.random.default_rng(0).permutation(ROWS)[:13]):
        got = continuously(SamplingParams(), stop=stop, rows=rows)
        assert_same(got, jax.tree.map(lambda leaf, rows=rows: leaf[rows], expected))


def test_equal_prompts_are_prefilled_once_and_answered_as_if_alone(monkeypatch):
    """Sixteen responses to three prompts, which run once each."""
    model, stop = load("untied"), (5, 9)
    prompts = [list(model.inputs.prompts[row]) for row in (2, *[4] * 9, *[9] * 6)]
    keys = training_keys(np.arange(len(prompts)))
    expected = host_sampler(model, stop)(model.params, prompts, keys, SamplingParams())
    runs, by_layers = [], prefill.by_layers

    def counted(*args):
        runs.append(np.asarray(args[3]))
        return by_layers(*args)

    monkeypatch.setattr(prefill, "by_layers", counted)
    got = continuously(SamplingParams(), stop=stop, rows=np.arange(len(prompts)), prompts=prompts)
    assert_same(got, jax.device_get(expected))
    assert len({tuple(row) for row in got.tokens_BxR[1:10]}) == 9
    assert sum(len(run) for run in runs) == 3


def test_once_compiled_nothing_is_compiled_again():
    """Neither by other sampling parameters, nor by a step whose responses differ in length."""
    continuously(SamplingParams(), stop=(5, 9))
    continuously(SamplingParams())
    counter = CompileCounter()
    for sampling in (GREEDY, SamplingParams(0.6, 0.95, 20, 50)):
        continuously(sampling, stop=(3, 4), rows=np.arange(ROWS)[::-1])
    assert counter.count == 0


def test_responses_come_as_they_end_while_the_next_segment_runs(monkeypatch):
    """Each once; those of a segment are handed over after the next one was started."""
    model, stop = load("untied"), (5, 9)
    expected = sample(model, SamplingParams(), stop=stop)
    started, advance = [], slots.advance

    def counted(*args, **static):
        started.append(len(started))
        return advance(*args, **static)

    monkeypatch.setattr(slots, "advance", counted)
    sampler = dataclasses.replace(host_sampler(model, stop), slots=SLOTS)
    keys = training_keys(np.arange(ROWS))
    seen = {}
    lists = sampler.responses(model.params, model.inputs.prompts, keys, SamplingParams())
    for number, ended in enumerate(lists, start=1):
        assert len(started) == number + 1 or len(seen) + len(ended) == ROWS
        assert not seen.keys() & {response.number for response in ended}
        seen |= {response.number: response for response in ended}
    assert sorted(seen) == list(range(ROWS))
    assert list(seen) != sorted(seen)
    for number, response in seen.items():
        length = expected.lengths_B[number]
        np.testing.assert_array_equal(response.tokens, expected.tokens_BxR[number, :length])
        assert response.stopped == expected.stopped_B[number]


@pytest.mark.parametrize(
    ("segment", "budget", "all_stop"),
    [(10, 64, False), (10, 25, False), (10, 64, True)],
    ids=["some stop", "small budget", "all stop"],
)
def test_a_stream_grows_into_what_generate_returns(segment, budget, all_stop, monkeypatch):
    """Each piece adds `segment` tokens at most to the one before, and the last is the whole."""
    model, stop = load("untied"), (5, 9)
    params = model.params
    if all_stop:
        params, logits = constant_model()
        stop = tuple(np.argsort(logits)[-2:])
    sampling = SamplingParams(max_tokens=budget)
    monkeypatch.setattr(continuous, "SEGMENT", segment)
    whole = sample(model, sampling, params=params, stop=stop)
    assert whole.stopped_B.all() == all_stop
    growing = host_sampler(model, stop).stream(
        params, model.inputs.prompts, training_keys(np.arange(ROWS)), sampling
    )
    pieces = list(itertools.islice(growing, NEW_TOKENS))  # a stream without end fails below
    assert_same(pieces[-1], whole)
    lengths = [np.ones(ROWS, int), *(piece.lengths_B for piece in pieces)]
    for before, after in itertools.pairwise(lengths):
        assert np.all(before <= after)
        assert 1 <= (after - before).max() <= segment
    for piece in pieces:
        response = np.arange(NEW_TOKENS) < piece.lengths_B[:, None]
        np.testing.assert_array_equal(
            piece.tokens_BxR, np.where(response, whole.tokens_BxR, PAD_ID)
        )
        np.testing.assert_array_equal(
            piece.stopped_B, whole.stopped_B & (piece.lengths_B == whole.lengths_B)
        )
    longest = int(whole.lengths_B.max())
    assert len(pieces) == -(-(longest - 1) // segment)
    assert not all_stop or 1 < longest < NEW_TOKENS


def layout(**sizes):
    defaults = {"longest_prompt": 40, "response_width": 160, "segment": 32}
    static = {"model": None, "mesh": None, "vocab_size": 8, "rows": 4, "pad_id": 0}
    return Layout(prompt_width=8, **static | defaults | sizes)


@pytest.mark.parametrize(
    ("prompt", "response", "columns"),
    [
        (40, 160, (72, 104, 152, 200)),
        (1024, 30_000, (3968, 7808, 15_616, 23_296, 31_024)),
        (12, 64, (48, 64, 76)),
        (40, 8, (48,)),
    ],
)
def test_the_ring_has_a_handful_of_sizes(prompt, response, columns):
    """The largest holds every context, and the smallest a prompt and what a segment adds."""
    got = layout(longest_prompt=prompt, response_width=response).columns
    assert got == columns
    assert got[0] >= min(prompt + 32, prompt + response)


@pytest.mark.parametrize(
    ("slots", "responses", "parts", "rows"),
    [
        (64, 1000, 1, 64),
        (64, 64, 1, 64),
        (64, 32, 1, 32),
        (64, 5, 1, 8),
        (64, 5, 8, 8),
        (6, 1, 2, 6),
        (0, 5, 1, 5),
        (0, 2, 4, 4),
    ],
)
def test_few_responses_take_fewer_slots(slots, responses, parts, rows):
    assert continuous.rows_for(slots, responses, parts) == rows


def test_the_ring_follows_the_longest_context_and_does_not_waver():
    """It grows in time for a segment, and shrinks where it would hold for one more."""
    sizes = layout()
    assert sizes.columns == (72, 104, 152, 200)
    grown = [(40, 72), (41, 104), (72, 104), (73, 152), (120, 152), (121, 200), (200, 200)]
    for longest, columns in grown:
        ring = 72
        while (new := sizes.next_columns(ring, longest)) != ring:
            ring = new
        assert ring == columns, longest
    assert sizes.next_columns(200, 89) == 200
    assert sizes.next_columns(200, 88) == 152
    assert sizes.next_columns(152, 41) == 152
    assert sizes.next_columns(152, 40) == 104
    assert sizes.next_columns(104, 40) == 104
    assert sizes.next_columns(104, 8) == 72
