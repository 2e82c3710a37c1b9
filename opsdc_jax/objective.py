"""The loss of a micro-batch: both forward passes, and the weighted sums that are differentiated.

Shapes: B rows, T positions of a row, R response positions, D model width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opsdc_jax import divergences, losses
from opsdc_jax.divergences import Divergence
from opsdc_jax.losses import TokenSums
from opsdc_jax.models import qwen3
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.qwen3 import Params
from opsdc_jax.rollout import DistillBatch


def make_loss(
    model: Qwen3Config,
    mesh: Mesh,
    divergence: Divergence,
    anchor: float,
    vocab_size: int,
    chunk_tokens: int,
) -> Callable[..., tuple[jax.Array, tuple[TokenSums, jax.Array]]]:
    """(student, its embedded rows [B, T, D], teacher, batch, base) -> what is differentiated.

    That is the weighted sum over a micro-batch, not divided yet; beside it, the sums and the
    anchor's.
    """

    def loss(
        student: Params,
        embedded_BxTxD: jax.Array,
        teacher: Params,
        batch: DistillBatch,
        base: Params | None,
    ) -> tuple[jax.Array, tuple[TokenSums, jax.Array]]:
        mask_BxR, lengths_B = response_mask(batch), batch.lengths_B
        R = mask_BxR.shape[1]
        student_BxRxD = response_hidden(
            student, model, mesh, embedded_BxTxD, batch.student_prompt_B, lengths_B, R
        )

        def sums_against(divergence: Divergence, other: Params, *side: jax.Array) -> TokenSums:
            tokens_BxT, prompt_B, weights_B = side
            embedded = qwen3.embed(other, tokens_BxT)
            other_BxRxD = response_hidden(other, model, mesh, embedded, prompt_B, lengths_B, R)
            return losses.divergence_sums(
                divergence,
                vocab_size,
                chunk_tokens,
                mesh,
                student_BxRxD,
                qwen3.unembedding(student),
                jax.lax.stop_gradient(other_BxRxD),
                jax.lax.stop_gradient(qwen3.unembedding(other)),
                batch.response_BxR,
                batch.logprobs_BxR,
                jnp.broadcast_to(weights_B[:, None], mask_BxR.shape),
                mask_BxR,
            )

        teacher_side = batch.teacher_BxT, batch.teacher_prompt_B, batch.weights_B
        sums = sums_against(divergence, teacher, *teacher_side)
        if base is None:
            return sums.divergence, (sums, jnp.float32(0))
        # The rows' weights in a mean, also where those of the loss are advantages.
        means_B = batch.shares_B / jnp.maximum(lengths_B, 1)
        base_side = batch.student_BxT, batch.student_prompt_B, means_B
        to_base = sums_against(divergences.reverse_kl, base, *base_side).divergence
        return sums.divergence + anchor * to_base, (sums, to_base)

    return loss


def response_hidden(
    params: Params,
    model: Qwen3Config,
    mesh: Mesh | None,
    embedded_BxTxD: jax.Array,
    prompt_B: jax.Array,
    lengths_B: jax.Array,
    width: int,
) -> jax.Array:
    """Hidden states that predict response tokens 0..width-1 of each row, [B, R, D].

    Args:
      embedded_BxTxD: `qwen3.embed` of the rows' tokens.
      prompt_B, lengths_B: tokens of each row's prompt, and of the response after it.
    """
    hidden_BxTxD = qwen3.forward_embedded(
        params, model, embedded_BxTxD, lengths_B=prompt_B + lengths_B, mesh=mesh
    )
    positions_BxR = prompt_B[:, None] - 1 + jnp.arange(width)
    # A padding row may have no prompt: its position -1 is masked later, it only has to exist.
    return jnp.take_along_axis(hidden_BxTxD, positions_BxR[:, :, None], axis=1, mode="clip")


def response_mask(batch: DistillBatch) -> jax.Array:
    """True at the response tokens, [B, R]."""
    return jnp.arange(batch.response_BxR.shape[1]) < batch.lengths_B[:, None]
