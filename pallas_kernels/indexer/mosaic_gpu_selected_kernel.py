# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of selected keys on Hopper, and their gradients.

A pair of warpgroups takes a query at a time, and its keys 64 at a time: one
copies rows of keys, the other multiplies them with all heads (wgmma's M is
keys, so that the sum over heads stays within four lanes). Two pairs share a
multiprocessor and hide each other's latencies; global memory bounds both
directions.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import copies, reductions, row_sums

# Keys of a step, and heads: of the wgmma instruction.
TILE = 64
# Of warpgroups, in a block of threads.
PAIRS = 2
_SLOTS = 4
_CONSUMER, _PRODUCER = range(2)
# Four warpgroups start at 128 registers a thread.
_REGISTERS = {_CONSUMER: 216, _PRODUCER: 40}
_LAYOUT = plgpu.Layout.WGMMA
_BY_KEY = _LAYOUT.reduce(1)
_BY_HEAD = _LAYOUT.reduce(0)


class Problem(NamedTuple):
  """Static facts of a call.

  Attributes:
    sizes: of the keys' gradient, a sum over queries; its `num_blocks` are
      pairs of warpgroups.
    heads: a multiple of 8 up to 64.
  """

  sizes: row_sums.Sizes
  heads: int

  @property
  def num_queries(self) -> int:
    """Of all sequences."""
    return self.sizes.sequences * self.sizes.items


class _Inputs(NamedTuple):
  """Global memory.

  Attributes:
    index_q: bfloat16 [queries, heads, dim].
    index_k: bfloat16 [keys, dim], of all sequences.
    index_weights: float32 [queries, TILE], zeros behind `heads`.
    indices: int32 [queries, num_selected], -1 for none.
  """

  index_q: jax.Ref
  index_k: jax.Ref
  index_weights: jax.Ref
  indices: jax.Ref


class _Gradients(NamedTuple):
  """Global memory.

  Attributes:
    scores: float32 [queries, num_selected], 0 at index -1.
    index_q: like `_Inputs.index_q`.
    index_weights: like `_Inputs.index_weights`.
    bits: as `row_sums.Chunk.bits`.
    addends: as `row_sums.Chunk.addends`, of the keys' gradient.
    places: as `row_sums.Chunk.places`.
  """

  scores: jax.Ref
  index_q: jax.Ref
  index_weights: jax.Ref
  bits: jax.Ref
  addends: jax.Ref
  places: jax.Ref


class _Scratch(NamedTuple):
  """Shared memory and barriers, of each pair.

  Attributes:
    q: the query's heads.
    k: slots of 64 keys.
    words: barriers of `copies`, one for each slot.
    q_full: `q` is there.
    q_free: nothing reads `q`.
    k_free: nothing reads a slot.
    dz: gradient of the products, [keys, heads]; None forward.
    sums: of `reductions.sum_rows`; None forward.
  """

  q: jax.Ref
  k: jax.Ref
  words: jax.Ref
  q_full: jax.Ref
  q_free: jax.Ref
  k_free: jax.Ref
  dz: jax.Ref | None = None
  sums: jax.Ref | None = None


def scores(
  problem: Problem,
  index_q: jax.Array,
  index_k: jax.Array,
  index_weights: jax.Array,
  indices: jax.Array,
) -> jax.Array:
  """Scores [queries, num_selected]; of index -1 those of a key of zeros.

  The arguments are as in `_Inputs`.
  """
  kernel = _kernel(
    problem,
    functools.partial(_scores_body, problem),
    "selected_indexer_scores",
    jax.ShapeDtypeStruct(indices.shape, jnp.float32),
    _scratch_types(problem),
  )
  return kernel(index_q, index_k, index_weights, indices)


def gradients(
  problem: Problem,
  bounds: jax.Array,
  index_q: jax.Array,
  index_k: jax.Array,
  index_weights: jax.Array,
  indices: jax.Array,
  grad_scores: jax.Array,
  grad_q: jax.Ref,
  grad_weights: jax.Ref,
  bits: jax.Ref,
) -> tuple[jax.Array, jax.Array]:
  """Writes a chunk's rows of `grad_q` and `grad_weights`.

  Returns:
    The chunk's addends to the keys' gradient, and their places. `bounds` is as
    `row_sums.Chunk.bounds`, the other arguments are as in `_Inputs` and
    `_Gradients`.
  """
  kernel = _kernel(
    problem,
    functools.partial(_gradients_body, problem),
    "selected_indexer_scores_backward",
    problem.sizes.out_type,
    [
      *_scratch_types(problem),
      _tiled((PAIRS, TILE, TILE)),
      plgpu.SMEM((PAIRS, reductions.SUM_SCRATCH), jnp.float32),
    ],
  )
  return kernel(
    bounds,
    index_q,
    index_k,
    index_weights,
    indices,
    grad_scores,
    grad_q,
    grad_weights,
    bits,
  )


def _kernel(problem, body, name, out_type, scratch_types):
  return plgpu.kernel(
    body,
    out_type=out_type,
    scratch_types=scratch_types,
    grid=(problem.sizes.num_blocks // PAIRS,),
    grid_names=("block",),
    num_threads=len(_REGISTERS) * PAIRS,
    thread_name="warpgroup",
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane,
      unsafe_no_auto_barriers=True,
      reduction_scratch_bytes=0,
    ),
  )


def _tiled(shape):
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=copies.TRANSFORMS)


def _scratch_types(problem):
  dim = problem.sizes.width
  return [
    _tiled((PAIRS, TILE, dim)),
    _tiled((PAIRS * _SLOTS, TILE, dim)),
    plgpu.SMEM((PAIRS * _SLOTS * copies.BARRIER_WORDS,), jnp.int32),
    plgpu.Barrier(num_barriers=PAIRS),
    plgpu.Barrier(num_barriers=PAIRS),
    plgpu.Barrier(num_barriers=PAIRS * _SLOTS),
  ]


def _scores_body(problem, *refs):
  inputs, out, scratch = _Inputs(*refs[:4]), refs[4], _Scratch(*refs[5:])
  consume = functools.partial(_score, problem, inputs, scratch, out)
  _run_roles(problem, inputs, scratch, consume, 0, problem.num_queries)


def _gradients_body(problem, bounds, *refs):
  inputs, grads = _Inputs(*refs[:4]), _Gradients(*refs[4:10])
  scratch = _Scratch(*refs[10:])
  consume = functools.partial(
    _differentiate, problem, inputs, grads, scratch, bounds[0]
  )
  _run_roles(problem, inputs, scratch, consume, bounds[0], bounds[1])


def _run_roles(problem, inputs, scratch, consume, first, last):
  """Runs both roles of each pair on its share of queries `first` to `last`."""
  slots = PAIRS * _SLOTS
  copies.initialize_barriers(scratch.words, [copies.WARPGROUP] * slots)
  warpgroup = lax.axis_index("warpgroup")
  pair = lax.rem(warpgroup, jnp.int32(PAIRS))
  role = lax.div(warpgroup, jnp.int32(PAIRS))

  def run(step):
    start = first + lax.axis_index("block") * PAIRS + pair
    stride = problem.sizes.num_blocks
    turns = lax.div(last - start + (stride - 1), jnp.int32(stride))
    lax.fori_loop(
      jnp.int32(0),
      turns,
      lambda turn, n: step(pair, start + turn * stride, n),
      jnp.int32(0),
    )

  @pl.when(role == _CONSUMER)
  def _():
    plgpu.set_max_registers(_REGISTERS[_CONSUMER], action="increase")
    _free_first_query(problem, scratch, pair)
    run(consume)
    plgpu.wait_smem_to_gmem(0)

  @pl.when(role == _PRODUCER)
  def _():
    plgpu.set_max_registers(_REGISTERS[_PRODUCER], action="decrease")
    run(functools.partial(_produce, problem, inputs, scratch))


def _free_first_query(problem, scratch, pair):
  """Lets the first query in, zeroed where no copy will fill it."""
  if problem.heads < TILE:
    scratch.q.at[pair][...] = plgpu.layout_cast(
      jnp.zeros((TILE, problem.sizes.width), jnp.bfloat16), _LAYOUT
    )
    plgpu.commit_smem()
  plgpu.barrier_arrive(scratch.q_free.at[pair])


def _for_each_step(problem, run, carry):
  """`carry = run(b, carry)` for each 64 keys of a query, `b` their number."""
  steps = problem.sizes.rows_an_item // TILE
  return lax.fori_loop(jnp.int32(0), jnp.int32(steps), run, carry)


def _slot(pair, n):
  """Of keys, and of their barriers, in a pair's n-th step of all queries."""
  return pair * _SLOTS + lax.rem(n, jnp.int32(_SLOTS))


def _produce(problem, inputs, scratch, pair, query, n):
  plgpu.barrier_wait(scratch.q_free.at[pair])
  plgpu.copy_gmem_to_smem(
    inputs.index_q.at[query],
    scratch.q.at[pair, pl.ds(0, problem.heads)],
    scratch.q_full.at[pair],
  )
  sizes = problem.sizes
  sequence = lax.div(query, jnp.int32(sizes.items))
  end = sizes.rows_an_item - TILE

  def load(b):
    start = query * sizes.rows_an_item + jnp.minimum(b * TILE, end)
    return copies.load_indices(inputs.indices, start, TILE)

  def copy_rows(b, carry):
    n, indices = carry
    # A step ahead, so that nothing waits for indices.
    next_indices = load(b + 1)
    slot = _slot(pair, n)

    @pl.when(n >= _SLOTS)
    def _():
      plgpu.barrier_wait(scratch.k_free.at[slot])

    copies.start_row_copies(
      inputs.index_k,
      sequence * sizes.num_keys,
      sizes.num_keys,
      indices,
      scratch.k.at[slot],
      column_tiles=(0, sizes.width // copies.TILE),
    )
    copies.arrive_when_copied(scratch.words, slot)
    return n + 1, next_indices

  n, _ = _for_each_step(problem, copy_rows, (n, load(jnp.int32(0))))
  return n


def _products(scratch, pair, n):
  """Products of 64 keys (rows) with all heads (columns)."""
  slot = _slot(pair, n)
  parity = lax.rem(lax.div(n, jnp.int32(_SLOTS)), jnp.int32(2))
  copies.wait(scratch.words, slot, parity)

  def product(sums):
    plgpu.wgmma(sums, scratch.k.at[slot], scratch.q.at[pair].transpose((1, 0)))
    return sums[...]

  return pl.run_scoped(product, plgpu.ACC((TILE, TILE), jnp.float32))


def _load(ref, layout):
  return plgpu.load(ref, layout=layout, optimized=False)


def _score(problem, inputs, scratch, out, pair, query, n):
  weights = _load(inputs.index_weights.at[query], _BY_HEAD)
  plgpu.barrier_wait(scratch.q_full.at[pair])

  def step(b, n):
    products = _products(scratch, pair, n)
    plgpu.barrier_arrive(scratch.k_free.at[_slot(pair, n)])
    terms = jnp.maximum(products, 0.0) * lax.broadcast_in_dim(
      weights, products.shape, [1]
    )
    out[query, pl.ds(b * TILE, TILE)] = jnp.sum(terms, axis=1)
    return n + 1

  n = _for_each_step(problem, step, n)
  plgpu.barrier_arrive(scratch.q_free.at[pair])
  return n


def _differentiate(problem, inputs, grads, scratch, first, pair, query, n):
  sizes = problem.sizes
  item = query - first
  weights = _load(inputs.index_weights.at[query], _BY_HEAD)
  plgpu.barrier_wait(scratch.q_full.at[pair])

  def step(b, carry):
    dq, dw, n = carry
    # The compiler must not know that this is `pair` in every step: it would
    # keep the operands' descriptors in registers, and spill them.
    place = pair + lax.shift_right_logical(n, jnp.int32(30))
    q, dz = scratch.q.at[place], scratch.dz.at[place]
    here = pl.ds(b * TILE, TILE)
    indices = _load(inputs.indices.at[query, here], _BY_KEY)
    reductions.record_rows(
      grads.places,
      grads.bits,
      jnp.minimum(indices, sizes.num_keys - 1),
      item,
      b * TILE,
    )
    products = _products(scratch, place, n)
    shape = products.shape
    grad = lax.broadcast_in_dim(
      _load(grads.scores.at[query, here], _BY_KEY), shape, [0]
    )
    dw += grad * jnp.maximum(products, 0.0)
    slope = grad * lax.broadcast_in_dim(weights, shape, [1])
    dz[...] = jnp.where(products > 0, slope, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()

    def add_dq(sums):
      keys = scratch.k.at[_slot(pair, n)]
      plgpu.wgmma(sums, dz.transpose((1, 0)), keys)

    dq = pl.run_state(add_dq)(plgpu.ACC.init(dq))
    plgpu.barrier_arrive(scratch.k_free.at[_slot(pair, n)])
    first_row = item * sizes.rows_an_item + b * TILE

    def store_columns(j, _):
      def product(sums):
        plgpu.wgmma(sums, dz, q.at[:, pl.ds(TILE * j, TILE)])
        return sums[...]

      dk = pl.run_scoped(product, plgpu.ACC((TILE, TILE), jnp.float32))
      reductions.store_rows(
        grads.addends, first_row, dk.astype(jnp.bfloat16), TILE * j
      )

    lax.fori_loop(0, sizes.width // TILE, store_columns, None)
    return dq, dw, n + 1

  zeros = (
    plgpu.layout_cast(jnp.zeros((TILE, columns), jnp.float32), _LAYOUT)
    for columns in (sizes.width, TILE)
  )
  dq, dw, n = _for_each_step(problem, step, (*zeros, n))
  grads.index_weights[query] = reductions.sum_rows(dw, scratch.sums.at[pair])
  scratch.q.at[pair][...] = dq.astype(jnp.bfloat16)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(
    scratch.q.at[pair, pl.ds(0, problem.heads)], grads.index_q.at[query]
  )
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  plgpu.barrier_arrive(scratch.q_free.at[pair])
  return n
