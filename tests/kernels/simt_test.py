# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
from absl.testing import absltest, parameterized

from tests.kernels.simt_emulator import Array, SimtError, run_block

_THREADS = 64


def run(body, *memories, seed=0):
  run_block(body, memories, num_threads=_THREADS, seed=seed)


def of_threads(function):
  """What `function(machine)` is in each thread."""
  out = np.zeros(_THREADS, np.int32)

  def body(machine, out):
    out.store(machine.thread, function(machine))

  run(body, Array(out))
  return out


THREADS = np.arange(_THREADS)


class SimtLanguageTest(parameterized.TestCase):
  def test_arithmetic_wraps(self):
    actual = of_threads(lambda m: (m.thread + 0x7FFFFFFF) * 3 - m.thread)
    expected = (THREADS + 0x7FFFFFFF) * 3 - THREADS
    np.testing.assert_array_equal(actual, expected.astype(np.int32))

  def test_shifts_and_division_are_unsigned(self):
    actual = of_threads(lambda m: ((m.thread - 8) >> 1) // 3)
    expected = (np.uint32(2**32 - 8) + THREADS.astype(np.uint32)) // 2 // 3
    np.testing.assert_array_equal(actual, expected.astype(np.int32))

  def test_comparisons(self):
    def of_machine(machine):
      x = machine.thread - 32
      return (
        (x < -3).to_int()
        + ((x >= 4) & (x <= 9)).to_int() * 2
        + ((x == 1) | (x != x)).to_int() * 4
        + x.is_below(16).to_int() * 8
      )

    x = THREADS - 32
    expected = (x < -3) + 2 * ((x >= 4) & (x <= 9)) + 4 * (x == 1)
    np.testing.assert_array_equal(
      of_threads(of_machine), expected + 8 * ((x >= 0) & (x < 16))
    )

  def test_floats_compare_as_floats(self):
    numbers = np.float32([1.0, -1.0, 0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45])
    bits = numbers.view(np.int32)
    for one, other in np.ndindex(8, 8):
      actual = of_threads(
        lambda m, i=one, j=other: (
          m.int(int(bits[i])).is_float_above(int(bits[j])).to_int()
        )
      )
      self.assertEqual(actual[0], numbers[one] > numbers[other])

  def test_bits(self):
    actual = of_threads(lambda m: m.thread.popcount())
    np.testing.assert_array_equal(actual, np.bitwise_count(THREADS))
    actual = of_threads(lambda m: m.thread.leading_zeros())
    self.assertSequenceEqual(
      list(actual[[0, 1, 2, 3, 4, 63]]), [32, 31, 30, 30, 29, 26]
    )

  def test_warp_collectives(self):
    lanes = THREADS % 32
    for function, expected in (
      (lambda m: m.ballot(m.lane < 5), np.full(64, 31)),
      (lambda m: m.warp_sum(m.thread), (THREADS // 32 * 32 * 32) + 496),
      (
        lambda m: m.warp_unsigned_maximum(m.lane - 1),
        np.full(64, -1),
      ),
      (lambda m: m.shuffle(m.thread, 3), THREADS - lanes + 3),
      (lambda m: m.prefix_sum(m.lane), lanes * (lanes + 1) // 2),
    ):
      np.testing.assert_array_equal(of_threads(function), expected)

  def test_loop_and_branch_go_thread_by_thread(self):
    def collatz(machine):
      def step(x, steps):
        (x,) = machine.branch((x & 1) == 0, lambda _: [x >> 1], x * 3 + 1)
        return x, steps + 1

      return machine.loop(lambda x, _: x > 1, step, machine.thread, 0)[1]

    def steps(x):
      count = 0
      while x > 1:
        x, count = (x * 3 + 1 if x % 2 else x // 2), count + 1
      return count

    np.testing.assert_array_equal(
      of_threads(collatz), [steps(x) for x in range(64)]
    )

  def test_a_flag_is_no_python_truth(self):
    with self.assertRaisesRegex(TypeError, "use `when`"):
      of_threads(lambda m: 1 if m.thread < 3 else 2)


class SimtFaultsTest(absltest.TestCase):
  """What the emulator must find, or it proves nothing."""

  def assert_fault(self, message, body, *memories):
    for seed in range(4):
      with self.assertRaisesRegex(SimtError, message):
        run(body, *memories, seed=seed)

  def test_a_missing_barrier(self):
    def reverse(machine, memory, has_barrier):
      memory.store(machine.thread, machine.thread)
      if has_barrier:
        machine.barrier()
      memory.load(63 - machine.thread)

    run(lambda *args: reverse(*args, True), Array.shared(64))
    self.assert_fault(
      "race", lambda *args: reverse(*args, False), Array.shared(64)
    )

  def test_a_write_after_a_read(self):
    def rotate(machine, memory):
      memory.store(machine.thread, machine.thread)
      machine.barrier()
      value = memory.load((machine.thread + 1) & 63)
      memory.store(machine.thread, value)

    self.assert_fault("race", rotate, Array.shared(64))

  def test_two_writers(self):
    self.assert_fault(
      "two lanes write one word|race",
      lambda machine, memory: memory.store(machine.thread & 1, 1),
      Array.shared(64),
    )

  def test_an_atomic_beside_a_read(self):
    def count(machine, memory):
      memory.add(machine.int(0), 1, machine.lane >= 0)
      memory.load(0)

    self.assert_fault("race", count, Array.shared(4))

  def test_a_divergent_barrier(self):
    def wait(machine):
      with machine.when(machine.thread < 5):
        machine.barrier()

    self.assert_fault("only some lanes", wait)

  def test_a_barrier_of_one_warp(self):
    def wait(machine):
      with machine.when(machine.warp == 0):
        machine.barrier()

    self.assert_fault("not all warps", wait)

  def test_a_divergent_vote(self):
    def vote(machine):
      with machine.when(machine.lane == 0):
        machine.ballot(machine.lane == 0)

    self.assert_fault("only some lanes", vote)

  def test_bounds_and_alignment(self):
    self.assert_fault(
      "out of bounds", lambda m, x: x.store(m.thread, 0), Array.shared(63)
    )
    self.assert_fault(
      "out of bounds", lambda m, x: x.load(m.thread + 4), Array.shared(64)
    )
    self.assert_fault(
      "misaligned", lambda m, x: x.load_words(2, 4), Array.shared(64)
    )


if __name__ == "__main__":
  absltest.main()
