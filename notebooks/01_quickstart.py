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
# # Index reuse in ten minutes
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/indexcache-jax/indexcache_jax/blob/main/notebooks/01_quickstart.ipynb)
#
# In DeepSeek Sparse Attention every layer has a **lightning indexer**: a small
# scorer that looks at all earlier tokens and keeps the best `index_topk` of
# them. Attention then reads only those. The indexer is cheap for each pair of
# tokens, but it looks at all pairs, so at long context it is what costs.
#
# [IndexCache](https://arxiv.org/abs/2603.12201) observes that layers often
# select much the same tokens. So some layers stay **full** (they run their
# indexer) and the others are **shared**: they reuse the selection of the
# nearest full layer before them. This notebook shows all of it on a small model
# that comes with the package.

# %% [markdown]
# ## Install
#
# Colab's images bring an older JAX. If this cell installs something, restart
# the runtime afterwards (Runtime, Restart session) and run it again; on a
# machine that has everything it does nothing.

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
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt

import indexcache_jax as ic
from indexcache_jax import analysis, costs, text

SMOKE = bool(os.environ.get("INDEXCACHE_SMOKE"))  # Small sizes, for CI.
print(jax.__version__, jax.devices()[0].device_kind)

# %% [markdown]
# ## A model
#
# 12 layers, bytes for tokens, trained on Python source. Each query may attend
# to 32 of up to 1024 earlier bytes: the proportions of 2048 of 65,536.

# %%
config, params = ic.load_checkpoint(ic.embedded_checkpoint(), progress=False)
print("pattern   ", config.schedule)
print("index_topk", config.index_topk, "of", config.max_position_embeddings)
print("indexer   ", config.index_n_heads, "heads x", config.index_head_dim)

# %% [markdown]
# ## Text, with and without reuse
#
# A schedule is a pattern, one letter a layer. `FSSFSSFSSSSS` runs 3 of 12
# indexers. Loading the checkpoint under it leaves the other nine indexers out
# of memory; `generate` then prefills and decodes with caches that hold index
# keys for the three full layers only.

# %%
files, held_out = text.split_files(text.standard_library_files())
source = text.load_tokens(held_out, text.encode_bytes)
prompt = source[300_000 : 300_000 + (128 if SMOKE else 512)]
reuse = ic.ReuseSchedule("FSSFSSFSSSSS")
print(text.decode_bytes(prompt[-200:]))

# %%
new_tokens = 8 if SMOKE else 80
for schedule in (config.schedule, reuse):
  cfg, weights = ic.load_checkpoint(
    ic.embedded_checkpoint(), schedule=schedule, progress=False
  )
  out = ic.generate(cfg, weights, [prompt.tolist()], max_new_tokens=new_tokens)
  print(f"--- {schedule}\n{text.decode_bytes(out[0])}\n")

# %% [markdown]
# ## Why it works: layers select much the same tokens
#
# The share of selected keys that two layers have in common, over queries that
# can see more than `index_topk` keys. At random it would be about 0.1 here.
# Layers 0, 2, 6, 10 and 11 agree; layers 3, 4 and 5 look elsewhere.

# %%
context = 256 if SMOKE else 1024
windows = text.spread_windows(source, 2, context)
overlap = analysis.model_overlap(config, params, [windows])
plt.figure(figsize=(5, 4))
plt.imshow(overlap, vmin=0, vmax=1)
plt.colorbar(label="share of selected keys in common")
plt.xlabel("layer whose selection is used")
plt.ylabel("layer that attends")
plt.show()

# %% [markdown]
# ## Which bytes did one token select?
#
# The last token of a window, layer by layer. Each dot is a selected key. Most
# are near (local context); some reach far back, and those are what a shared
# layer loses if its source layer did not need them.

# %%
_, aux = jax.jit(ic.SparseTransformer(config).apply)(
  {"params": params}, jnp.asarray(windows[:1])
)
plt.figure(figsize=(9, 3.2))
for layer, topk_indices in enumerate(aux.topk_indices):
  keys = np.asarray(topk_indices[0, -1])
  plt.plot(keys, np.full_like(keys, layer), ".", markersize=4)
plt.xlabel("key: position in the window")
plt.ylabel("layer")
plt.yticks(range(config.num_hidden_layers))
plt.gca().invert_yaxis()
plt.show()

# %% [markdown]
# The same token in layer 3, as text: its selected bytes in brackets, the last
# 400 bytes of the window.

# %%
selected = set(np.asarray(aux.topk_indices[3][0, -1]).tolist())
shown = range(context - min(400, context), context)
pieces = [text.decode_bytes([windows[0, s]]) for s in shown]
marked = [
  f"[{c}]" if s in selected else c for s, c in zip(shown, pieces, strict=True)
]
print("".join(marked))

# %% [markdown]
# ## What it saves
#
# Index keys are cached for full layers only. Here for our small model, then
# what the same rule means for GLM-5.2, whose published schedule has 21 full
# layers of 78, at 200,000 tokens.

# %%
for schedule in (config.schedule, reuse):
  cache = ic.init_cache(config.replace(schedule=schedule), 1, 1024)
  keys = sum(rows.nbytes for rows in cache.index_keys)
  print(f"{schedule}: index keys {keys / 2**20:.2f} MiB")

glm = ic.PRESETS["glm_5_2"]()
saved = costs.schedule_costs(glm, context=200_000)
print(f"GLM-5.2 at 200K: {saved.indexer_compute_removed:.0%} of the indexers'")
print(f"compute and {saved.index_key_bytes_removed:.0%} of the index keys gone")

# %% [markdown]
# Which layers should share? That is what `02_find_a_schedule` searches for.
