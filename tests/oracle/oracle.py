# Copyright 2026 The indexcache_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What transformers computes; runs in the oracle's environment (Python 3.11).

  python -m tests.oracle.oracle cases.json output_folder

For every case it builds the model class, makes *all* parameters and buffers
non-trivial, saves a Hugging Face folder, and runs a float32 eager forward pass.
Beside the checkpoint it leaves `oracle.npz`:

  tokens: int [B, T].
  logits_LENGTH: float32 [B, LENGTH, V], a run on the first LENGTH tokens.
  topk_LENGTH: int32 [L, B, LENGTH, K], the *visible* keys of each layer's
    selection, ascending, then -1.

How transformers 5.17 does it, where that matters:

* Its indexer always returns `min(K, S)` keys: a query that sees fewer gets
  masked ones on top, which its eager mask then hides. They are dropped here.
* It multiplies by `index_head_dim**-0.5` before the ReLU and sums the heads by
  a matrix product: the same numbers in exact arithmetic, another rounding in
  float32. It has no Hadamard transform and no FP8 quantisation.
* The order of near ties is thus nobody's: two scores that differ by a rounding
  error may swap. `SMALLEST_GAP` bounds that: token batches with a smaller gap
  at any boundary of a selection (keys, experts, groups) are drawn anew. The
  choice reads the oracle alone, never our result.
* q_a_layernorm and kv_a_layernorm have eps 1e-6 whatever `rms_norm_eps` says.
* GLM's indexer RoPE is interleaved, `indexer_rope_interleave` is not read;
  DeepSeek's is half-split. DeepSeek's class has no index reuse.
"""

import contextlib
import json
import pathlib
import sys

import numpy as np
import torch
import transformers

from tests.oracle import draw

_CLASSES = {
  "glm_moe_dsa": (
    transformers.GlmMoeDsaConfig,
    transformers.GlmMoeDsaForCausalLM,
  ),
  "deepseek_v32": (
    transformers.DeepseekV32Config,
    transformers.DeepseekV32ForCausalLM,
  ),
}
# Of the largest score of the row; rounding errors are about 1e-6 of it.
SMALLEST_GAP = 1e-5
_MAX_DRAWS = 200


def make_case(case: draw.Case, folder: pathlib.Path) -> int:
  """Writes checkpoint and outputs of one case.

  Args:
    case: see `draw`.
    folder: to create.

  Returns:
    How many token batches were drawn until one had no near tie.
  """
  torch.manual_seed(case["seed"])
  model = _build(case["config"])
  _randomise(model, case["weight_scales"])
  arrays, num_draws = _draw_outputs(model, case)
  model.save_pretrained(folder)
  _rewrite_config(folder / "config.json", case["config"])
  np.savez_compressed(folder / "oracle.npz", **arrays)
  return num_draws


def _draw_outputs(model, case):
  """Arrays of the first token batch without a near tie, and its number."""
  gaps = []
  shape = (case["batch"], max(case["lengths"]))
  for draw_number in range(1, _MAX_DRAWS + 1):
    tokens = torch.randint(case["config"]["vocab_size"], shape)
    arrays = {"tokens": tokens.numpy().astype(np.int32)}
    gaps.clear()
    for length in case["lengths"]:
      with _record_gaps(gaps):
        logits, topk = _run(model, tokens[:, :length])
      arrays |= {f"logits_{length}": logits, f"topk_{length}": topk}
    if min(gaps) >= SMALLEST_GAP:
      return arrays, draw_number
  raise RuntimeError(
    f"case {case['name']}: each of {_MAX_DRAWS} token batches had a gap below"
    f" SMALLEST_GAP={SMALLEST_GAP} at the boundary of a selection; the last"
    f" had {min(gaps)}. Draw smaller models or shorter contexts."
  )


def _build(config):
  config_class, model_class = _CLASSES[config["model_type"]]
  arguments = {
    "attn_implementation": "eager",
    "experts_implementation": "eager",
    **{name: value for name, value in config.items() if name != "model_type"},
  }
  # Special tokens of the real vocabularies lie outside a tiny one.
  return model_class(
    config_class(bos_token_id=None, eos_token_id=None, **arguments)
  ).eval()


@torch.no_grad()
def _randomise(model, scales):
  """Norm scales, biases and the correction bias leave their trivial values."""
  tensors = dict(model.named_parameters())
  tensors |= {
    name: buffer
    for name, buffer in model.named_buffers()
    if name.endswith("e_score_correction_bias")
  }
  for name, tensor in tensors.items():
    if tensor.ndim > 1:
      is_embedding = "embed_tokens" in name
      tensor.normal_(std=1.0 if is_embedding else tensor.shape[-1] ** -0.5)
    elif name.endswith("norm.weight"):
      tensor.uniform_(0.4, 1.6)
    else:
      tensor.normal_(std=0.3)
    for part, factor in scales.items():
      if part in name:
        tensor.mul_(factor)


@torch.no_grad()
def _run(model, tokens):
  selections, handles = {}, []
  for number, layer in enumerate(model.model.layers):
    attention = layer.self_attn
    # GLM's attention hands on what it used, a shared layer its source's;
    # DeepSeek's only has an indexer to ask.
    shares = model.config.model_type == "glm_moe_dsa"

    def record(module, arguments, output, number=number, shares=shares):
      selections[number] = output[2] if shares else output

    module = attention if shares else attention.indexer
    handles.append(module.register_forward_hook(record))
  logits = model(input_ids=tokens, use_cache=False).logits
  for handle in handles:
    handle.remove()
  ordered = [selections[number].numpy() for number in sorted(selections)]
  return logits.numpy(), np.stack([_visible(topk) for topk in ordered])


def _visible(topk):
  """Keys `s <= t`, ascending, then -1."""
  length = topk.shape[1]
  is_visible = topk <= np.arange(length)[None, :, None]
  ordered = np.sort(np.where(is_visible, topk, length), axis=-1)
  return np.where(ordered == length, -1, ordered).astype(np.int32)


@contextlib.contextmanager
def _record_gaps(gaps):
  """Notes how far the first value left out is, at every top-k inside."""
  function, method = torch.topk, torch.Tensor.topk

  def recording(original):
    def topk(values, k, *args, **kwargs):
      gaps.append(_smallest_gap(values, k))
      return original(values, k, *args, **kwargs)

    return topk

  torch.topk, torch.Tensor.topk = recording(function), recording(method)
  try:
    yield
  finally:
    torch.topk, torch.Tensor.topk = function, method


def _smallest_gap(values, k):
  values = values.double()
  if k >= values.shape[-1]:
    return np.inf
  ordered = values.sort(dim=-1, descending=True).values
  is_open = ordered > torch.finfo(torch.float32).min / 2  # Else masked out.
  scale = torch.where(is_open, ordered.abs(), 0).amax(dim=-1)
  gap = (ordered[..., k - 1] - ordered[..., k]) / scale
  return torch.where(is_open[..., k], gap, torch.inf).min().item()


def _rewrite_config(path, given):
  """Keeps the notation of the schedule that the case gave, and that alone.

  transformers adds the list that it derives, which would hide our own reading
  of a pattern or of the frequency rule.
  """
  config = json.loads(path.read_text())
  for name in ("indexer_types", "index_topk_pattern", "index_topk_freq"):
    config.pop(name, None)
  config |= {
    name: value for name, value in given.items() if name != "rope_parameters"
  }
  path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def main(cases_path: str, output: str) -> None:
  """Runs all cases of a JSON file into folders of their names.

  Prints `oracle: NAME DRAWS` when a folder is complete; `parity.py` reads it.
  """
  torch.set_num_threads(1)
  transformers.utils.logging.disable_progress_bar()
  for case in json.loads(pathlib.Path(cases_path).read_text()):
    num_draws = make_case(case, pathlib.Path(output) / case["name"])
    print(f"oracle: {case['name']} {num_draws}", flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
