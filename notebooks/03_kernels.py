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
# # The kernels alone
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/indexcache-jax/indexcache_jax/blob/main/notebooks/03_kernels.ipynb)
#
# `pallas_kernels` has the two steps of sparse attention as functions of arrays,
# for a model of your own: `indexer_topk` scores all visible keys and selects
# the best k, exactly; `sparse_mla` attends to those rows and no others. Neither
# ever holds an array of queries times keys.

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
import time

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels

device = jax.devices()[0]
print(jax.__version__, device.device_kind)

# %% [markdown]
# ## Inputs
#
# One sequence, the last `T` of `S` tokens as queries. The indexer has 32 heads
# and one key a token; attention reads one latent row a token, which all heads
# share. On an accelerator the sizes are those of GLM-5 at 32K tokens.

# %%
is_small = device.platform == "cpu"
T, S, K = (64, 2048, 128) if is_small else (1024, 32768, 2048)
dtype = jnp.float32 if is_small else jnp.bfloat16
heads, width, value_dim = 16, 576, 512
keys = iter(jax.random.split(jax.random.key(0), 5))

index_q = jax.random.normal(next(keys), (1, T, 32, 128), dtype)
index_k = jax.random.normal(next(keys), (1, S, 128), dtype)
weights = jax.random.normal(next(keys), (1, T, 32)) / 64
query = jax.random.normal(next(keys), (1, T, heads, width), dtype)
latent = jax.random.normal(next(keys), (1, S, width), dtype)
key_end = jnp.arange(S - T + 1, S + 1, dtype=jnp.int32)[None]
key_start = jnp.zeros_like(key_end)

# %% [markdown]
# ## Select, attend
#
# Query t sees keys `key_start[t] <= s < key_end[t]`: causality, padding and
# packed segments are all such bounds. Indices come back ascending; where fewer
# than k keys are visible, -1 fills the end of the row, and `sparse_mla` skips
# it.


# %%
@jax.jit
def select(index_q, index_k, weights):
  return pallas_kernels.indexer_topk(
    index_q, index_k, weights, key_start, key_end, k=K
  )


@jax.jit
def attend(query, latent, topk_indices):
  return pallas_kernels.sparse_mla(
    query, latent, topk_indices, scale=width**-0.5, value_dim=value_dim
  )


topk_indices = select(index_q, index_k, weights)
out = attend(query, latent, topk_indices)
print(topk_indices.shape, topk_indices[0, 0, :6], out.shape, out.dtype)

# %% [markdown]
# ## Check one query against NumPy in float64
#
# The scores of the last query, its best k keys, and attention over them.

# %%
wide = [np.asarray(x[0], np.float64) for x in (index_q, index_k, weights)]
scores = np.maximum(wide[0][-1] @ wide[1].T, 0)
scores = wide[2][-1] @ scores
best = np.sort(np.argsort(-scores, kind="stable")[:K])
chosen = np.asarray(topk_indices[0, -1])
print("same keys:", np.array_equal(best, chosen))

rows = np.asarray(latent[0], np.float64)[chosen]
logits = np.asarray(query[0, -1], np.float64) @ rows.T * width**-0.5
probs = np.exp(logits - logits.max(-1, keepdims=True))
probs /= probs.sum(-1, keepdims=True)
expected = probs @ rows[:, :value_dim]
error = np.abs(np.asarray(out[0, -1], np.float64) - expected).max()
print("largest error of the output:", error)

# %% [markdown]
# ## How fast, and of what?
#
# Two ceilings measured right here, a large matrix product and a large copy;
# then each op, as a share of the one that bounds it: the indexer multiplies,
# attention gathers. `implementation=None` takes the best that the platform has
# and says in the log what that is; `"xla"` is the plain reference.


# %%
def seconds(function, *args, runs=5):
  jax.block_until_ready(function(*args))
  times = []
  for _ in range(runs):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append(time.perf_counter() - start)
  return float(np.median(times))


n = 1024 if is_small else 8192
square = jax.random.normal(jax.random.key(1), (n, n), dtype)
flops = 2 * n**3 / seconds(jax.jit(lambda x: x @ x), square)
big = jnp.zeros((1 << 26 if is_small else 1 << 30,), jnp.uint8)
bandwidth = 2 * big.nbytes / seconds(jax.jit(lambda x: x + 1), big)
print(f"product {flops / 1e12:.2f} TFLOP/s, copy {bandwidth / 1e9:.0f} GB/s")


# %%
def timed(op, implementation, *args, **kwargs):
  run = jax.jit(lambda *a: op(*a, implementation=implementation, **kwargs))
  return seconds(run, *args)


indexer_args = (index_q, index_k, weights, key_start, key_end)
mla_args = (query, latent, topk_indices)
mla = {"scale": width**-0.5, "value_dim": value_dim}
work = 2 * T * S * 32 * 128
gathered = T * K * width * latent.dtype.itemsize
for name in (None, "xla"):
  t = timed(pallas_kernels.indexer_topk, name, *indexer_args, k=K)
  print(f"indexer_topk {name}: {1e3 * t:.2f} ms, {work / t / flops:.0%}")
  t = timed(pallas_kernels.sparse_mla, name, *mla_args, **mla)
  print(
    f"sparse_mla   {name}: {1e3 * t:.2f} ms, {gathered / t / bandwidth:.0%}"
  )

# %% [markdown]
# ## Train through it
#
# Selection has no gradient; attention has one for queries and rows, and
# `selected_indexer_scores` one for the indexer, which learns from the attention
# of the layers that it serves (`indexcache_jax.distillation`).

# %%
gradient = jax.jit(
  jax.grad(lambda q, kv: jnp.sum(attend(q, kv, topk_indices) ** 2), (0, 1))
)
print([g.shape for g in gradient(query, latent)])

# %% [markdown]
# ## A tile choice for a new chip
#
# Each lowering is one file in its op's folder, with its sizes in a small
# `Tiles` record and a pure function that chooses them:
#
# - TPU: `pallas_kernels/*/mosaic_tpu.py`. Change the choice, then `make
#   tpu-compile` asks the real compiler whether it fits and `make tpu-cost` what
#   it costs, both without a TPU; keep the better one with its figure.
# - GPU: `pallas_kernels/*/mosaic_gpu.py`. `make gpu-compile` asks ptxas, no
#   GPU needed, whether it compiles for Hopper without a spill; `python -m
#   experiments.bench_kernels` times it on one.
#
# The op's test class then runs on the device: `python -m
# tests.kernels.topk_test`.
