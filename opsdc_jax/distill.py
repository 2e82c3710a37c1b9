"""The train step: reverse KL to the teacher on the student's own rollouts, and the teacher.

One optimizer step is `accumulate` for each micro-batch, then `apply` once. The loss is the sum of
the divergence over all response tokens of the global batch divided by their number (OPSDC, arXiv
2603.05433), so neither the packing into micro-batches nor padding rows change the gradient. Other
means are other weights and shares of a batch's rows (`rollout.loss_weights`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from opsdc_jax import divergences, losses, objective, sharding
from opsdc_jax.losses import TokenSums
from opsdc_jax.models import qwen3
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.qwen3 import Params
from opsdc_jax.rollout import DistillBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training carries from step to step (random keys are functions of seed and step).

    Attributes:
      student: float32 master parameters, which also sample.
      teacher: a second tree of the same structure and shardings, never an alias of the student.
      optimizer: state of the optax transformation.
      step: int32, updates done so far.
      base: a third such tree, the model that the run began with, where the loss is anchored to it.
    """

    student: Params
    teacher: Params
    optimizer: optax.OptState
    step: jax.Array
    base: Params | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Accumulator:
    """Sums over the micro-batches of one step.

    Attributes:
      gradients: of the loss, not yet divided.
      sums: of the tokens' statistics.
      anchor: of the KL from student to base, in nats, each token's times its weight.
      tokens: int32, response tokens.
      shares: float32, what loss and gradients are divided by.
    """

    gradients: Params
    sums: TokenSums
    anchor: jax.Array
    tokens: jax.Array
    shares: jax.Array


class TrainStep(NamedTuple):
    """The jitted pieces of a step, built once per run.

    Attributes:
      like: the TrainState with shapes, dtypes and shardings in place of arrays.
      init: student parameters -> TrainState at step 0, its teacher a copy of the student; donates
        the parameters.
      zeros: student parameters -> empty Accumulator.
      accumulate: (student, teacher, accumulator, DistillBatch, base) -> accumulator; donates the
        old one. The base is the state's, and may be left out where that has none.
      single: (student, teacher, DistillBatch, base) -> accumulator, of a step that is one
        micro-batch: no accumulator lies beside its gradients.
      apply: (state, accumulator) -> (state, metrics); donates the state. Where loss or gradient
        is not finite, the step is skipped: only its number changes, and `skipped` is 1. Where no
        row takes part, loss and gradient are 0, and AdamW goes on as with any gradient of 0: its
        moments decay, and what is left of them and the weight decay still move the student.
      refresh: (student, teacher) -> teacher, the student's weights or a mean of both; writes into
        the teacher's own buffers.
    """

    like: TrainState
    init: Callable[[Params], TrainState]
    zeros: Callable[[Params], Accumulator]
    accumulate: Callable[..., Accumulator]
    single: Callable[..., Accumulator]
    apply: Callable[[TrainState, Accumulator], tuple[TrainState, dict[str, jax.Array]]]
    refresh: Callable[[Params, Params], Params]


def make_optimizer(config: Any) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then AdamW with linear warm-up to a constant rate.

    Its `update` asks for `norm`, that of the gradients.

    Args:
      config: the `optim` section of the run's configuration.
    """
    rate: optax.ScalarOrSchedule = config.lr
    if config.warmup_steps:
        rate = optax.linear_schedule(
            config.lr / config.warmup_steps, config.lr, config.warmup_steps - 1
        )
    return optax.chain(
        clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )


def clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """As optax's, but it is given the norm, and multiplies by one scalar where that one divides.

    A program computes a quotient once for all that read it, so that a scaled copy of every gradient
    would lie in memory. A product goes into each of them.
    """

    def clip(
        gradients: Params,
        state: optax.EmptyState,
        params: Params | None = None,
        *,
        norm: jax.Array,
        **_: Any,
    ) -> tuple[Params, optax.EmptyState]:
        factor = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree.map(lambda leaf: leaf * factor, gradients), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), clip)


def make_train_step(
    model: Qwen3Config,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    divergence: str,
    chunk_tokens: int,
    vocab_size: int,
    shardings: Params,
    teacher_dtype: str,
    top_k: int = 0,
    teacher_decay: float = 0.0,
    anchor: float = 0.0,
    on_policy: bool = True,
    offload_optimizer: bool = False,
) -> TrainStep:
    """Builds the jitted pieces.

    Args:
      divergence: a key of `divergences.DIVERGENCES`.
      chunk_tokens: response positions whose logits exist at a time, of all rows together.
      vocab_size: the tokenizer's entries.
      shardings: tree of the parameters' shardings; teacher and gradients follow it.
      teacher_dtype: dtype of the teacher's parameters.
      top_k: the student's likeliest tokens that the reverse KL keeps apart; 0 is all of them.
      teacher_decay: what the teacher keeps of itself at a refresh; 0 copies the student.
      anchor: times the reverse KL from the student to the base, added to the loss; 0: no base.
      on_policy: the student samples, so that its own log-probabilities can be told from the
        sampler's (`logprob_gap_*`).
      offload_optimizer: between updates, keep the moments in the host's pinned memory.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh

    def cast(params: Params) -> Params:
        # Explicit copies: where nothing is to be cast, astype would hand back the student itself.
        return jax.tree.map(lambda leaf: jnp.array(leaf, teacher_dtype, copy=True), params)

    def init(student: Params) -> TrainState:
        return TrainState(
            student=student,
            teacher=cast(student),
            optimizer=optimizer.init(student),
            step=jnp.int32(0),
            base=cast(student) if anchor else None,
        )

    def zeros(student: Params) -> Accumulator:
        gradients = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), student)
        return Accumulator(
            gradients=gradients,
            sums=losses.zero_sums(),
            anchor=jnp.float32(0),
            tokens=jnp.int32(0),
            shares=jnp.float32(0),
        )

    chosen = divergences.choose(divergence, top_k)
    loss = objective.make_loss(model, mesh, chosen, anchor, vocab_size, chunk_tokens)

    def single(
        student: Params, teacher: Params, batch: DistillBatch, base: Params | None = None
    ) -> Accumulator:
        embedded = qwen3.embed(student, batch.student_BxT)
        slopes = jax.grad(loss, argnums=(0, 1), has_aux=True)
        both, (sums, to_base) = slopes(student, embedded, teacher, batch, base)
        gradients, embedded_gradient = both
        # Added onto the gradient of the tied head: differentiated with the rest, the look-up would
        # have an array of the embedding's size to itself first.
        embedding_gradient = gradients["embedding"].at[batch.student_BxT].add(embedded_gradient)
        return Accumulator(
            gradients=gradients | {"embedding": embedding_gradient},
            sums=sums,
            anchor=to_base,
            tokens=jnp.sum(batch.lengths_B),
            shares=jnp.sum(batch.shares_B),
        )

    def accumulate(
        student: Params,
        teacher: Params,
        accumulator: Accumulator,
        batch: DistillBatch,
        base: Params | None = None,
    ) -> Accumulator:
        new = single(student, teacher, batch, base)
        return Accumulator(
            gradients=jax.tree.map(jnp.add, accumulator.gradients, new.gradients),
            sums=losses.merge_sums(accumulator.sums, new.sums),
            anchor=accumulator.anchor + new.anchor,
            tokens=accumulator.tokens + new.tokens,
            shares=accumulator.shares + new.shares,
        )

    def apply(
        state: TrainState, accumulator: Accumulator
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        tokens = jnp.maximum(accumulator.tokens, 1).astype(jnp.float32)
        shares = jnp.where(accumulator.shares > 0, accumulator.shares, 1.0)
        moments = state.optimizer
        if offload_optimizer:
            moments = jax.device_put(moments, on_device)
        sums = accumulator.sums
        # The norm of the sums, divided: of quotients, XLA on a CPU writes the divisor into an array
        # of each one's size.
        loss, norm = sums.divergence / shares, optax.tree.norm(accumulator.gradients) / shares
        if anchor:
            anchor_kl = accumulator.anchor / shares
            loss += anchor * anchor_kl
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def update(student: Params, moments: optax.OptState) -> tuple[Params, optax.OptState]:
            gradients = jax.tree.map(lambda leaf: leaf * (1 / shares), accumulator.gradients)
            updates, moments = optimizer.update(gradients, moments, student, norm=norm)
            return optax.apply_updates(student, updates), moments

        # A branch, not a choice of each array: for that, old moments lie beside new (docs/LOG.md).
        student, moments = jax.lax.cond(finite, update, lambda *kept: kept, state.student, moments)
        metrics = {
            "loss": loss,
            "student_entropy": sums.student_entropy / tokens,
            "teacher_entropy": sums.teacher_entropy / tokens,
            "grad_norm": norm,
            "skipped": ~finite,
        }
        if on_policy:
            metrics |= {"logprob_gap_mean": sums.gap / tokens, "logprob_gap_max": sums.gap_max}
        if anchor:
            metrics["anchor_kl"] = anchor_kl
        state = dataclasses.replace(state, student=student, optimizer=moments, step=state.step + 1)
        return state, metrics

    def refresh(student: Params, teacher: Params) -> Params:
        if not teacher_decay:
            return cast(student)
        return jax.tree.map(
            lambda old, new: teacher_decay * old + (1 - teacher_decay) * new, teacher, student
        )

    # Every output's sharding is stated: left to the compiler, fresh moments and gradients (zeros,
    # which depend on nothing) would be whole on every device.
    abstract = jax.eval_shape(init, qwen3.abstract_params(model))
    whole: Any = sharding.whole(mesh)
    on_device = optax.tree_map_params(
        optimizer,
        lambda _, place: place,
        abstract.optimizer,
        shardings,
        transform_non_params=lambda _: whole,
    )
    on_host = jax.tree.map(
        # The count of updates stays on the device: a scalar is not worth a transfer.
        lambda place: place if place is whole else place.with_memory_kind("pinned_host"),
        on_device,
    )
    placed = TrainState(
        student=shardings,
        teacher=shardings,
        optimizer=on_host if offload_optimizer else on_device,
        step=whole,
        base=shardings if anchor else None,
    )
    sums = jax.tree.map(lambda _: whole, jax.eval_shape(losses.zero_sums))
    placed_accumulator = Accumulator(
        gradients=shardings, sums=sums, anchor=whole, tokens=whole, shares=whole
    )
    return TrainStep(
        like=jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract,
            placed,
        ),
        init=jax.jit(init, donate_argnums=0, out_shardings=placed),
        zeros=jax.jit(zeros, out_shardings=placed_accumulator),
        accumulate=jax.jit(accumulate, donate_argnums=2, out_shardings=placed_accumulator),
        single=jax.jit(single, out_shardings=placed_accumulator),
        apply=jax.jit(apply, donate_argnums=0, out_shardings=(placed, whole)),
        # keep_unused: a teacher dropped as unused would be donated to nobody, and not aliased.
        refresh=jax.jit(
            refresh,
            donate_argnums=1,
            keep_unused=True,
            out_shardings=shardings,
        ),
    )


def refresh_due(step: int, every: int) -> bool:
    """Whether the teacher is refreshed from the student after update `step` (counted from 1).

    `every` is M of the paper; 0 freezes the teacher at the base model.
    """
    return every > 0 and step % every == 0
