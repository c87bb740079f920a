# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import re

import numpy as np
from absl.testing import absltest, parameterized

from indexcache_jax import long_context_tasks, text

TASKS = long_context_tasks.TASKS
_VALUE = {
  "needle": re.compile("# the code of (?P<name>....) is (?P<value>.{4})"),
  "variables": re.compile("# set (?P<name>....) to (?P<value>.{4})"),
  "copying": re.compile("# copy (?P<name>....): (?P<value>.{16})"),
}
_VALUE["multi_key"] = _VALUE["needle"]
_QUESTION = _VALUE | {
  "variables": re.compile("# the value of (?P<name>....) is (?P<value>.{4})")
}


def windows(count, length):
  return np.full((count, length), ord("."), np.int32)


def look_up(values, name):
  """What a name stands for: another name is followed."""
  found = values[name]
  return look_up(values, found) if found in values else found


class TrainingWindowTest(parameterized.TestCase):
  @parameterized.parameters(*TASKS)
  def test_every_question_is_answered_by_a_fact_before_it(self, name):
    rng = np.random.default_rng(0)
    [window] = windows(1, 600)
    hidden = long_context_tasks.training_window(TASKS[name], window, rng, 4)
    self.assertLen(hidden, 600)
    content = text.decode_bytes(hidden)
    values, asked = {}, 0
    for line in content.split("\n"):
      question = _QUESTION[name].search(line)
      if question and (name == "variables" or question["name"] in values):
        self.assertEqual(look_up(values, question["name"]), question["value"])
        asked += 1
      elif fact := _VALUE[name].search(line):
        values[fact["name"]] = fact["value"]
    self.assertEqual(asked, 4)

  def test_a_question_lies_anywhere_behind_its_fact(self):
    rng = np.random.default_rng(0)
    places = []
    for window in windows(60, 1200):
      hidden = long_context_tasks.training_window(
        TASKS["needle"], window, rng, 1
      )
      found = _VALUE["needle"].finditer(text.decode_bytes(hidden))
      places.append([m.start() / 1200 for m in found])
    fact, question = np.array(places).T
    self.assertTrue(np.all(fact < question))
    self.assertLess(question.min(), 0.3)
    self.assertGreater(question.max(), 0.9)
    self.assertGreater(np.max(question - fact), 0.7)

  def test_text_is_left_where_nothing_is_written(self):
    window = np.arange(400, dtype=np.int32) % 200
    hidden = long_context_tasks.training_window(
      TASKS["needle"], window, np.random.default_rng(1), 2
    )
    self.assertGreater(np.sum(hidden == window), 250)

  def test_facts_must_fit(self):
    with self.assertRaisesRegex(
      ValueError, "'needle' must hold its 9 facts .* 504 tokens.*got 300"
    ):
      long_context_tasks.training_window(
        TASKS["needle"], windows(1, 300)[0], np.random.default_rng(0), 9
      )


class TaskBatchTest(parameterized.TestCase):
  @parameterized.parameters(*TASKS)
  def test_asks_for_the_fact_at_the_depth(self, name):
    depths = [0.0, 0.5, 1.0]
    batch = long_context_tasks.task_batch(
      TASKS[name], windows(3, 900), np.random.default_rng(0), depths
    )
    self.assertEqual(batch.prompts.shape, (3, 900))
    places = []
    for prompt, answer in zip(batch.prompts, batch.answers, strict=True):
      content = text.decode_bytes(prompt)
      matches = list(_VALUE[name].finditer(content))
      self.assertLen(
        matches,
        (1 + TASKS[name].num_distractors) * TASKS[name].num_names,
      )
      values = {m["name"]: m["value"] for m in matches}
      asked = content.rsplit("\n", 1)[1]
      asked_name = re.search("(?:of|copy) ([a-z]{4})", asked)[1]
      value = text.decode_bytes(answer)
      self.assertEqual(look_up(values, asked_name), value)
      places.append(
        next(m.start() for m in matches if m["value"] == value) / len(content)
      )
    self.assertLess(places[0], 0.01)
    self.assertBetween(places[1], 0.4, 0.6)
    self.assertGreater(places[2], 0.85)

  def test_a_needle_lies_at_both_ends_exactly(self):
    batch = long_context_tasks.task_batch(
      TASKS["needle"], windows(2, 200), np.random.default_rng(0), [0.0, 1.0]
    )
    places = [
      text.decode_bytes(prompt).index("\n# the code of")
      for prompt in batch.prompts
    ]
    self.assertEqual(places, [0, 200 - 23 - 28])

  def test_depths(self):
    with self.assertRaisesRegex(ValueError, r"`depths` .*\[0, 1\].*got \[1.5"):
      long_context_tasks.task_batch(
        TASKS["needle"], windows(1, 200), np.random.default_rng(0), [1.5]
      )


class FactsTest(absltest.TestCase):
  def test_no_name_twice(self):
    facts = TASKS["variables"].facts(np.random.default_rng(0), 500)
    names = [
      word
      for fact in facts
      for word in re.findall(r"set (\w+)", "".join(fact.lines))
    ]
    self.assertLen(set(names), 1000)

  def test_deterministic(self):
    first, second = (
      TASKS["copying"].facts(np.random.default_rng(5), 3) for _ in range(2)
    )
    self.assertEqual(first, second)


class MixtureTest(absltest.TestCase):
  def test_shares(self):
    mixture = long_context_tasks.parse_mixture(["text:3", "needle"])
    self.assertEqual(mixture, (("text", 3.0), ("needle", 1.0)))
    rng = np.random.default_rng(0)
    [window] = windows(1, 1024)
    counts = []
    for _ in range(400):
      mixed = long_context_tasks.mixed_window(window, rng, mixture, 0.25)
      self.assertLen(mixed, 1024)
      counts.append(text.decode_bytes(mixed).count("# the code of"))
    # A quarter of 1024 bytes is 4 facts of 56, each hidden and asked for.
    self.assertEqual(set(counts), {0, 8})
    self.assertBetween(np.mean(np.array(counts) > 0), 0.18, 0.32)

  def test_refuses(self):
    for words in (
      [],
      ["prose"],
      ["needle:0"],
      ["needle:x"],
      ["text:1", "text:2"],
      ["text:nan"],
    ):
      with self.assertRaisesRegex(
        ValueError, "`mixture` must give shares .*text, needle, .*got"
      ):
        long_context_tasks.parse_mixture(words)

  def test_task_names(self):
    tasks = long_context_tasks.parse_tasks(["copying", "needle", "copying"])
    self.assertEqual([task.name for task in tasks], ["copying", "needle"])
    for words, message in ((["foo"], "got 'foo'"), ([], "got none")):
      with self.assertRaisesRegex(ValueError, f"`tasks` .*{message}"):
        long_context_tasks.parse_tasks(words)


if __name__ == "__main__":
  absltest.main()
