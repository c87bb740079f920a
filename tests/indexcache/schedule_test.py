# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import shlex
import types

import jax
import numpy as np
from absl.testing import absltest, parameterized

import indexcache_jax as ic
from tests.kernels import errors

ReuseSchedule = ic.ReuseSchedule

# IndexCache, arXiv 2603.12201, appendix B: name -> (layers, full layers,
# pattern).
PUBLISHED = {
  "30B 1/2": (47, 24, "FSFSFSSSSFSFFFFSFFSSFFSFFFSSFFSSFSSSSFSFFFSFSSF"),
  "30B 1/4": (47, 12, "FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS"),
  "30B 1/8": (47, 7, "FSSSFSSSSSSSSFSSSFSSSSSFSSSSFSSSSSSSSFSSSSSSSSS"),
  "GLM-5 1/2": (
    78,
    40,
    "FFSFSSSFSSFFFSSSFFFSFSSSSSSFFSFFSFFSSFFFFFFSFFFFFSFFSSSSSSFSFFFSFSSSFSFFSFF"
    "SSS",
  ),
  "GLM-5 1/4": (
    78,
    22,
    "FFSFSSSFSSFSFSSSSSSSFSSSSSSFSSSFSFSSSSFFFFFSSSFFSSSFSSSSSSSSFSSSFSSSSSSFSFS"
    "SSS",
  ),
}


class NotationsTest(parameterized.TestCase):
  @parameterized.parameters(
    ("F", ["full"]),
    ("FF", ["full", "full"]),
    ("FSSF", ["full", "shared", "shared", "full"]),
    ("FSFS", ["full", "shared", "full", "shared"]),
  )
  def test_pattern_and_list_are_read_and_written(self, pattern, names):
    schedule = ReuseSchedule.from_pattern(pattern)
    self.assertEqual(schedule.pattern, pattern)
    self.assertEqual(str(schedule), pattern)
    self.assertEqual(schedule.indexer_types, names)
    for read in (
      ReuseSchedule.from_pattern(pattern, len(pattern)),
      ReuseSchedule.from_indexer_types(names),
      ReuseSchedule.from_indexer_types(tuple(names), len(names)),
      ReuseSchedule(pattern),
    ):
      self.assertEqual(read, schedule)

  @parameterized.parameters(
    (1, 4, "F"),
    (4, 1, "FFFF"),
    (4, 4, "FSSS"),
    (5, 4, "FSSSF"),
    (8, 2, "FSFSFSFS"),
    (9, 4, "FSSSFSSSF"),
    (3, 10, "FSS"),
  )
  def test_uniform_is_full_at_multiples(self, num_layers, every, pattern):
    self.assertEqual(ReuseSchedule.uniform(num_layers, every).pattern, pattern)

  def test_uniform_is_one_in_four_by_default(self):
    self.assertEqual(ReuseSchedule.uniform(6).pattern, "FSSSFS")

  @parameterized.parameters(
    # layers, freq, offset: the engines' rule by hand.
    (12, 4, 2, "FFSSSFSSSFSS"),
    (11, 4, 3, "FFFSSSFSSSF"),
    (9, 4, 1, "FSSSFSSSF"),
    (6, 2, 2, "FFSFSF"),
    (6, 3, 4, "FFFFSS"),
    (5, 1, 2, "FFFFF"),
    (4, 1, 1, "FFFF"),
    (4, 9, 2, "FFSS"),
    (4, 4, 7, "FFFF"),
    (1, 4, 2, "F"),
  )
  def test_freq_is_the_rule_of_the_engines(
    self, num_layers, freq, offset, pattern
  ):
    schedule = ReuseSchedule.from_freq(num_layers, freq, offset)
    self.assertEqual(schedule.pattern, pattern)

  def test_freq_has_the_engines_default_offset(self):
    schedule = ReuseSchedule.from_freq(15, 4)
    self.assertEqual(schedule.full_layers, (0, 1, 5, 9, 13))
    self.assertEqual(schedule, ReuseSchedule.from_freq(15, 4, offset=None))

  def test_freq_is_not_the_uniform_rule(self):
    self.assertNotEqual(
      ReuseSchedule.from_freq(8, 4), ReuseSchedule.uniform(8, 4)
    )
    self.assertEqual(
      ReuseSchedule.from_freq(8, 4, offset=1), ReuseSchedule.uniform(8, 4)
    )

  def test_null_freq_is_all_full(self):
    self.assertEqual(ReuseSchedule.from_freq(5, None).pattern, "FFFFF")

  def test_glm_52(self):
    schedule = ReuseSchedule.from_freq(78, 4, offset=3)
    self.assertEqual((schedule.num_full, schedule.num_shared), (21, 57))
    self.assertEqual(
      schedule.full_layers,
      (0, 1, 2, 6, 10, *range(14, 78, 4)),
    )

  def test_all_full(self):
    schedule = ReuseSchedule.all_full(3)
    self.assertEqual(schedule.pattern, "FFF")
    self.assertEqual(schedule.retention, 1)

  def test_numpy_integers_are_integers(self):
    with errors.unchecked():
      schedule = ReuseSchedule.uniform(np.int64(5), np.int32(4))
      self.assertEqual(schedule.flip(np.argmax([0, 1])).pattern, "FFSSF")
      self.assertTrue(schedule.is_full(np.int64(4)))


class FromHfTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("nothing", {}, "FFFFFF"),
    ("freq", {"index_topk_freq": 3}, "FFSSFS"),
    (
      "freq_and_offset",
      {"index_topk_freq": 3, "index_skip_topk_offset": 3},
      "FFFSSF",
    ),
    ("offset_alone", {"index_skip_topk_offset": 3}, "FFFFFF"),
    ("pattern", {"index_topk_pattern": "FSSFSS"}, "FSSFSS"),
    (
      "pattern_as_list",
      {"index_topk_pattern": ["full", "shared"] * 3},
      "FSFSFS",
    ),
    ("list", {"indexer_types": ["full"] * 5 + ["shared"]}, "FFFFFS"),
    ("list_as_string", {"indexer_types": "FSSSFF"}, "FSSSFF"),
    (
      "list_before_pattern_and_freq",
      {
        "indexer_types": ["full", "shared"] * 3,
        "index_topk_pattern": "FSSSSS",
        "index_topk_freq": 3,
      },
      "FSFSFS",
    ),
    (
      "pattern_before_freq",
      {"index_topk_pattern": "FSSSSS", "index_topk_freq": 3},
      "FSSSSS",
    ),
    (
      "null_list_counts_as_absent",
      {"indexer_types": None, "index_topk_pattern": "FSSSSS"},
      "FSSSSS",
    ),
    (
      "null_list_and_pattern_count_as_absent",
      {"indexer_types": None, "index_topk_pattern": None, "index_topk_freq": 3},
      "FFSSFS",
    ),
    (
      "null_offset_is_the_default",
      {"index_topk_freq": 3, "index_skip_topk_offset": None},
      "FFSSFS",
    ),
    (
      "everything_null",  # GLM-5.1's config has a null freq.
      {
        "indexer_types": None,
        "index_topk_pattern": None,
        "index_topk_freq": None,
        "index_skip_topk_offset": None,
      },
      "FFFFFF",
    ),
  )
  def test_reads_in_the_precedence_of_the_engines(self, keys, pattern):
    schedule = ReuseSchedule.from_hf({"num_hidden_layers": 6, **keys})
    self.assertEqual(schedule.pattern, pattern)

  @parameterized.parameters("FSSF", "F", "FFSFSS")
  def test_reads_what_is_written_for_each_engine(self, pattern):
    schedule = ReuseSchedule.from_pattern(pattern)
    # The override wins over the frequency of the config that it overrides.
    base = {"num_hidden_layers": len(pattern), "index_topk_freq": 1}
    for override in (
      schedule.to_hf(),
      schedule.to_sglang(),
      schedule.to_vllm(),
    ):
      self.assertEqual(ReuseSchedule.from_hf(base | override), schedule)

  @parameterized.parameters(
    (None, "`num_hidden_layers` must be an integer above 0: got None"),
    (0, "`num_hidden_layers` .*got 0"),
    (True, "`num_hidden_layers` .*got True"),
    (4.0, r"`num_hidden_layers` .*got 4\.0"),
    ("4", "`num_hidden_layers` .*got '4'"),
  )
  def test_needs_the_number_of_layers(self, value, message):
    # A pattern alone does not say that it fits the model.
    with self.assertRaisesRegex(ValueError, message):
      ReuseSchedule.from_hf(
        {"num_hidden_layers": value, "index_topk_pattern": "FSSF"}
      )

  def test_names_an_absent_number_of_layers(self):
    with self.assertRaisesRegex(ValueError, "`num_hidden_layers`.*got None"):
      ReuseSchedule.from_hf({"index_topk_pattern": "FSSF"})

  @parameterized.parameters(
    ({"indexer_types": []}, r"`indexer_types` must be a list.*got \[\]"),
    ({"indexer_types": 3}, "`indexer_types` must be a list.*got 3"),
    ({"indexer_types": ["full"] * 3}, "got 3 letters .'FFF'. for num_layers=4"),
    ({"index_topk_pattern": ""}, "`pattern` .*got an empty one"),
    ({"index_topk_pattern": "FSSFS"}, "5 letters .'FSSFS'. for num_layers=4"),
    ({"index_topk_freq": 0}, r"`freq` \(index_topk_freq\) .*got 0"),
    ({"index_topk_freq": "4"}, "`freq` .*got '4'"),
    (
      {"index_topk_freq": 4, "index_skip_topk_offset": 0},
      r"`offset` \(index_skip_topk_offset\) .*got 0",
    ),
  )
  def test_a_bad_notation_says_which(self, keys, message):
    with (
      errors.unchecked(),
      self.assertRaisesRegex(ValueError, message),
    ):
      ReuseSchedule.from_hf({"num_hidden_layers": 4, **keys})


class ServingTest(parameterized.TestCase):
  def test_a_shared_layers_source_is_the_nearest_full_layer_before_it(self):
    schedule = ReuseSchedule.from_pattern("FSSFFSFS")
    self.assertEqual(schedule.source_layers, (0, 0, 0, 3, 4, 4, 6, 6))
    self.assertEqual(schedule.full_layers, (0, 3, 4, 6))
    self.assertEqual((schedule.num_layers, schedule.num_full), (8, 4))
    self.assertEqual((schedule.num_shared, schedule.retention), (4, 0.5))
    self.assertEqual(
      [schedule.is_full(layer) for layer in range(8)],
      [True, False, False, True, True, False, True, False],
    )

  def test_served_layers_are_itself_and_those_until_the_next_full_one(self):
    schedule = ReuseSchedule.from_pattern("FSSFFSFS")
    self.assertEqual(
      {layer: schedule.served_layers(layer) for layer in schedule.full_layers},
      {0: (0, 1, 2), 3: (3,), 4: (4, 5), 6: (6, 7)},
    )

  def test_a_shared_layer_serves_none(self):
    schedule = ReuseSchedule.from_pattern("FSSF")
    with self.assertRaisesRegex(
      ValueError, "got layer 2, shared in 'FSSF'; its source is layer 0"
    ):
      schedule.served_layers(2)

  @parameterized.parameters(
    (1, "FFSF"), (2, "FSFF"), (3, "FSSS"), (np.int64(3), "FSSS")
  )
  def test_flip_turns_one_layer_and_back(self, layer, pattern):
    schedule = ReuseSchedule.from_pattern("FSSF")
    with errors.unchecked():
      self.assertEqual(schedule.flip(layer).pattern, pattern)
      self.assertEqual(schedule.flip(layer).flip(layer), schedule)
    self.assertEqual(schedule.pattern, "FSSF")

  def test_layer_0_never_flips(self):
    with self.assertRaisesRegex(ValueError, "must begin with F.*got 'SSSF'"):
      ReuseSchedule.from_pattern("FSSF").flip(0)

  @parameterized.product(
    # Python's own -1 would be the last layer, and True layer 1.
    layer=(-1, -4, 4, True, 1.0),
    method=("is_full", "flip", "served_layers"),
  )
  def test_a_layer_that_does_not_exist(self, layer, method):
    schedule = ReuseSchedule.from_pattern("FSSF")
    with (
      errors.unchecked(),
      self.assertRaisesRegex(
        ValueError, f"`layer` must be one of the 4 layers, 0 to 3: got {layer}"
      ),
    ):
      getattr(schedule, method)(layer)


class ValueTest(absltest.TestCase):
  def test_equal_patterns_are_one_value(self):
    a = ReuseSchedule.uniform(4, 2)
    b = ReuseSchedule.from_indexer_types(["full", "shared"] * 2)
    # What is cached on one does not tell it from the other.
    self.assertEqual(a.source_layers, (0, 0, 2, 2))
    self.assertEqual(a, b)
    self.assertLen({a, b, ReuseSchedule("FSFF")}, 2)
    self.assertNotEqual(a, "FSFS")

  def test_is_frozen(self):
    with self.assertRaises(dataclasses.FrozenInstanceError):
      ReuseSchedule("F").pattern = "S"

  def test_is_a_static_argument_of_jit(self):
    traces = []

    @jax.jit(static_argnums=0)
    def count(schedule):
      traces.append(schedule)
      return schedule.num_full

    self.assertEqual(int(count(ReuseSchedule("FSFS"))), 2)
    self.assertEqual(int(count(ReuseSchedule.uniform(4, 2))), 2)
    self.assertLen(traces, 1)


class EnginesTest(absltest.TestCase):
  def test_overrides(self):
    schedule = ReuseSchedule.from_pattern("FSF")
    self.assertEqual(
      schedule.to_hf(), {"indexer_types": ["full", "shared", "full"]}
    )
    self.assertEqual(schedule.to_sglang(), {"index_topk_pattern": "FSF"})
    self.assertEqual(
      schedule.to_vllm(), {"use_index_cache": True, "index_topk_pattern": "FSF"}
    )

  def test_a_line_is_what_the_engine_parses(self):
    schedule = ReuseSchedule.uniform(78, 4)
    lines = schedule.engine_lines()
    self.assertCountEqual(lines, ["SGLang", "vLLM", "transformers"])
    for engine, flag, override in (
      ("SGLang", "--json-model-override-args", schedule.to_sglang()),
      ("vLLM", "--hf-overrides", schedule.to_vllm()),
    ):
      # As a shell splits it, then as the engine reads it.
      name, value = shlex.split(lines[engine])
      self.assertEqual(name, flag)
      self.assertEqual(json.loads(value), override)
    given = []
    config = types.SimpleNamespace(update=given.append)
    eval(lines["transformers"], {"config": config})
    self.assertEqual(given, [schedule.to_hf()])


class PublishedPatternsTest(parameterized.TestCase):
  @parameterized.parameters(*PUBLISHED)
  def test_counts(self, name):
    num_layers, num_full, pattern = PUBLISHED[name]
    schedule = ReuseSchedule.from_pattern(pattern, num_layers)
    self.assertEqual(schedule.num_full, num_full)
    self.assertEqual(schedule.num_shared, num_layers - num_full)
    # Every source is full, at or before its layer, with none in between.
    for layer, source in enumerate(schedule.source_layers):
      self.assertEqual(
        pattern[source : layer + 1], "F" + "S" * (layer - source)
      )
    served = [schedule.served_layers(layer) for layer in schedule.full_layers]
    self.assertEqual(sum(served, ()), tuple(range(num_layers)))

  @parameterized.parameters(
    ("30B 1/8", "30B 1/4"), ("30B 1/4", "30B 1/2"), ("GLM-5 1/4", "GLM-5 1/2")
  )
  def test_a_search_that_goes_on_keeps_what_it_shared(self, fewer, more):
    fewer, more = (
      set(ReuseSchedule(PUBLISHED[name][2]).full_layers)
      for name in (fewer, more)
    )
    self.assertLess(fewer, more)


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    ("SFFF", "must begin with F, since the first layer has no.*got 'SFFF'"),
    ("", "`pattern` must have one letter a layer: got an empty one"),
    ("FXSF", "'X' at layer 1 of 'FXSF'"),
    ("FSSf", "'f' at layer 3 of 'FSSf'"),
    ("FS F", "' ' at layer 2 of 'FS F'"),
    ("F,S,S,F", "',' at layer 1"),
    ("XSSF", "'X' at layer 0"),
    (None, "`pattern` must be a string of F and S: got None"),
    (7, "`pattern` must be a string of F and S: got 7"),
    (["F", "S"], r"got \['F', 'S'\].*`ReuseSchedule.from_indexer_types`"),
    (b"FS", "`pattern` must be a string of F and S: got b'FS'"),
  )
  def test_pattern(self, pattern, message):
    for read in (ReuseSchedule, ReuseSchedule.from_pattern):
      with (
        errors.unchecked(),
        self.assertRaisesRegex(ValueError, message),
      ):
        read(pattern)

  @parameterized.parameters(3, 5)
  def test_another_length_gives_both_numbers(self, num_layers):
    for read in (
      lambda: ReuseSchedule.from_pattern("FSSF", num_layers),
      lambda: ReuseSchedule.from_indexer_types(
        ["full", "shared", "shared", "full"], num_layers
      ),
    ):
      with self.assertRaisesRegex(
        ValueError, f"got 4 letters .'FSSF'. for num_layers={num_layers}"
      ):
        read()

  @parameterized.parameters(
    (["full", "sharde"], "'sharde' at layer 1"),
    (["full", "F"], "'F' at layer 1"),
    (["Full"], "'Full' at layer 0"),
    (["full", None], "None at layer 1"),
    (["full", ["shared"]], r"\['shared'\] at layer 1"),
    (["shared", "full"], "must begin with F"),
    ([], r"`indexer_types` must be a list .*got \[\]"),
    ("FSSF", "got 'FSSF'. For a string use `ReuseSchedule.from_pattern`"),
    ({"full": 1}, "`indexer_types` must be a list .*got {'full': 1}"),
    (None, "`indexer_types` must be a list .*got None"),
  )
  def test_indexer_types(self, names, message):
    with (
      errors.unchecked(),
      self.assertRaisesRegex(ValueError, message),
    ):
      ReuseSchedule.from_indexer_types(names)

  @parameterized.parameters(0, -4, True, False, 2.0, "2", float("nan"))
  def test_counts_are_positive_integers(self, count):
    shown = repr(count)
    for call, name in (
      (lambda: ReuseSchedule.all_full(count), "num_layers"),
      (lambda: ReuseSchedule.uniform(count), "num_layers"),
      (lambda: ReuseSchedule.uniform(4, count), "every"),
      (lambda: ReuseSchedule.from_freq(count, 4), "num_layers"),
      (lambda: ReuseSchedule.from_freq(4, count), "freq"),
      (lambda: ReuseSchedule.from_freq(4, 4, count), "offset"),
      (lambda: ReuseSchedule.from_pattern("F", count), "num_layers"),
    ):
      with (
        errors.unchecked(),
        self.assertRaisesRegex(ValueError, f"`{name}`.*: got {shown}"),
      ):
        call()

  def test_an_offset_of_0_says_what_it_would_do(self):
    with self.assertRaisesRegex(
      ValueError, "or layer 0 would be shared: got 0. Engines default to 2"
    ):
      ReuseSchedule.from_freq(8, 4, offset=0)


if __name__ == "__main__":
  absltest.main()
