# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
from absl.testing import absltest

from tests.gpu import disassembly

_RIGHT = """
        /*1d00*/   EXIT ;
        /*1e10*/   LDGSTS.E.BYPASS.128 [R19+0x4000], desc[UR32][R12.64] ;
        /*1e20*/   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR21], R6 ;
"""
_WRONG = """
        /*1ea0*/   LDGSTS.E.128 [R17+UR0+0x4000], desc[UR1][R12.64], P1 ;
"""


class DisassemblyTest(absltest.TestCase):
  def test_an_odd_descriptor_is_a_fault(self):
    self.assertIsNone(disassembly.fault(_RIGHT))
    self.assertRegex(
      disassembly.fault(_RIGHT + _WRONG), r"nothing sets: /\*1ea0\*/"
    )

  def test_no_machine_code_is_a_fault(self):
    self.assertRegex(disassembly.fault("ptxas info"), "nothing was checked")
    self.assertEqual(
      disassembly.fault("x\nnvdisasm invocation failed: why\ny"),
      "nvdisasm invocation failed: why",
    )


if __name__ == "__main__":
  absltest.main()
