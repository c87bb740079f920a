# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Generates text from a checkpoint under a reuse schedule.

Claim: generation needs index keys for the full layers alone, so a schedule
takes the other layers' away; the text shows what it costs.

  python -m experiments.generate --schedule=FFFFFFFFSSSS --prompt='import os'

Expected on the embedded model, in 6 seconds on 2 CPU cores: 200 bytes of
Python-like text, several hundred tokens/s after compilation, and two thirds of
the index keys' bytes.
"""

import pathlib
import sys
import time
from typing import NoReturn

from absl import flags, logging

import indexcache_jax as ic
from experiments import common, inputs
from indexcache_jax import costs, generation, text

_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File with that text.")
flags.mark_flags_as_mutual_exclusive(["prompt", "prompt_file"])
_SCHEDULE = flags.DEFINE_string(
  "schedule",
  None,
  "A pattern such as FSSF, full, uniform:4, freq:4 or freq:4:3; default: the"
  " checkpoint's own.",
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 200, "Tokens to add.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.0, "0 takes the likeliest token.", lower_bound=0.0
)
_TOP_P = flags.DEFINE_float(
  "top_p",
  1.0,
  "Samples from the likeliest tokens that together have this probability.",
  upper_bound=1.0,
)
_CHUNK_SIZE = flags.DEFINE_integer(
  "chunk_size",
  None,
  "Tokens of a prefill chunk; default: all at once.",
  lower_bound=1,
)

_DEFAULT_PROMPT = "def main(argv):\n"


def main(argv):
  """Generates, and prints the text, its speed and the size of the cache."""
  common.reject_arguments(argv)
  logging.set_verbosity(logging.WARNING)
  try:
    model, prompt = load()
    num_new = 8 if inputs.SMOKE.value else _MAX_NEW_TOKENS.value
    check_fits(model.config, len(prompt), num_new)
    new_tokens = generate(model, prompt, num_new)
  except KeyboardInterrupt:
    interrupted("no text was generated")
  decode = text.load_decoder(model.path, model.config.vocab_size)
  print(f"{decode([*prompt, *new_tokens])}\n", flush=True)
  if len(new_tokens) < num_new:
    interrupted(f"{len(new_tokens)} of {num_new} tokens were generated")
  start = time.perf_counter()
  try:
    is_whole = len(generate(model, prompt, num_new)) == num_new
  except KeyboardInterrupt:
    is_whole = False
  if not is_whole:
    interrupted("the text is whole, its speed was not measured")
  seconds = time.perf_counter() - start
  print(
    f"{num_new / seconds:.1f} tokens/s: {num_new} after {len(prompt)} in"
    f" {seconds:.2f} s, prefill included and compiled before"
  )
  print(cache_table(model.config, len(prompt) + num_new))


def interrupted(unfinished: str) -> NoReturn:
  """Ends as any program does that Ctrl-C ends."""
  print(f"Interrupted: {unfinished}.", file=sys.stderr)
  sys.exit(130)


def load():
  """Returns the model under --schedule and the prompt's tokens."""
  schedule = None
  if _SCHEDULE.value is not None:
    config = ic.load_config(inputs.checkpoint_path())
    schedule = ic.ReuseSchedule.parse(_SCHEDULE.value, config.num_hidden_layers)
  model = inputs.load_model(schedule)
  content = _DEFAULT_PROMPT if _PROMPT.value is None else _PROMPT.value
  if _PROMPT_FILE.value is not None:
    try:
      content = pathlib.Path(_PROMPT_FILE.value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise ValueError(
        f"--prompt_file must be a file of text in UTF-8: got"
        f" {_PROMPT_FILE.value!r}, {error}."
      ) from error
  prompt = list(model.encode(content))
  if not prompt:
    raise ValueError(
      "--prompt or --prompt_file must hold text: got"
      f" {content!r}, which is no token."
    )
  return model, prompt


def check_fits(config, num_prompt, num_new):
  """Refuses what goes beyond the positions that the model was made for."""
  limit = config.max_position_embeddings
  if num_prompt + num_new > limit:
    raise ValueError(
      "--prompt and --max_new_tokens must fit in the model's"
      f" max_position_embeddings: got {num_prompt} + {num_new} tokens for"
      f" {limit}. Shorten the prompt or generate fewer tokens."
    )


def generate(model, prompt, num_new):
  """Returns the new tokens: fewer than `num_new` after Ctrl-C."""
  tokens = ic.generate(
    model.config,
    model.params,
    [prompt],
    max_new_tokens=num_new,
    temperature=_TEMPERATURE.value,
    top_p=_TOP_P.value,
    seed=inputs.SEED.value,
    chunk_size=_CHUNK_SIZE.value,
  )[0]
  return tokens[tokens != generation.NO_TOKEN]


def cache_table(config, num_tokens):
  """Cache bytes of a sequence with and without reuse, ready to print."""
  lines = [f"{'cache bytes':<14}{'latent':>14}{'index keys':>14}{'all':>14}"]
  for label, schedule in (
    ("without reuse", ic.ReuseSchedule.all_full(config.num_hidden_layers)),
    (f"{config.schedule.num_full} full layers", config.schedule),
  ):
    each = costs.schedule_costs(config, schedule, context=num_tokens)
    lines.append(
      f"{label:<14}"
      + "".join(
        f"{num_tokens * size:>14,}"
        for size in (
          each.kv_latent_bytes,
          each.index_key_bytes,
          each.cache_bytes,
        )
      )
    )
  return "\n".join(lines)


if __name__ == "__main__":
  common.run(main)
