# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Generated long-context tasks: facts hidden in text, asked for at its end.

A model that selects the wrong keys can't answer, however fluent it is, so these
tasks show what a schedule loses where mean loss hides it. Every line is bytes
and looks like a comment of the program text around it:

  needle     # the code of abcd is 1234
  multi_key  the same among 15 facts of other names
  variables  # set abcd to 1234    and, further on,    # set efgh to abcd
  copying    # copy abcd: 16 random letters

The last line of a sequence is the beginning of such a line, for variables that
of "# the value of efgh is 1234", and the model completes it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
_NAME_LENGTH = 4
_VALUE_LENGTH = 4
_COPIED_LENGTH = 16
# The kind of a mixture's window that is left as it is.
TEXT = "text"


class Fact(NamedTuple):
  """What a window hides and asks for.

  Attributes:
    lines: hidden, in this order.
    question: the beginning of a line that the answer completes.
    answer: of one length in a task.
  """

  lines: tuple[str, ...]
  question: str
  answer: str

  @property
  def asked(self) -> str:
    """The question with its answer, a whole line."""
    return f"{self.question}{self.answer}\n"


@dataclasses.dataclass(frozen=True)
class Task:
  """A kind of fact.

  Attributes:
    name: of the task.
    draw: makes a fact of a generator and distinct names.
    num_names: that a fact takes.
    num_distractors: facts of other names that an evaluation hides beside the
      one that it asks for.
  """

  name: str
  draw: Callable[[np.random.Generator, Sequence[str]], Fact]
  num_names: int = 1
  num_distractors: int = 0

  def facts(self, rng: np.random.Generator, num_facts: int) -> list[Fact]:
    """Draws facts, no name of which occurs twice."""
    names = _distinct_names(rng, num_facts * self.num_names)
    size = self.num_names
    return [
      self.draw(rng, names[place : place + size])
      for place in range(0, len(names), size)
    ]


class TaskBatch(NamedTuple):
  """Sequences that end in a question, and their answers.

  Attributes:
    prompts: byte tokens, all of one length; the answer follows.
    answers: byte tokens of the answers.
    depths: place of the asked fact, 0 at the beginning and 1 at the end.
  """

  prompts: Int32[np.ndarray, "B T"]
  answers: Int32[np.ndarray, "B A"]
  depths: Float[np.ndarray, " B"]


def _code(rng, names):
  line = f"\n# the code of {names[0]} is "
  value = _word(rng, _DIGITS, _VALUE_LENGTH)
  return Fact((f"{line}{value}\n",), line, value)


def _variables(rng, names):
  value = _word(rng, _DIGITS, _VALUE_LENGTH)
  first, second = names
  lines = (f"\n# set {first} to {value}\n", f"\n# set {second} to {first}\n")
  return Fact(lines, f"\n# the value of {second} is ", value)


def _copying(rng, names):
  line = f"\n# copy {names[0]}: "
  value = _word(rng, _LETTERS, _COPIED_LENGTH)
  return Fact((f"{line}{value}\n",), line, value)


TASKS: Mapping[str, Task] = {
  task.name: task
  for task in (
    Task("needle", _code),
    Task("multi_key", _code, num_distractors=15),
    Task("variables", _variables, num_names=2, num_distractors=3),
    Task("copying", _copying, num_distractors=1),
  )
}


def parse_tasks(words: Sequence[str]) -> tuple[Task, ...]:
  """Returns the tasks of these names, each once.

  Raises:
    ValueError: a name that is no task's, or none.
  """
  unknown = [word for word in words if word not in TASKS]
  if unknown or not words:
    raise ValueError(
      f"`tasks` must name any of {', '.join(TASKS)}: got"
      f" {', '.join(map(repr, unknown)) or 'none'}."
    )
  return tuple(TASKS[word] for word in dict.fromkeys(words))


def training_window(
  task: Task,
  window: Int32[np.ndarray, " T"],
  rng: np.random.Generator,
  num_facts: int,
) -> Int32[np.ndarray, " T"]:
  """Overwrites parts of a window with facts and answered questions.

  A question lies anywhere behind its fact. Were all questions at the end, a
  model would learn to answer only there: one that did recalled every fact of
  8192 tokens and few of 4096.

  Raises:
    ValueError: the window is too short.
  """
  lines = [(*fact.lines, fact.asked) for fact in task.facts(rng, num_facts)]
  hidden = window.copy()
  starts = _slot_starts(task, window, hidden, lines)
  places = rng.choice(len(starts), _num_lines(lines), replace=False)
  _write(hidden, lines, starts[places])
  return hidden


def task_batch(
  task: Task,
  windows: Int32[np.ndarray, "B T"],
  rng: np.random.Generator,
  depths: Float[np.ndarray, " B"] | Sequence[float],
) -> TaskBatch:
  """Hides a fact at the given depth of each window and asks for it.

  Distractors, and the later lines of a fact of several, lie at random places,
  later lines behind the first.

  Raises:
    ValueError: a window is too short, or a depth does not lie in [0, 1].
  """
  depths = np.asarray(depths, np.float32)
  if not np.all((depths >= 0) & (depths <= 1)):
    raise ValueError(
      "`depths` must lie in [0, 1], 0 at a window's beginning: got"
      f" {depths.tolist()}."
    )
  pairs = [
    _prompt(task, window, rng, float(depth))
    for window, depth in zip(windows, depths, strict=True)
  ]
  prompts, answers = map(np.stack, zip(*pairs, strict=True))
  return TaskBatch(prompts, answers, depths)


def _prompt(task, window, rng, depth):
  asked, *others = task.facts(rng, 1 + task.num_distractors)
  question = _encode(asked.question)
  haystack = window[: max(len(window) - len(question), 0)].copy()
  lines = [asked.lines, *(fact.lines for fact in others)]
  starts = _slot_starts(task, window, haystack, lines)
  slots = np.arange(len(starts))
  first = round(depth * (len(slots) - len(asked.lines)))
  later = rng.choice(slots[first + 1 :], len(asked.lines) - 1, replace=False)
  own = np.array([first, *later], np.int64)
  rest = rng.choice(
    np.setdiff1d(slots, own), _num_lines(lines[1:]), replace=False
  )
  _write(haystack, lines, starts[np.concatenate([own, rest])])
  return np.concatenate([haystack, question]), _encode(asked.answer)


def check_mixture(mixture: Sequence[tuple[str, float]]) -> None:
  """Raises ValueError unless shares of known kinds, above 0, are given."""
  kinds = [kind for kind, _ in mixture]
  known = (TEXT, *TASKS)
  fits = all(kind in known and share > 0 for kind, share in mixture)
  if not mixture or not fits or len(set(kinds)) < len(kinds):
    words = ",".join(f"{kind}:{share:g}" for kind, share in mixture)
    raise ValueError(
      f"`mixture` must give shares above 0 to some of {', '.join(known)}, each"
      f" once: got {words!r}. For example text:2,needle:1."
    )


def parse_mixture(words: Sequence[str]) -> tuple[tuple[str, float], ...]:
  """Reads "needle:0.5"; a kind alone has a share of 1.

  Raises:
    ValueError: see `check_mixture`.
  """
  mixture = []
  for word in words:
    kind, _, share = word.partition(":")
    try:
      mixture.append((kind, float(share or 1)))
    except ValueError:
      mixture.append((word, 0.0))
  check_mixture(mixture)
  return tuple(mixture)


def mixed_window(
  window: Int32[np.ndarray, " T"],
  rng: np.random.Generator,
  mixture: Sequence[tuple[str, float]],
  density: float,
) -> Int32[np.ndarray, " T"]:
  """Returns a window of a kind that is drawn by its share in a mixture.

  Args:
    window: text.
    rng: draws the kind, then its facts.
    mixture: (kind, share) pairs, a task's name or `TEXT`; shares are relative.
    density: share of a task's window that facts and questions take, about.
  """
  shares = np.array([share for _, share in mixture])
  choice = rng.choice(len(mixture), p=shares / shares.sum())
  kind = mixture[int(choice)][0]
  if kind == TEXT:
    return window
  [example] = TASKS[kind].facts(np.random.default_rng(0), 1)
  size = len("".join(example.lines) + example.asked)
  num_facts = max(1, int(density * len(window) / size))
  return training_window(TASKS[kind], window, rng, num_facts)


def _slot_starts(task, window, haystack, lines):
  """Where a line can go: places that do not overlap, from end to end."""
  size = max(len(line) for fact in lines for line in fact)
  num_slots = len(haystack) // size
  if num_slots < _num_lines(lines):
    needed = _num_lines(lines) * size + len(window) - len(haystack)
    raise ValueError(
      f"A window of task {task.name!r} must hold its {len(lines)} facts and"
      f" what is asked, {needed} tokens or more: got {len(window)}. Use a"
      " longer context or fewer facts."
    )
  return np.linspace(0, len(haystack) - size, num_slots).astype(np.int64)


def _num_lines(lines):
  return sum(map(len, lines))


def _write(haystack, lines, places):
  """Writes each fact's lines, in order, at the places that come next."""
  done = 0
  for fact in lines:
    own = np.sort(places[done : done + len(fact)])
    done += len(fact)
    for line, place in zip(fact, own, strict=True):
      haystack[place : place + len(line)] = _encode(line)


def _encode(text) -> Int32[np.ndarray, " tokens"]:
  return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def _word(rng, alphabet, length):
  return "".join(alphabet[i] for i in rng.integers(0, len(alphabet), length))


def _distinct_names(rng, count):
  names: dict[str, None] = {}
  while len(names) < count:
    names[_word(rng, _LETTERS, _NAME_LENGTH)] = None
  return list(names)
