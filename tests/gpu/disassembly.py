# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Looks for what ptxas 13.0 got wrong, in the machine code of the kernels.

A `cp.async` with a cache policy whose shared address has a part that is the
same in all threads comes out as `LDGSTS [R17+UR0+0x4000], desc[UR1][...]`: no
instruction sets UR0 and UR1, and the card reports an illegal instruction. A
descriptor is a pair of uniform registers and begins at an even one, so an odd
one tells. Seen in `selected_indexer_scores` with 64 columns, on an H200.
"""

import importlib.util
import os
import re

_ODD_DESCRIPTOR = re.compile(r"[^\n]*\bdesc\[UR\d*[13579]\][^\n]*")
_FAILURE = "nvdisasm invocation failed"
# Every kernel's last instruction.
_END = re.compile(r"\bEXIT\b")


def set_environment():
  """Makes Mosaic GPU print each kernel's machine code, by the wheel's nvdisasm.

  Raises:
    ImportError: there is no such wheel.
  """
  # Importing it sets the folder to the toolkit's, which has no disassembler.
  from jax.experimental.mosaic import gpu as _  # noqa: F401

  spec = importlib.util.find_spec("nvidia.cu13")
  if spec is None:
    raise ImportError(
      "Reading the kernels' machine code needs the package"
      " nvidia-cuda-nvdisasm: found none. `make gpu-compile` installs it."
    )
  os.environ["MOSAIC_GPU_CUDA_ROOT"] = next(
    iter(spec.submodule_search_locations)
  )
  os.environ["MOSAIC_GPU_DUMP_SASS"] = "1"


def fault(text: str) -> str | None:
  """What is wrong in a compiler's output with machine code, or None."""
  if _FAILURE in text:
    return text[text.index(_FAILURE) :].splitlines()[0]
  if not _END.search(text):
    return "no machine code was printed: nothing was checked"
  found = _ODD_DESCRIPTOR.search(text)
  if found:
    return f"ptxas used a register that nothing sets: {found[0].strip()}"
  return None
