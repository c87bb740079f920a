# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Needle-in-a-haystack text: facts hidden in real text, asked for at its end.

A model that selects the wrong keys can't answer, however fluent it is, so
recall of needles shows what a schedule loses where mean loss hides it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"


class NeedleBatch(NamedTuple):
  """Sequences that end in a question, and their answers.

  Attributes:
    prompts: byte tokens, all of one length; the answer follows.
    answers: byte tokens of the answers.
    depths: place of the needle, 0 at the beginning and 1 at the end.
  """

  prompts: Int32[np.ndarray, "B T"]
  answers: Int32[np.ndarray, "B A"]
  depths: np.ndarray


def needle_line(name: str, value: str) -> str:
  """The hidden fact, as a comment of the program text around it."""
  return f"\n# the code of {name} is {value}\n"


def needle_question(name: str) -> str:
  """The beginning of the same line, which the answer completes."""
  return f"\n# the code of {name} is "


def random_fact(rng: np.random.Generator) -> tuple[str, str]:
  """Draws a name of four letters and a value of four digits."""
  name = "".join(rng.choice(list(_LETTERS), 4))
  value = "".join(rng.choice(list(_DIGITS), 4))
  return name, value


def hide_needles(
  window: Int32[np.ndarray, " T"],
  rng: np.random.Generator,
  num_needles: int,
) -> Int32[np.ndarray, " T"]:
  """Overwrites parts of a window with facts, and its end with all questions.

  For training: the questions are answered, in random order, so each asks for
  one of several facts at an unknown distance.
  """
  facts = [random_fact(rng) for _ in range(num_needles)]
  asked = "".join(
    needle_line(*facts[place]) for place in rng.permutation(num_needles)
  ).encode()
  haystack = window[: len(window) - len(asked)].copy()
  size = len(needle_line(*facts[0]).encode())
  slots = len(haystack) // size
  if slots < num_needles:
    raise ValueError(
      "`num_needles` facts and their questions must fit in the window: got"
      f" {num_needles} of {size} bytes each for {len(window)} tokens."
    )
  # Distinct slots: no needle overwrites another.
  places = rng.choice(slots, num_needles, replace=False) * size
  for place, fact in zip(places, facts, strict=True):
    line = needle_line(*fact).encode()
    haystack[place : place + size] = np.frombuffer(line, np.uint8)
  return np.concatenate([haystack, np.frombuffer(asked, np.uint8)]).astype(
    np.int32
  )


def needle_batch(
  windows: Int32[np.ndarray, "B T"],
  rng: np.random.Generator,
  depths: np.ndarray,
) -> NeedleBatch:
  """Hides one fact at the given depth of each window and asks for it."""
  prompts, answers = [], []
  for window, depth in zip(windows, depths, strict=True):
    name, value = random_fact(rng)
    question = needle_question(name).encode()
    line = needle_line(name, value).encode()
    haystack = window[: len(window) - len(question)].copy()
    place = round(float(depth) * (len(haystack) - len(line)))
    haystack[place : place + len(line)] = np.frombuffer(line, np.uint8)
    prompts.append(
      np.concatenate([haystack, np.frombuffer(question, np.uint8)])
    )
    answers.append(np.frombuffer(value.encode(), np.uint8))
  return NeedleBatch(
    prompts=np.stack(prompts).astype(np.int32),
    answers=np.stack(answers).astype(np.int32),
    depths=np.asarray(depths, np.float32),
  )
