"""Pretraining of the tiny base model, on two CPU cores in minutes.

The corpus is the task's own: responses under the plain prompt and under every instruction of the
tiny world, in the proportions of a `World`. A model of this size learns the styles early and the
task late, so two kinds of drill run beside the documents: single facts (arithmetic, soon learned)
and bare chains of operations (keeping track of the chain, the bottleneck). Drills stand outside the
chat format and therefore leave the style of responses alone.

Shapes: B rows, T positions.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from opsdc_jax.models import hf, qwen3
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.qwen3 import Params
from opsdc_jax.prompts import Prompts
from opsdc_jax.rollout import Array
from opsdc_jax.tiny import task
from opsdc_jax.tiny.worlds import WORLDS, World, draw_style

# After these and after numbers, the next word is part of a chain of operations or follows from it.
_CHAIN_WORDS = frozenset({"+", "-", "*", "=", ":", "is", "have"})
_DOCUMENT_STREAM, _DRILL_STREAM = 10, 11  # of random numbers; those of problems are below 10


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the base model is trained.

    Attributes:
      steps: optimizer steps.
      documents: problems with a response in each step.
      chain_weight: weight of response tokens inside chains of operations, next to 1 for the others.
      fact_steps, fact_rows, facts_in_row: drills of single facts, in the first steps only.
      chain_steps, chain_rows: drills of whole chains of operations, one in each row.
      drill_weight: weight of the mean loss of either drill, next to 1 for the documents.
      micro_batch: rows of one gradient computation.
      row_step: rows are padded to a multiple of this; each width compiles once.
      muon_lr, adam_lr: peaks of the learning rates.
      warmup_steps: of linear warm-up; a cosine to 2% of the peak follows.
    """

    steps: int = 800
    documents: int = 24
    chain_weight: float = 3.0
    fact_steps: int = 250
    fact_rows: int = 12
    facts_in_row: int = 16
    chain_steps: int = 650
    chain_rows: int = 24
    drill_weight: float = 0.4
    micro_batch: int = 12
    row_step: int = 32
    muon_lr: float = 6e-3
    adam_lr: float = 4e-3
    warmup_steps: int = 20
    weight_decay: float = 0.05

    def scaled(self, factor: float) -> "Recipe":
        """The same recipe in `factor` times the steps."""
        scale = lambda steps: max(1, round(factor * steps))  # noqa: E731
        return dataclasses.replace(
            self,
            steps=scale(self.steps),
            fact_steps=scale(self.fact_steps),
            chain_steps=scale(self.chain_steps),
            warmup_steps=scale(self.warmup_steps),
        )


def base_config(vocab_size: int) -> Qwen3Config:
    """Architecture of the tiny base: a Qwen3 of about half a million parameters."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )


class Rows(NamedTuple):
    """Token rows padded on the right, and the weight of each token's own loss; both [B, T].

    Weights are 0 wherever the token is not to be learned: prompts, padding, drill questions.
    """

    tokens_BxT: Array
    weights_BxT: Array


class Corpus:
    """The training rows as a pure function of (seed, step)."""

    def __init__(
        self,
        tokenizer: Any,
        seed: int,
        recipe: Recipe,
        world: World = WORLDS["default"],
    ):
        self._tokenizer = tokenizer
        self._world = world
        self._seed = seed
        self._recipe = recipe
        inside = [word for word in task.vocabulary() if word.isdigit() or word in _CHAIN_WORDS]
        weights = np.ones(len(tokenizer))
        weights[tokenizer.convert_tokens_to_ids(inside)] = recipe.chain_weight
        self._next_token_weights = weights.tolist()
        self._prompts = {
            name: Prompts(tokenizer, template="tiny", instruction=name or "v1")
            for name in world.mix
        }

    def document(self, index: int) -> tuple[list[int], list[int]]:
        """Prompt ids and response ids (EOS included) of document number `index`."""
        rng = np.random.default_rng([self._seed, _DOCUMENT_STREAM, index])
        problem = task.make_problem(self._seed, index, split="pretrain")
        mix = self._world.mix
        name = list(mix)[rng.choice(len(mix), p=list(mix.values()))]
        prompts = self._prompts[name]
        prompt = prompts.teacher(problem.text) if name else prompts.student(problem.text)
        while True:
            style = draw_style(rng, name, problem.level, self._world)
            response = self._tokenizer.encode(task.write_response(problem, style, rng))
            if len(response) < self._world.max_response_tokens:
                return prompt, [*response, self._tokenizer.eos_token_id]

    def step(self, step: int) -> Iterator[Rows]:
        """The micro-batches of one step; the weights of the documents sum to 1."""
        recipe = self._recipe
        first = step * recipe.documents
        documents = [self.document(first + i) for i in range(recipe.documents)]
        # Rows of similar length together: less padding.
        documents.sort(key=lambda document: len(document[0]) + len(document[1]))
        weights = [self._weights(response) for _, response in documents]
        scale = 1.0 / sum(map(sum, weights))
        for start in range(0, len(documents), recipe.micro_batch):
            part = documents[start : start + recipe.micro_batch]
            yield self._pad(
                [
                    (prompt + response, [0.0] * len(prompt) + self._weights(response, scale))
                    for prompt, response in part
                ]
            )
        if step < recipe.fact_steps:
            rng = np.random.default_rng([self._seed, _DRILL_STREAM, step])
            facts = [task.fact_drill(rng, recipe.facts_in_row) for _ in range(recipe.fact_rows)]
            yield from self._drills(facts, learned_after="=", once=True)
        if step < recipe.chain_steps:
            first = step * recipe.chain_rows
            chains = [
                task.chain_drill(task.make_problem(self._seed, first + i, split="drill"))
                for i in range(recipe.chain_rows)
            ]
            yield from self._drills(chains, learned_after=":", once=False)

    def _drills(self, texts: list[str], learned_after: str, once: bool) -> Iterator[Rows]:
        """Rows in which the word after each mark is learned, or all that follows the first one."""
        mark = self._tokenizer.convert_tokens_to_ids(learned_after)
        rows, masks = [], []
        for text in texts:
            row = np.array(self._tokenizer.encode(text))
            is_after = np.append(False, row[:-1] == mark)
            rows.append(row)
            masks.append(is_after if once else np.logical_or.accumulate(is_after))
        weight = self._recipe.drill_weight / sum(mask.sum() for mask in masks)
        pairs = [
            (row.tolist(), (weight * mask).tolist()) for row, mask in zip(rows, masks, strict=True)
        ]
        for start in range(0, len(pairs), self._recipe.micro_batch):
            yield self._pad(pairs[start : start + self._recipe.micro_batch])

    def _weights(self, response: list[int], scale: float = 1.0) -> list[float]:
        """Weight of each response token, by the token before it: `chain_weight` inside a chain.

        A weight that depended on the token itself would bias the choice between filler and step.
        """
        weight = self._next_token_weights
        return [scale, *(scale * weight[previous] for previous in response[:-1])]

    def _pad(self, rows: list[tuple[list[int], list[float]]]) -> Rows:
        longest = max(len(tokens) for tokens, _ in rows)
        width = -(-longest // self._recipe.row_step) * self._recipe.row_step
        shape = (self._recipe.micro_batch, width)
        tokens = np.full(shape, self._tokenizer.pad_token_id, np.int32)
        weights = np.zeros(shape, np.float32)
        for i, (ids, row_weights) in enumerate(rows):
            tokens[i, : len(ids)] = ids
            weights[i, : len(ids)] = row_weights
        return Rows(tokens, weights)


def rows_loss(params: Params, config: Qwen3Config, rows: Rows) -> jax.Array:
    """Weighted sum of the next-token cross-entropies, in nats."""
    tokens = jnp.asarray(rows.tokens_BxT)
    hidden = qwen3.forward(params, config, tokens[:, :-1])
    logits = qwen3.logits(hidden, qwen3.unembedding(params), config.vocab_size)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(losses * rows.weights_BxT[:, 1:])


def _muon_axes(params: Params) -> Any:
    """Which axes of each stacked weight are inputs and outputs; None leaves it to AdamW."""
    axes = {
        "query": MuonDimensionNumbers((1,), (2, 3)),
        "key": MuonDimensionNumbers((1,), (2, 3)),
        "value": MuonDimensionNumbers((1,), (2, 3)),
        "out": MuonDimensionNumbers((1, 2), (3,)),
        "gate": MuonDimensionNumbers((1,), (2,)),
        "up": MuonDimensionNumbers((1,), (2,)),
        "down": MuonDimensionNumbers((1,), (2,)),
    }
    return jax.tree.map_with_path(lambda path, _: axes.get(path[-1].key), params)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon for the matrices, AdamW for the rest, on schedules of one shape."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, recipe.warmup_steps, recipe.steps, 0.02)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            lambda count: recipe.muon_lr * shape(count),
            weight_decay=recipe.weight_decay,
            consistent_rms=0.2,
            adam_b2=0.98,
            adam_learning_rate=lambda count: recipe.adam_lr * shape(count),
            muon_weight_dimension_numbers=_muon_axes,
        ),
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="total")
def _accumulate(
    total: tuple[jax.Array, Params], params: Params, config: Qwen3Config, rows: Rows
) -> tuple[jax.Array, Params]:
    """Adds the loss and gradient of one micro-batch to `total`."""
    return jax.tree.map(jnp.add, total, jax.value_and_grad(rows_loss)(params, config, rows))


def pretrain(
    tokenizer: Any,
    *,
    seed: int,
    recipe: Recipe,
    world: World = WORLDS["default"],
    report: Callable[[int, jax.Array], None] = lambda step, loss: None,
) -> tuple[Params, Qwen3Config]:
    """Trains the base model from scratch; deterministic in (seed, recipe, world) on one machine.

    Args:
      report: called after each step with (steps done, loss of the step in nats, a device array).
    """
    config = base_config(len(tokenizer))
    params = qwen3.init_params(config, jax.random.key(seed))
    optimizer = make_optimizer(recipe)
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, state: Any, gradient: Params) -> tuple[Params, Any]:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    corpus = Corpus(tokenizer, seed, recipe, world)
    zero = jax.jit(lambda params: (jnp.float32(0), jax.tree.map(jnp.zeros_like, params)))
    for step in range(recipe.steps):
        total = zero(params)
        for rows in corpus.step(step):
            total = _accumulate(total, params, config, rows)
        loss, gradient = total
        params, state = update(params, state, gradient)
        report(step + 1, loss)
    return params, config


def save(folder: pathlib.Path, params: Params, config: Qwen3Config, tokenizer: Any) -> None:
    """Writes weights, configuration and tokenizer as an ordinary Hugging Face folder."""
    hf.save_folder(
        folder,
        params,
        config,
        eos_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(folder)
