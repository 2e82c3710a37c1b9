"""Causal self-attention with grouped heads: one function, four ways to compute it.

Only `dense` ever holds a [T, T] array. Queries come scaled by 1 / sqrt(K) (`layers.Attention` does
it in float32, before the cast); softmax is in float32; matrix products take the inputs' dtype and
add up in float32.

Shapes: B batch, T query positions, S key positions, H query heads, N key/value heads, G = H / N
queries per key/value head, K head width, C block.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from opsdc_jax import sharding

MASKED = -1e30  # finite, so that a row with no visible key gives no NaN
RESIDUALS = "attention"  # name of outputs and log-sum-exps that backward passes need
BLOCK = 256  # positions of a block; scores of [C, C] exist at a time
BLOCKWISE_FROM = 512  # positions from which `blockwise` is the faster one on a CPU


def attention(
    query_BxHxTxK: jax.Array,
    keys_BxNxTxK: jax.Array,
    values_BxNxTxK: jax.Array,
    *,
    implementation: str = "auto",
    valid_BxT: jax.Array | None = None,
    lengths_B: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Each position attends to itself and those before it, [B, H, T, K].

    What comes out at padding is finite and of no meaning.

    Args:
      implementation: "dense", "blockwise", "splash", "cudnn", or "auto" (`choose`).
      valid_BxT: False marks padding that no token may see; needed where it is on the left.
      lengths_B: tokens of rows padded on the right. Under the causal mask no token sees that
        padding: the lengths only save work, and only "cudnn" uses them.
      mesh: where the arrays are, rows split over the batch axes and heads over `tensor`; None is
        one device.
    """
    device = mesh.devices.flat[0] if mesh is not None else jax.devices()[0]
    chosen = choose(
        implementation, device, query_BxHxTxK.shape, query_BxHxTxK.dtype, valid_BxT is not None
    )
    arrays = query_BxHxTxK, keys_BxNxTxK, values_BxNxTxK
    if chosen == "splash":
        return splash(*arrays, valid_BxT, mesh, interpret=device.platform != "tpu")
    if chosen == "cudnn":
        return cudnn(*arrays, lengths_B)
    if chosen == "blockwise":
        return blockwise(*arrays, valid_BxT, BLOCK)
    T = query_BxHxTxK.shape[2]
    visible_BxTxT = jnp.tril(jnp.ones((T, T), bool))[None]
    if valid_BxT is not None:
        visible_BxTxT = visible_BxTxT & valid_BxT[:, None, :]
    return dense(*arrays, visible_BxTxT)


def choose(
    implementation: str,
    device: jax.Device,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    has_mask: bool,
) -> str:
    """The one rule: which implementation computes queries of this shape on this kind of device.

    "auto" is "splash" on a TPU and "cudnn" on an NVIDIA GPU. cuDNN takes 16-bit floats, heads of at
    most 128, and padding on the right only; where it cannot be used, asked for or not, and on
    all other devices, it is "blockwise" from `BLOCKWISE_FROM` positions on and "dense" below.
    """
    T, K = shape[2:]
    nvidia = "nvidia" in device.device_kind.lower()
    fits_cudnn = nvidia and jnp.dtype(dtype).itemsize == 2 and K % 8 == 0 and K <= 128
    fits_cudnn = fits_cudnn and not has_mask
    if implementation == "auto" and device.platform == "tpu":
        return "splash"
    if implementation == "auto" and fits_cudnn:
        return "cudnn"
    if implementation == "auto" or (implementation == "cudnn" and not fits_cudnn):
        return "blockwise" if T >= BLOCKWISE_FROM else "dense"
    return implementation


def dense(
    query_BxHxTxK: jax.Array,
    keys_BxNxSxK: jax.Array,
    values_BxNxSxK: jax.Array,
    visible_BxTxS: jax.Array,
) -> jax.Array:
    """The reference: all scores at once, under any mask.

    The queries that share a key/value head are folded into the time axis. One batched matrix
    product per key/value head is much faster on a CPU than a product with a group axis. The
    backward pass forms the scores again (arXiv 2307.08691), which takes less time than to write
    and read them.
    """
    B, H, T, K = query_BxHxTxK.shape
    N = keys_BxNxSxK.shape[1]
    query = query_BxHxTxK.reshape(B, N, H // N * T, K)
    visible = jnp.tile(visible_BxTxS, (1, H // N, 1))[:, None]
    return _dense(query, keys_BxNxSxK, values_BxNxSxK, visible).reshape(B, H, T, K)


@jax.custom_vjp
def _dense(query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array) -> jax.Array:
    """Queries [B, N, G * T, K]; keys, values [B, N, S, K]; visible [B or 1, 1, G * T, S]."""
    return _dense_forward(query, keys, values, visible)[0]


def _dense_forward(
    query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scores = jnp.where(visible, _dot("bnqk,bnsk->bnqs", query, keys), MASKED)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _dot("bnqs,bnsk->bnqk", weights.astype(values.dtype), values) / total
    out = checkpoint_name(out.astype(query.dtype), RESIDUALS)
    logsumexp = checkpoint_name((highest + jnp.log(total))[..., 0], RESIDUALS)
    return out, (query, keys, values, visible, out, logsumexp)


def _dense_backward(residuals: tuple[jax.Array, ...], out_bar: jax.Array) -> tuple:
    query, keys, values, visible, out, logsumexp = residuals
    bars = _gradients(query, keys, values, visible, logsumexp, out_bar, _inner(out, out_bar))
    return *(bar.astype(query.dtype) for bar in bars), None


_dense.defvjp(_dense_forward, _dense_backward)


def blockwise(
    query_BxHxTxK: jax.Array,
    keys_BxNxTxK: jax.Array,
    values_BxNxTxK: jax.Array,
    valid_BxT: jax.Array | None,
    block: int,
) -> jax.Array:
    """Plain JAX: a scan over the pairs of blocks on and below the diagonal.

    Softmax is accumulated block by block (arXiv 2205.14135), and the backward pass forms each
    block's scores again (arXiv 2307.08691). Keys are not repeated for the queries of a group:
    those are folded into the time axis of their block, as in `dense`.
    """
    B, H, T, K = query_BxHxTxK.shape
    N = keys_BxNxTxK.shape[1]
    count = math.ceil(T / block)
    C = math.ceil(T / count)  # equal blocks: the least padding

    def blocks(array: jax.Array, axis: int) -> jax.Array:
        """Splits an axis of T into blocks, which become the leading axis."""
        padded = _padded(array, count * C, axis)
        shape = (*padded.shape[:axis], count, C, *padded.shape[axis + 1 :])
        return jnp.moveaxis(padded.reshape(shape), axis, 0)

    query = blocks(query_BxHxTxK.reshape(B, N, H // N, T, K), 3)
    valid = jnp.ones((B, T), bool) if valid_BxT is None else valid_BxT
    out = _blockwise(
        query.reshape(count, B, N, H // N * C, K),
        blocks(keys_BxNxTxK, 2),
        blocks(values_BxNxTxK, 2),
        blocks(valid, 1),
    )
    out = jnp.moveaxis(out.reshape(query.shape), 0, 3)
    return out.reshape(B, H, count * C, K)[:, :, :T]


@jax.custom_vjp
def _blockwise(query: jax.Array, keys: jax.Array, values: jax.Array, valid: jax.Array) -> jax.Array:
    """Blocks lead: queries [n, B, N, G * C, K]; keys, values [n, B, N, C, K]; valid [n, B, C]."""
    return _blockwise_forward(query, keys, values, valid)[0]


def _blockwise_forward(
    query: jax.Array, keys: jax.Array, values: jax.Array, valid: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def add(carry: tuple, pair: jax.Array) -> tuple[tuple, None]:
        """Adds key block j to query block i: highest score, sum of weights, weighted values."""
        i, j = pair
        highest, total, weighted = (x[i] for x in carry)
        visible = _visible(valid[j], i, j, query.shape[3])
        scores = jnp.where(visible, _dot("bnqk,bnsk->bnqs", query[i], keys[j]), MASKED)
        new_highest = jnp.maximum(highest, scores.max(axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - new_highest[..., None]), 0.0)
        decay = jnp.exp(highest - new_highest)
        update = _dot("bnqs,bnsk->bnqk", weights.astype(values.dtype), values[j])
        parts = (
            new_highest,
            total * decay + weights.sum(axis=-1),
            weighted * decay[..., None] + update,
        )
        return tuple(_put(x, part, i) for x, part in zip(carry, parts, strict=True)), None

    carry = (
        jnp.full(query.shape[:-1], MASKED, jnp.float32),
        jnp.zeros(query.shape[:-1], jnp.float32),
        jnp.zeros(query.shape, jnp.float32),
    )
    (highest, total, weighted), _ = jax.lax.scan(add, carry, _pairs(query))
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)  # a query that sees nothing gets zeros
    out = checkpoint_name((weighted / total[..., None]).astype(query.dtype), RESIDUALS)
    logsumexp = checkpoint_name(highest + jnp.log(total), RESIDUALS)
    return out, (query, keys, values, valid, out, logsumexp)


def _blockwise_backward(residuals: tuple[jax.Array, ...], out_bar: jax.Array) -> tuple:
    query, keys, values, valid, out, logsumexp = residuals
    inner = _inner(out, out_bar)

    def add(carry: tuple, pair: jax.Array) -> tuple[tuple, None]:
        """Adds what query block i and key block j give to each other's gradients."""
        i, j = pair
        query_bar, keys_bar, values_bar = carry
        visible = _visible(valid[j], i, j, query.shape[3])
        query_part, keys_part, values_part = _gradients(
            query[i], keys[j], values[j], visible, logsumexp[i], out_bar[i], inner[i]
        )
        return (
            _put(query_bar, query_bar[i] + query_part, i),
            _put(keys_bar, keys_bar[j] + keys_part, j),
            _put(values_bar, values_bar[j] + values_part, j),
        ), None

    carry = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, keys, values))
    carry, _ = jax.lax.scan(add, carry, _pairs(query))
    return *(x.astype(query.dtype) for x in carry), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _inner(out: jax.Array, out_bar: jax.Array) -> jax.Array:
    """Inner products of outputs and their gradients, [..., queries]."""
    return jnp.sum(out.astype(jnp.float32) * out_bar.astype(jnp.float32), axis=-1)


def _gradients(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    visible: jax.Array,
    logsumexp: jax.Array,
    out_bar: jax.Array,
    inner: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What some queries and some keys give to each other's gradients; scores are formed again.

    Args:
      query, out_bar: [B, N, Q, K]; keys, values: [B, N, S, K]; visible: broadcasts to [B, N, Q, S].
      logsumexp, inner: of the queries over all keys, [B, N, Q].

    Returns:
      Gradients of query, keys and values, float32.
    """
    scores = _dot("bnqk,bnsk->bnqs", query, keys) - logsumexp[..., None]
    weights = jnp.exp(jnp.where(visible, scores, MASKED))
    weights_bar = _dot("bnqk,bnsk->bnqs", out_bar, values)
    scores_bar = (weights * (weights_bar - inner[..., None])).astype(query.dtype)
    return (
        _dot("bnqs,bnsk->bnqk", scores_bar, keys),
        _dot("bnqs,bnqk->bnsk", scores_bar, query),
        _dot("bnqs,bnqk->bnsk", weights.astype(values.dtype), out_bar),
    )


def _pairs(query: jax.Array) -> jax.Array:
    """[pairs, 2]: each query block i with every key block j <= i.

    Made to depend on the queries: were they constants, differentiation would take what follows from
    them alone, the masks of all pairs, out of the scan over the layers, and keep it.
    """
    pairs = jnp.asarray(np.stack(np.tril_indices(len(query)), axis=1), jnp.int32)
    return jax.lax.optimization_barrier((pairs, query))[0]


def _visible(valid_BxC: jax.Array, i: jax.Array, j: jax.Array, rows: int) -> jax.Array:
    """[B, 1, G * C, C]: which keys of block j the folded queries of block i see."""
    C = valid_BxC.shape[1]
    causal = i * C + jnp.arange(rows)[:, None] % C >= j * C + jnp.arange(C)
    return causal & valid_BxC[:, None, None, :]


def _dot(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _put(array: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    """array[index] = part, in place within a scan."""
    return jax.lax.dynamic_update_index_in_dim(array, part, index, 0)


def _padded(array: jax.Array, size: int, axis: int) -> jax.Array:
    """Zeros behind, up to a size."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths)


def splash(
    query_BxHxTxK: jax.Array,
    keys_BxNxTxK: jax.Array,
    values_BxNxTxK: jax.Array,
    valid_BxT: jax.Array | None = None,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The TPU kernel of `jax.experimental.pallas`; each device takes its own rows and heads.

    Args:
      valid_BxT: padding becomes a segment of its own, which attends to itself.
      interpret: emulates the kernel, for tests.
    """
    # Here, because it is experimental: where the kernel is not used, it need not be there.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    T = query_BxHxTxK.shape[2]
    # Long rows are padded to the largest block: narrower blocks cost more than the padding.
    unit = 512 if T >= 2048 else 128
    padded = math.ceil(T / unit) * unit
    arrays = [_padded(x, padded, 2) for x in (query_BxHxTxK, keys_BxNxTxK, values_BxNxTxK)]
    block = max(size for size in (128, 256, 384, 512) if padded % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def local(query: jax.Array, keys: jax.Array, values: jax.Array, *valid: jax.Array) -> jax.Array:
        mask = splash_attention_mask.CausalMask((padded, padded))
        kernel = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * query.shape[1]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=RESIDUALS,
            interpret=interpret,
        )
        segments = [splash_attention_kernel.SegmentIds(x, x) for x in valid]
        return jax.vmap(kernel)(query, keys, values, *segments)

    if valid_BxT is not None:
        arrays.append(_padded(valid_BxT.astype(jnp.int32), padded, 1))
    if mesh is None or mesh.size == 1:
        return local(*arrays)[:, :, :T]
    rows = sharding.batch_sharding(mesh).spec[0]
    rules = sharding.rules_of(mesh)
    queries, keys = (
        PartitionSpec(rows, rules["heads"]),
        PartitionSpec(rows, rules["kv_heads"]),
    )
    specs = (queries, keys, keys, PartitionSpec(rows))[: len(arrays)]
    # Outputs of a kernel do not say over which axes they vary, so that is not checked.
    split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)
    return split(*arrays)[:, :, :T]


def cudnn(
    query_BxHxTxK: jax.Array,
    keys_BxNxTxK: jax.Array,
    values_BxNxTxK: jax.Array,
    lengths_B: jax.Array | None = None,
) -> jax.Array:
    """cuDNN's flash attention, for 16-bit floats on an NVIDIA GPU; rows padded on the right."""
    if lengths_B is not None:
        lengths_B = jnp.maximum(lengths_B, 1).astype(jnp.int32)  # a row of padding alone
    query, keys, values = (
        jnp.swapaxes(x, 1, 2) for x in (query_BxHxTxK, keys_BxNxTxK, values_BxNxTxK)
    )
    out = jax.nn.dot_product_attention(
        query,
        keys,
        values,
        scale=1.0,
        is_causal=True,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        implementation="cudnn",
    )
    return jnp.swapaxes(out, 1, 2)
