# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The kernel of `mosaic_tpu`: row copies and arithmetic in the same bundles.

The grid walks chunks of each query's selection. While a chunk is attended to,
the rows of later ones are copied into other buffers. The scalar unit issues one
copy in about four bundles, more than the matrix units need for the row. So the
copies are unrolled, between buffers that are static, in one basic block with
the arithmetic: then the compiler packs both into the same bundles. With one
buffer and a run-time slot it can't tell the copies from the loads and runs the
two in turn: 1.5 times the cycles (v6e, 64 heads). Bounds checks on the copies
would about double them. All figures here are the compiler's static estimates.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32, UInt32

from pallas_kernels import numerics
from pallas_kernels.sparse_attention import mosaic_tpu_gather as gather
from pallas_kernels.sparse_attention import mosaic_tpu_lanes as lanes

_LANES = lanes.LANES
_LOWEST = jnp.finfo(jnp.float32).min


def call(
  problem: gather.Problem,
  query: Float[Array, "Q N C"],
  rows: Int32[Array, "P K"],
  selected: Int32[Array, "P K"],
  words: UInt32[Array, "R 128"],
) -> tuple[
  Float[Array, "P N {problem.value_dim}"],
  Float32[Array, "P 1 128"],
  Float32[Array, "P 1 K"] | None,
]:
  """Runs the kernel on padded arrays.

  Args:
    problem: their sizes and the tiles.
    query: all batches' queries.
    rows: the first row of `words` of each selected token, any for none; P is
      Q times the parts of a query, which are neighbours.
    selected: below 0 for none.
    words: all batches' packed caches.

  Returns:
    Of each part: output, in float32 if there are several; log-sum-exp by head
    (lane); probabilities averaged over heads, if asked for.
  """
  tiles, num_chunks = problem.tiles, problem.num_chunks
  num_parts, heads, width = rows.shape[0], *query.shape[1:]
  per_core = num_parts // tiles.cores
  out_dtype = query.dtype if tiles.parts == 1 else jnp.float32

  def of_part(core, i, c):
    return core * per_core + i, 0, 0

  def of_query(core, i, c):
    return (core * per_core + i) // tiles.parts, 0, 0

  buffer = pltpu.VMEM((tiles.chunk * problem.row_tiles, _LANES), jnp.uint32)
  index_buffer = pltpu.SMEM((tiles.chunk,), jnp.int32)
  # The last result and the logits that it takes; None: there is neither.
  probs_spec = probs_shape = logits = None
  if problem.with_mean_probs:
    columns = num_chunks * tiles.chunk
    probs_spec = pl.BlockSpec((1, 1, columns), of_part)
    probs_shape = jax.ShapeDtypeStruct((num_parts, 1, columns), jnp.float32)
    logits = pltpu.VMEM((num_chunks, heads, tiles.chunk), jnp.float32)
  return pl.pallas_call(
    functools.partial(_kernel, problem),
    grid=(tiles.cores, per_core, num_chunks),
    in_specs=[
      pl.BlockSpec((1, heads, width), of_query),
      pl.BlockSpec(
        (1, 1, tiles.chunk),
        lambda core, i, c: (core * per_core + i, 0, c),
      ),
      pl.BlockSpec(memory_space=pltpu.HBM),
      pl.BlockSpec(memory_space=pltpu.HBM),
    ],
    out_specs=[
      pl.BlockSpec((1, heads, problem.value_dim), of_part),
      pl.BlockSpec((1, 1, _LANES), of_part),
      probs_spec,
    ],
    out_shape=[
      jax.ShapeDtypeStruct((num_parts, heads, problem.value_dim), out_dtype),
      jax.ShapeDtypeStruct((num_parts, 1, _LANES), jnp.float32),
      probs_shape,
    ],
    scratch_shapes=[
      [buffer] * tiles.buffers,
      [index_buffer] * tiles.buffers,
      pltpu.SemaphoreType.DMA((tiles.buffers,)),
      pltpu.SemaphoreType.DMA((tiles.buffers,)),
      pltpu.VMEM((heads, _LANES), jnp.float32),
      pltpu.VMEM((heads, _LANES), jnp.float32),
      pltpu.VMEM((heads, problem.value_dim), jnp.float32),
      logits,
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      # Saves a third of the scalar work; the caller clips the row numbers.
      disable_bounds_checks=True,
    ),
    name="sparse_mla",
  )(
    query,
    selected[:, None],
    # Where XLA keeps a small array in VMEM there is no copy to SMEM.
    pltpu.with_memory_space_constraint(rows.reshape(-1), pltpu.HBM),
    words,
  )


def _kernel(
  problem,
  query_ref,
  selected_ref,
  rows_ref,
  words_ref,
  out_ref,
  log_sum_exp_ref,
  mean_probs_ref,
  buffers,
  index_buffers,
  row_semaphores,
  index_semaphores,
  max_ref,
  sum_ref,
  acc_ref,
  logits_ref,
):
  """One chunk of one part; the next chunk's rows on their way meanwhile."""
  chunk_id = pl.program_id(2)
  step = pl.program_id(1) * problem.num_chunks + chunk_id
  loads = gather.Loads(
    problem,
    rows_ref,
    words_ref,
    buffers,
    index_buffers,
    row_semaphores,
    index_semaphores,
  )
  online = (max_ref, sum_ref, acc_ref)

  @pl.when(step == 0)
  def _():
    loads.start_first()

  @pl.when(chunk_id == 0)
  def _():
    max_ref[...] = jnp.full_like(max_ref, _LOWEST)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  def attend(slot, is_tail):
    if not is_tail:
      # This step's numbers were used `ahead` steps ago.
      loads.start_indices(step, slot)
      loads.wait_indices(slot)
    loads.wait_rows(slot)
    if not is_tail:
      loads.start_rows(slot)
    rows = gather.unpack(problem, buffers[slot])
    logits = _score(problem, query_ref[0], rows, selected_ref[0])
    if logits_ref is not None:
      logits_ref[chunk_id] = logits
    _accumulate(problem, logits, rows, *online)

  # The slot is static in each branch; the last steps of a core load nothing.
  slots, steps = problem.tiles.buffers, problem.steps
  slot_of_step = gather.slot_of(step, problem.tiles)
  tail = max(steps - problem.tiles.ahead, 0)
  for slot in range(slots):

    @pl.when((step < tail) & (slot_of_step == slot))
    def _(slot=slot):
      attend(slot, is_tail=False)

    @pl.when((step >= tail) & (slot_of_step == slot))
    def _(slot=slot):
      attend(slot, is_tail=True)

  @pl.when(chunk_id == problem.num_chunks - 1)
  def _():
    _store(online, out_ref, log_sum_exp_ref)
    if mean_probs_ref is not None:
      _store_mean_probs(problem, online, logits_ref, mean_probs_ref)


def _score(problem, query, rows, selected):
  """Scaled logits `[heads, chunk]`, -inf where the index is -1."""
  logits = jax.lax.dot_general(
    query,
    rows[:, : query.shape[-1]],
    (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
    precision=numerics.precision(problem.dtype),
  )
  return jnp.where(selected >= 0, problem.scale * logits, -jnp.inf)


def _accumulate(problem, logits, rows, max_ref, sum_ref, acc_ref):
  """Adds a chunk to the online softmax; statistics fill all lanes."""
  old_max = max_ref[...]
  new_max = jnp.maximum(old_max, jnp.max(logits, axis=1, keepdims=True))
  decay = jnp.exp(old_max - new_max)
  weights = jnp.exp(logits - new_max[:, :1])
  max_ref[...] = new_max
  sum_ref[...] = decay * sum_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
  acc_ref[...] = decay[:, :1] * acc_ref[...] + jax.lax.dot_general(
    weights.astype(problem.dtype),
    rows[:, : problem.value_dim],
    (((1,), (0,)), ((), ())),
    preferred_element_type=jnp.float32,
    precision=numerics.precision(problem.dtype),
  )


def _store(online, out_ref, log_sum_exp_ref):
  """Writes a part's output and log-sum-exp."""
  max_ref, sum_ref, acc_ref = online
  total = sum_ref[...]
  out_ref[0] = (acc_ref[...] * _inverse(total)).astype(out_ref.dtype)
  log_sum_exp = jnp.where(total == 0, -jnp.inf, max_ref[...] + jnp.log(total))
  log_sum_exp_ref[0] = lanes.to_lanes(log_sum_exp)


def _store_mean_probs(problem, online, logits_ref, mean_probs_ref):
  """Writes the probabilities of a query's rows, averaged over its heads."""
  max_ref, sum_ref, _ = online
  top, inverse = max_ref[:, :1], _inverse(sum_ref[...])
  heads, chunk = problem.heads, problem.tiles.chunk

  # A loop, where unrolled all is faster by 3 %: the profiler of 7x's schedule
  # then overflows its queue of exponentials and gives no figure.
  @pl.loop(0, problem.num_chunks, unroll=2 - problem.num_chunks % 2)
  def _(c):
    probs = jnp.exp(logits_ref[c] - top) * inverse
    mean_probs_ref[0, :, pl.ds(c * chunk, chunk)] = (
      jnp.sum(probs, axis=0, keepdims=True) / heads
    )


def _inverse(total):
  """`[heads, 1]` of a sum in all lanes; no row selected: sum 0, output 0."""
  return jnp.where(total == 0, 0.0, 1 / total)[:, :1]
