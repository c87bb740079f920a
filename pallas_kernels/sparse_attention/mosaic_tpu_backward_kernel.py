# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The kernel of `mosaic_tpu_backward`: rows in, terms of their gradient out.

A TensorCore has no scatter: the sum of a row's gradient stays in HBM, and a
step copies the sums of its chunk in, adds its terms and copies them back. The
rows of one query are distinct, so its chunks follow each other without a wait
for the copies back, in two buffers in turn; the next query waits for all of
them. So no addition is lost and the order is fixed. Each core has sums of its
own. What is not hidden is the issue of three copies a row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32, UInt32

from pallas_kernels import numerics
from pallas_kernels.sparse_attention import mosaic_tpu_gather as gather
from pallas_kernels.sparse_attention import mosaic_tpu_lanes as lanes

_LANES = lanes.LANES


def columns(row_tiles: int, dtype: jnp.dtype) -> int:
  """W: columns of an unpacked row; its gradient has as many floats."""
  return row_tiles * _LANES * 4 // jnp.dtype(dtype).itemsize


def no_sums(
  problem: gather.Problem, words: UInt32[Array, "R 128"]
) -> Float32[Array, "cores RW 128"]:
  """Sums before the first query, a row of W floats for each token."""
  width = columns(problem.row_tiles, problem.dtype)
  ratio = width // _LANES // problem.row_tiles
  return jnp.zeros(
    (problem.tiles.cores, words.shape[0] * ratio, _LANES), jnp.float32
  )


def call(
  problem: gather.Problem,
  query: Float[Array, "Q N W"],
  grad_out: Float[Array, "Q N W"],
  log_sum_exp: Float32[Array, "Q 1 128"],
  delta: Float32[Array, "Q 1 128"],
  rows: Int32[Array, "Q K"],
  selected: Int32[Array, "Q K"],
  words: UInt32[Array, "R 128"],
  sums: Float32[Array, "cores RW 128"],
) -> tuple[Float[Array, "Q N W"], Float32[Array, "cores RW 128"]]:
  """Runs the kernel on padded arrays, W columns wide.

  Args:
    problem: their sizes and the tiles.
    query: all batches' queries.
    grad_out: of the output.
    log_sum_exp: of the logits, by head (lane).
    delta: the sum over rows of probability times its gradient, by head.
    rows: the first row of `words` of each selected token; in one chunk each
      of another token, also where nothing is selected.
    selected: below 0 for none.
    words: all batches' packed caches.
    sums: of other queries, from `no_sums` on; overwritten.

  Returns:
    Gradients of the queries, and the sums with those of the rows.
  """
  tiles, num_chunks = problem.tiles, problem.num_chunks
  flat, heads, width = query.shape
  per_core = flat // tiles.cores

  def of_query(core, i, c):
    return core * per_core + i, 0, 0

  rows_buffer = pltpu.VMEM(
    (tiles.chunk * problem.row_tiles, _LANES), jnp.uint32
  )
  sums_buffer = pltpu.VMEM((tiles.chunk * width // _LANES, _LANES), jnp.float32)
  return pl.pallas_call(
    functools.partial(_kernel, problem),
    grid=(tiles.cores, per_core, num_chunks),
    in_specs=[
      pl.BlockSpec((1, heads, width), of_query),
      pl.BlockSpec((1, heads, width), of_query),
      pl.BlockSpec((1, 1, _LANES), of_query),
      pl.BlockSpec((1, 1, _LANES), of_query),
      pl.BlockSpec(
        (1, 1, tiles.chunk),
        lambda core, i, c: (core * per_core + i, 0, c),
      ),
      pl.BlockSpec(memory_space=pltpu.HBM),
      pl.BlockSpec(memory_space=pltpu.HBM),
      pl.BlockSpec(memory_space=pltpu.HBM),
    ],
    out_specs=[
      pl.BlockSpec((1, heads, width), of_query),
      pl.BlockSpec(memory_space=pltpu.HBM),
    ],
    out_shape=[
      jax.ShapeDtypeStruct(query.shape, query.dtype),
      jax.ShapeDtypeStruct(sums.shape, sums.dtype),
    ],
    input_output_aliases={7: 1},
    scratch_shapes=[
      [rows_buffer] * tiles.buffers,
      [pltpu.SMEM((tiles.chunk,), jnp.int32)] * tiles.buffers,
      pltpu.SemaphoreType.DMA((tiles.buffers,)),
      pltpu.SemaphoreType.DMA((tiles.buffers,)),
      [sums_buffer] * tiles.buffers,
      [pltpu.SemaphoreType.DMA] * tiles.buffers,
      [pltpu.SemaphoreType.DMA] * tiles.buffers,
      pltpu.VMEM((heads, width), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      # The caller clips the row numbers.
      disable_bounds_checks=True,
    ),
    name="sparse_mla_backward",
  )(
    query,
    grad_out,
    log_sum_exp,
    delta,
    selected[:, None],
    # Where XLA keeps a small array in VMEM there is no copy to SMEM.
    pltpu.with_memory_space_constraint(rows.reshape(-1), pltpu.HBM),
    words,
    sums,
  )


class Sums(NamedTuple):
  """The copies of chunks' sums into VMEM and back, in two slots in turn.

  Attributes:
    problem: its sizes.
    hbm_ref: all tokens' sums.
    index_buffers: SMEM, the first word row of each selected token, by slot.
    buffers: VMEM, a chunk's sums, by slot.
    load_semaphores: by slot.
    store_semaphores: by slot.
  """

  problem: gather.Problem
  hbm_ref: jax.Ref
  index_buffers: list[jax.Ref]
  buffers: list[jax.Ref]
  load_semaphores: list[jax.Ref]
  store_semaphores: list[jax.Ref]

  def start_loads(self, slot):
    """Starts the copies into VMEM."""
    semaphore = self.load_semaphores[slot]
    self._start_all(slot, lambda hbm, vmem: (hbm, vmem, semaphore))

  def start_stores(self, slot):
    """Starts the copies back."""
    semaphore = self.store_semaphores[slot]
    self._start_all(slot, lambda hbm, vmem: (vmem, hbm, semaphore))

  def wait_loads(self, slot):
    """Waits for all of a chunk's sums."""
    self._wait(slot, self.load_semaphores)

  def wait_stores(self, slot):
    """Waits for all copies back."""
    self._wait(slot, self.store_semaphores)

  def add(self, slot, terms):
    """Adds `terms`, `[chunk, W]`."""
    buffer, chunk = self.buffers[slot], self.problem.tiles.chunk
    tiles = self._tiles
    for tile in range(tiles):
      place = pl.ds(tile, chunk, stride=tiles)
      part = terms[:, tile * _LANES : (tile + 1) * _LANES]
      buffer[place] = buffer[place] + part

  @property
  def _tiles(self):
    return columns(self.problem.row_tiles, self.problem.dtype) // _LANES

  def _start_all(self, slot, copy):
    tiles = self._tiles
    # Tokens lie as in the words, in rows of so many times the tiles.
    ratio = tiles // self.problem.row_tiles
    for place in range(self.problem.tiles.chunk):
      row = self.index_buffers[slot][place] * ratio
      pltpu.make_async_copy(
        *copy(
          self.hbm_ref.at[pl.ds(row, tiles)],
          self.buffers[slot].at[pl.ds(place * tiles, tiles)],
        )
      ).start()

  def _wait(self, slot, semaphores):
    buffer = self.buffers[slot]
    pltpu.make_async_copy(buffer, buffer, semaphores[slot]).wait()


def _kernel(
  problem,
  query_ref,
  grad_out_ref,
  log_sum_exp_ref,
  delta_ref,
  selected_ref,
  rows_ref,
  words_ref,
  _,
  grad_query_ref,
  sums_ref,
  buffers,
  index_buffers,
  row_semaphores,
  index_semaphores,
  sums_buffers,
  load_semaphores,
  store_semaphores,
  acc_ref,
):
  """One chunk of one query; the next chunk's rows on their way meanwhile."""
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

  @pl.when(step == 0)
  def _():
    loads.start_first()

  @pl.when(chunk_id == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)

  sums = Sums(
    problem,
    sums_ref.at[pl.program_id(0)],
    index_buffers,
    sums_buffers,
    load_semaphores,
    store_semaphores,
  )

  def work(slot, is_tail):
    # A query's first two chunks find both buffers free.
    @pl.when(chunk_id > 1)
    def _():
      sums.wait_stores(slot)

    sums.start_loads(slot)
    loads.wait_rows(slot)
    if not is_tail:
      loads.wait_indices(slot)
      loads.start_rows(slot)
    rows = gather.unpack(problem, buffers[slot])
    terms, grad_query = _terms(
      problem,
      query_ref[0],
      grad_out_ref[0],
      log_sum_exp_ref[0],
      delta_ref[0],
      selected_ref[0],
      rows,
    )
    acc_ref[...] += grad_query
    sums.wait_loads(slot)
    sums.add(slot, terms)
    sums.start_stores(slot)
    loads.start_indices(step, slot)

    # The next query may have rows of this one.
    @pl.when(chunk_id == problem.num_chunks - 1)
    def _():
      if problem.num_chunks > 1:
        sums.wait_stores(1 - slot)
      sums.wait_stores(slot)

  slots, steps = problem.tiles.buffers, problem.steps
  slot_of_step = gather.slot_of(step, problem.tiles)
  tail = max(steps - problem.tiles.ahead, 0)
  for slot in range(slots):

    @pl.when((step < tail) & (slot_of_step == slot))
    def _(slot=slot):
      work(slot, is_tail=False)

    @pl.when((step >= tail) & (slot_of_step == slot))
    def _(slot=slot):
      work(slot, is_tail=True)

  @pl.when(chunk_id == problem.num_chunks - 1)
  def _():
    grad_query_ref[0] = acc_ref[...].astype(grad_query_ref.dtype)


def _terms(problem, query, grad_out, log_sum_exp, delta, selected, rows):
  """What a chunk adds to the gradients of its rows and of the query.

  Returns:
    `[chunk, W]` and `[heads, W]`, float32.
  """
  dot = functools.partial(
    jax.lax.dot_general,
    preferred_element_type=jnp.float32,
    precision=numerics.precision(problem.dtype),
  )
  # A row is a key and a value, so queries and gradients go through the matrix
  # units together.
  both = jnp.concatenate([query, grad_out])
  products = dot(both, rows, (((1,), (1,)), ((), ())))
  # `grad_out` is zero behind its values.
  logits, grad_probs = jnp.split(products, 2)
  log_sum_exp, delta = (
    lanes.to_sublanes(x, problem.heads) for x in (log_sum_exp, delta)
  )
  exponents = problem.scale * logits - log_sum_exp
  probs = jnp.where(selected >= 0, jnp.exp(exponents), 0.0)
  grad_logits = problem.scale * probs * (grad_probs - delta)
  probs, grad_logits = (x.astype(problem.dtype) for x in (probs, grad_logits))
  terms = dot(
    jnp.concatenate([grad_logits, probs]), both, (((0,), (0,)), ((), ()))
  )
  return terms, dot(grad_logits, rows, (((1,), (0,)), ((), ())))
