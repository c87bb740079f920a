# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
from unittest import mock

import jax
from absl.testing import absltest

from pallas_kernels import dispatch


def unfit(x):
  raise NotImplementedError(f"no kernel for {x}")


def broken(x):
  raise RuntimeError("a fault, not an unfit shape")


class DispatchTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    # The order of some platform, whichever the tests run on.
    self.platform = jax.default_backend()

  def run_op(self, implementations, order, implementation=None):
    return dispatch.run(
      "op", implementations, {self.platform: order}, implementation, 3
    )

  def test_none_takes_the_first_that_fits(self):
    implementations = {"a": unfit, "b": lambda x: x + 1, "xla": lambda x: x}
    self.assertEqual(self.run_op(implementations, ("a", "b")), 4)
    self.assertEqual(self.run_op(implementations, ("a",)), 3)
    self.assertEqual(self.run_op(implementations, ()), 3)

  def test_a_named_one_runs_or_raises(self):
    implementations = {"a": unfit, "xla": lambda x: x}
    self.assertEqual(self.run_op(implementations, ("a",), "xla"), 3)
    with self.assertRaisesRegex(NotImplementedError, "no kernel for 3"):
      self.run_op(implementations, (), "a")

  def test_a_fault_does_not_fall_through(self):
    with self.assertRaisesRegex(RuntimeError, "a fault"):
      self.run_op({"a": broken, "xla": lambda x: x}, ("a",))

  def test_says_why_none_fits(self):
    with self.assertRaises(ExceptionGroup) as caught:
      self.run_op({"a": unfit, "xla": unfit}, ("a",))
    self.assertLen(caught.exception.exceptions, 2)
    self.assertIn("'xla' of `op`", caught.exception.exceptions[1].__notes__[0])

  def test_unknown_name(self):
    with self.assertRaisesRegex(ValueError, r"one of \['xla'\]: got 'cuda'"):
      self.run_op({"xla": unfit}, (), "cuda")

  def test_logs_a_choice_once(self):
    dispatch._log_choice.cache_clear()
    with mock.patch.object(dispatch.logging, "info") as info:
      for _ in range(3):
        self.run_op({"a": unfit, "xla": lambda x: x}, ("a",))
    info.assert_called_once()
    self.assertIn("no kernel for 3", info.call_args.args[-1])


if __name__ == "__main__":
  absltest.main()
