# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What `pallas_kernels.hopper` does on the GPU, each function by itself.

Everything here is exact: the numbers are copied, or small integers.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import parameterized

from pallas_kernels.hopper import row_sums
from tests.gpu import device, hopper_kernels

_REPEATS = 20
_NUM_ROWS = 100


def setUpModule():
  device.require_hopper()


def bits(x):
  """Numbers as they are stored: a NaN equals itself, -0 is not 0."""
  x = np.asarray(x)
  return x.view(f"uint{8 * x.itemsize}")


def rows(seed, num_rows, columns, dtype=ml_dtypes.bfloat16):
  """Bytes of all kinds: also infinities and NaN."""
  rng = np.random.default_rng(seed)
  size = num_rows * columns * np.dtype(dtype).itemsize
  drawn = rng.integers(0, 256, size, np.uint8)
  return drawn.view(dtype).reshape(num_rows, columns)


def indices(seed, count):
  """Any rows, those that are none, and those that are cut to the last."""
  rng = np.random.default_rng(seed)
  drawn = rng.integers(0, _NUM_ROWS, count, np.int32)
  drawn[::7] = -1
  drawn[3::11] = _NUM_ROWS + rng.integers(0, 1000, len(drawn[3::11]))
  drawn[5] = np.iinfo(np.int32).min
  drawn[6] = np.iinfo(np.int32).max
  return drawn


def gathered(table, indices, first_row=0):
  """The rows by NumPy: zeros where an index is negative."""
  found = bits(table)[first_row + np.clip(indices, 0, _NUM_ROWS - 1)]
  found[indices < 0] = 0
  return found.view(table.dtype)


class HopperDeviceTest(parameterized.TestCase):
  def assert_always(self, run, args, expected):
    """Bit by bit, and in each of many runs."""
    args = jax.tree.map(jnp.asarray, args)
    run = jax.jit(run)
    for _ in range(_REPEATS):
      jax.tree.map(
        lambda actual, want: np.testing.assert_array_equal(
          bits(actual), bits(want)
        ),
        run(*args),
        expected,
      )


class CopiesTest(HopperDeviceTest):
  def gather(self, table, **kwargs):
    def run(table, indices):
      return hopper_kernels.gather(
        table, indices, first_row=_NUM_ROWS, num_rows=_NUM_ROWS, **kwargs
      )

    # The second of two tables, in five phases of the barrier.
    chosen = indices(1, 5 * kwargs.get("step_rows", hopper_kernels.ROWS))
    return run, (table, chosen), gathered(table, chosen, _NUM_ROWS)

  @parameterized.product(step_rows=(16, 64), is_kept=(True, False))
  def test_rows(self, step_rows, is_kept):
    table = rows(0, 2 * _NUM_ROWS, 3 * 64)
    run, args, expected = self.gather(
      table, column_tiles=(0, 3), step_rows=step_rows, is_kept=is_kept
    )
    self.assert_always(run, args, expected)

  @parameterized.parameters(
    # Of a row's three tiles; where the first goes; what is left zero.
    ((1, 3), None, 1),
    ((1, 3), 0, 0),
    ((0, 2), 1, 1),
  )
  def test_some_columns(self, column_tiles, to_tile, empty_tiles):
    table = rows(0, 2 * _NUM_ROWS, 3 * 64)
    run, args, expected = self.gather(
      table, column_tiles=column_tiles, to_tile=to_tile
    )
    first, last = column_tiles
    expected = np.pad(
      expected[:, 64 * first : 64 * last], ((0, 0), (64 * empty_tiles, 0))
    )
    self.assert_always(run, args, expected)

  def test_rows_of_single_bytes(self):
    table = rows(0, 2 * _NUM_ROWS, 3 * 128, ml_dtypes.float8_e4m3fn)
    run, args, expected = self.gather(table, column_tiles=(0, 3), is_kept=False)
    self.assert_always(run, args, expected.view(ml_dtypes.bfloat16))

  def test_matrix_units_read_the_same_rows(self):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(_NUM_ROWS, 64)).astype(ml_dtypes.bfloat16)
    chosen = indices(1, 64)
    # Products with 1 and sums with 0 are exact.
    expected = gathered(table, chosen).astype(np.float32)
    self.assert_always(
      hopper_kernels.gather_products, (table, chosen), expected
    )

  def test_registers_read_the_same_rows(self):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(_NUM_ROWS, 64)).astype(ml_dtypes.bfloat16)
    chosen = indices(1, 64)
    expected = 2 * gathered(table, chosen).astype(np.float32)
    self.assert_always(
      hopper_kernels.gather_doubled,
      (table, chosen),
      expected.astype(ml_dtypes.bfloat16),
    )

  @parameterized.product(width=(2, 4), to_tile=(0, 1))
  def test_scales_and_words(self, width, to_tile):
    scales = rows(0, _NUM_ROWS, width)
    chosen = indices(1, 3 * 64)

    def run(scales, indices):
      tiles, words = hopper_kernels.gather_scales(
        scales, indices, to_tile=to_tile, start=64
      )
      return tiles[:, 64 * to_tile :][:, :width], words

    expected = gathered(scales, chosen[64:128]), chosen[64:128]
    self.assert_always(run, (scales, chosen), expected)


class FragmentsTest(HopperDeviceTest):
  @parameterized.parameters((64, 32), (128, 64), (256, 32))
  def test_what_is_put_is_got(self, *shape):
    values = rows(0, 5 * shape[0], shape[1], np.float32).reshape(5, *shape)
    self.assert_always(hopper_kernels.exchange, (values,), values)

  @parameterized.parameters(1, 5)
  def test_named_barriers_hand_over(self, count):
    values = rows(0, count, 64, np.float32)
    self.assert_always(
      functools.partial(hopper_kernels.hand_over, blocks=3),
      (values,),
      np.broadcast_to(values, (3, *values.shape)),
    )

  @parameterized.parameters((2, 32), (3, 64), (1, 128))
  def test_reductions(self, warpgroups, columns):
    rng = np.random.default_rng(columns)
    values = rng.integers(-1000, 1000, (warpgroups, 64, columns))
    # No maximum of the first columns is above zero.
    values[..., :8] -= 1000
    values = values.astype(np.float32)
    sums = values.sum(axis=1)
    self.assert_always(
      hopper_kernels.reduce_columns,
      (values,),
      np.stack([values.max(axis=1), sums, sums]),
    )


class RowSumsTest(HopperDeviceTest):
  # Among many keys a chunk has most of them nowhere.
  @parameterized.product(
    width=(64, 192), max_items=(100, 40), num_keys=(90, 3000)
  )
  def test_in_the_order_of_the_items(self, width, max_items, num_keys):
    sizes = row_sums.Sizes(
      sequences=2,
      items=100,
      num_keys=num_keys,
      rows_an_item=hopper_kernels.ROWS,
      width=width,
      num_blocks=132,
    )
    rng = np.random.default_rng(width)
    addends = rng.normal(size=(200, 64, width)).astype(ml_dtypes.bfloat16)
    addends = addends.astype(np.float32)
    ids = np.stack([rng.permutation(num_keys)[:64] for _ in range(200)])
    ids = np.where(rng.random(ids.shape) < 0.2, -1, ids).astype(np.int32)
    expected = np.zeros((2 * num_keys, width), np.float32)
    for item, (own, values) in enumerate(zip(ids, addends, strict=True)):
      is_row = own >= 0
      expected[item // 100 * num_keys + own[is_row]] += values[is_row]

    def run(addends, ids):
      chunk_bytes = max_items * sizes.item_bytes
      with mock.patch.object(row_sums, "CHUNK_BYTES", chunk_bytes):
        self.assertEqual(sizes.max_items, max_items)
        return hopper_kernels.sum_items(addends, ids, sizes)

    self.assert_always(run, (addends, ids), expected)


if __name__ == "__main__":
  device.main()
