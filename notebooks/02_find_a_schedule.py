# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Find a reuse schedule for a checkpoint
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/indexcache-jax/indexcache_jax/blob/main/notebooks/02_find_a_schedule.ipynb)
#
# Sharing every second layer's selection sounds natural, and it costs far more
# than it must: some layers can't do without their own indexer. The paper's
# **greedy search** asks the model. From all full, it shares the layer whose
# sharing raises the loss least, again and again. No training, only forward
# passes on a little calibration text.

# %%
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("indexcache_jax") is None:
  on_tpu = "TPU_NAME" in os.environ or "COLAB_TPU_ADDR" in os.environ
  on_gpu = os.path.exists("/dev/nvidia0")
  extra = "[tpu]" if on_tpu else "[cuda]" if on_gpu else ""
  source = "git+https://github.com/indexcache-jax/indexcache_jax"
  package = f"indexcache_jax{extra} @ {source}"
  subprocess.run([sys.executable, "-m", "pip", "install", package], check=True)
  print("Installed. Now restart the runtime and run this cell again.")

# %%
import fractions

import jax
from matplotlib import pyplot as plt
from tqdm import auto as tqdm

import indexcache_jax as ic
from indexcache_jax import comparison, methods, text

SMOKE = bool(os.environ.get("INDEXCACHE_SMOKE"))  # Small sizes, for CI.
print(jax.__version__, jax.devices()[0].device_kind)

# %% [markdown]
# ## Checkpoint and text
#
# Put the path of a Hugging Face folder here (DeepSeek-V3.2, GLM-5, 5.1: a model
# with an indexer in every layer), or keep the small model of the package. The
# text should be like what you serve; the sequences must be longer than
# `index_topk`, or every schedule selects all keys.

# %%
CHECKPOINT = ic.embedded_checkpoint()
CONTEXT, SEQUENCES = (128, 1) if SMOKE else (512, 6)

config, params = ic.load_checkpoint(CHECKPOINT, progress=False)
encode = text.load_encoder(CHECKPOINT, config.vocab_size)
calibration_files, held_out_files = text.split_files(
  text.standard_library_files()
)


def batch(files):
  tokens = text.load_tokens(files, encode)
  return text.spread_windows(tokens, SEQUENCES, CONTEXT)[None]


# %% [markdown]
# ## Search
#
# `LayerwiseLoss` keeps the activations below the layer in question, so a
# candidate costs only the layers above it: the same numbers as whole forward
# passes, with about two thirds of the work.

# %%
loss_fn = ic.LayerwiseLoss(config, params, batch(calibration_files))
num_layers = config.num_hidden_layers
bar = tqdm.tqdm(unit="loss")


def show(state):
  bar.total = state.evaluations_bound
  bar.update(state.evaluations - bar.n)


num_shared = 2 if SMOKE else 10
search = ic.greedy_search(
  loss_fn, num_layers=num_layers, num_shared=num_shared, on_evaluation=show
)
bar.close()

# %% [markdown]
# One search serves every retention: its steps are nested. The first flips are
# nearly free, the last ones are not.

# %%
for step in search.trace:
  print(f"share {step.layer:2d} -> {step.pattern}  loss {step.loss:.4f}")

# %% [markdown]
# ## Against the rules
#
# The paper's uniform rule, the rule that engines apply for `index_topk_freq`
# (which keeps layers 0 and 1), and the search, on text that none of them saw.

# %%
problem = methods.SearchProblem(
  loss_fn=loss_fn,
  num_layers=num_layers,
  state=ic.SearchState(num_layers, num_shared, losses=search.losses),
)
kept = [1] if SMOKE else [fractions.Fraction(n, 12) for n in (9, 6, 4, 3, 2)]
names = ("uniform", "uniform_freq", "greedy")
rows = list(
  comparison.compare(
    {name: ic.METHODS[name] for name in names},
    lambda name: problem,
    kept,
    ic.LayerwiseLoss(config, params, batch(held_out_files)),
  )
)

# %%
for name in names:
  mine = [row for row in rows if row.method == name]
  shares = [row.schedule.retention for row in mine]
  plt.plot(shares, [row.loss for row in mine], "o-", label=name)
plt.axhline(rows[0].loss - rows[0].loss_delta, ls="--", c="k", label="all full")
plt.xlabel("share of indexers kept")
plt.ylabel("held-out loss (nats a token)")
plt.legend()
plt.show()

# %% [markdown]
# ## Take it with you
#
# The fewest indexers whose loss grows by at most 5 %, and what to type into
# each engine. For a large model 1 % or less is a better limit.

# %%
best, within = comparison.recommend(rows, max_loss_increase=0.05)
print(best.schedule, f"{best.loss_delta:+.4f}", "within" if within else "above")
for engine, line in best.schedule.engine_lines().items():
  print(f"{engine}: {line}")

# %% [markdown]
# ## The same for a large checkpoint
#
# ```
# python -m experiments.sweep_schedules --checkpoint=DIR --dtype=bfloat16 \
#   --text='corpus/*.txt' --context=65536 --calibration_tokens=1048576
# ```
#
# It spreads the parameters over all devices, saves the search after every
# evaluation (run the same command again after an interruption), and writes
# tables, pictures and a `report.json`.
