# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What does a privacy budget buy?
#
# Four hospitals, or four departments, fine-tune one classifier together, each under record-level differential privacy
# against everybody else, the server included. This notebook asks what an epsilon costs in accuracy, what it protects
# from, and how the same budget is spent best. All runs go through `flwr run`; cells read the run folders that they
# leave.
#
# Run it with `FAST = True` in three or four minutes on two CPU cores, to see that it works: its figures show two
# strategies after one round, and mean little. The outputs below are those of the study, 100 runs and 768 models to
# attack: `FAST=False WORKERS=20 jupyter execute --inplace notebooks/privacy_budget.ipynb`, in a quarter of an hour on
# two H200s. What it found is at the end.

# %%
# %matplotlib inline
import os
import warnings
from pathlib import Path

import pandas as pd
import tqdm

warnings.simplefilter("ignore", tqdm.TqdmWarning)  # that there are no widgets for progress bars

from fedlora.privacy.accounting import Use
from fedlora.reports import frames, privacy_plots
from simulations import budget
from simulations.advice import learns_from
from simulations.api import plan, run, sweep
from simulations.membership import membership

FAST = os.environ.get("FAST", "True") == "True"
WORKERS = int(os.environ.get("WORKERS", "1"))  # sweeps side by side; several may share a large GPU
FOLDER = Path(os.environ.get("RUNS", "../runs"), "privacy-budget-fast" if FAST else "privacy-budget").resolve()

# %% [markdown]
# ## The data: change this cell for your own
# Empty: the built-in texts, sentences from the documentation of eight Python libraries, to be told apart. For a file
# of yours: `DATA = {"data.name": "file", "data.path": "letters.csv", "data.text-column": "text", "data.label-column":
# "label"}`, and `ROWS`, the training rows that each of the clients declares to have.

# %%
DATA: dict[str, object] = {}
CLIENTS, ROWS = 4, 400

COMMON = {
    **DATA,
    "federation.num-clients": CLIENTS,
    "data.partition": "iid",
    "train.max-length": 32,
    "engine.compile": False,  # runs of seconds do not repay compiling
}
PRIVATE = {  # plain SGD: AdamW would blow noise up to full steps; large batches leave the most signal
    **COMMON,
    "privacy.mode": "dp",
    "privacy.client-size": ROWS,
    "train.optimizer": "sgd",
    "rounds": 1 if FAST else 15,
    "train.local-steps": 1 if FAST else 2,
    "train.batch-size": 40 if FAST else 200,
}
STRATEGIES = ["fedavg", "ffa-lora"] if FAST else ["fedavg", "ffa-lora", "fedsvd", "mos", "s2-lora"]
EPSILONS = [8.0] if FAST else [1.0, 2.0, 4.0, 8.0]
SEEDS = [0] if FAST else [0, 1, 2]

# %% [markdown]
# ## Who sees what
# The unit is one row. A client clips each row's gradient and adds noise before anything leaves, so the guarantee
# holds against the server as well; it adds up over all rounds in the client's own ledger. What it does not cover is
# written in the picture, and at length in `docs/privacy.md`.

# %%
privacy_plots.draw_trust()

# %% [markdown]
# ## What will it cost? Before any training
# The noise multiplier is the noise's deviation in clips. It is what an epsilon is paid in: the smaller the epsilon,
# and the more often a row is sampled, the more noise.

# %%
planned = plan({**PRIVATE, "strategy.name": "ffa-lora", "privacy.epsilon": 8.0})
spent = planned.privacy
DELTA = planned.config.privacy.delta
CONDITIONS = privacy_plots.conditions_line(planned.config)
targets, rates = ([1, 8], [0.1, 1.0]) if FAST else ([0.5, 1, 2, 4, 8], [0.01, 0.1, 0.5, 1.0])
noise = budget.noise_by_epsilon(targets, rates, steps=spent.steps, delta=DELTA)
privacy_plots.draw_noise(noise, CONDITIONS)

# %% [markdown]
# The inverse question: what does a budget of 8 buy with more rounds, or with larger batches? Signal to noise compares
# the sum of a client's gradients, at best, with the noise on it; runs of this
# strategy on SST-2 learned from 1.6 on, on other texts it may be less.

# %%
schedules = budget.schedules(
    planned,
    rounds=[2, 15] if FAST else [2, 5, 15, 50],
    batch_sizes=[40, ROWS] if FAST else [40, 200, ROWS],
    clients=[1, 4, 16, 64],
)
privacy_plots.draw_schedules(schedules, CONDITIONS, learns_from=learns_from(planned.config))

# %% [markdown]
# And with more clients: their noises are independent, so the mean over them has less. That helps the model, not the
# guarantee.

# %%
privacy_plots.draw_schedules(schedules, CONDITIONS, across="clients")

# %% [markdown]
# Accountants compute an upper bound of epsilon from the same ledger. PLD and PRV are close to the truth; RDP is
# looser. The central limit of Gaussian DP is no bound: here, for a thousand steps of one row in a hundred, it says less
# than was spent.

# %%
use = Use(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
frame = budget.accountants(use, delta=1e-5, points=3 if FAST else 10)
conditions = privacy_plots.conditions_line(planned.config, delta=1e-5, accountants="as named")
privacy_plots.draw_accountants(frame, conditions)

# %% [markdown]
# ## Accuracy by epsilon
# Without privacy clients use AdamW and small batches, as they would. Learning rates are those that the project found
# on public text. The spread is the standard deviation over seeds, each of which draws partition, start and noise.

# %%
private = sweep(
    "private",
    PRIVATE,
    {"strategy.name": STRATEGIES, "privacy.epsilon": EPSILONS, "seed": SEEDS},
    folder=FOLDER,
    workers=WORKERS,
)
free = sweep(
    "free",
    {**COMMON, "rounds": PRIVATE["rounds"], "train.batch-size": 16, **({"train.local-steps": 4} if FAST else {})},
    {"strategy.name": STRATEGIES[:1] if FAST else STRATEGIES, "seed": SEEDS},
    folder=FOLDER,
    workers=WORKERS,
)
groups = pd.concat([private.groups, free.groups.assign(**{"privacy.epsilon": 0.0})], ignore_index=True)
columns = ["strategy.name", "privacy.epsilon", "n", "test_accuracy_mean", "test_accuracy_std"]
groups.reindex(columns=columns).round(3)

# %%
privacy_plots.draw_utility(groups, "test_accuracy", CONDITIONS, chance=max(free.results["majority_share"]))

# %% [markdown]
# ## Epsilon by round and client
# Here a round takes half of the clients, drawn by the seed, and the noise was chosen for fewer rounds than there are.
# A client whose budget does not pay for another round stops, and the others go on.

# %%
few = {"rounds": 3 if FAST else 12, "train.batch-size": 20 if FAST else 100, "privacy.epsilon": 3.0}
stopping = run(
    "stopping",
    {
        **PRIVATE,
        **few,
        "strategy.name": "ffa-lora",
        "train.local-steps": 1,
        "privacy.noise-multiplier": 0.6 if FAST else 1.6,
        "federation.num-clients": CLIENTS if FAST else 8,
        "privacy.client-size": ROWS if FAST else ROWS // 2,
        "federation.clients-per-round": 2 if FAST else 4,
        "federation.failure-threshold": 0.9,
    },
    folder=FOLDER,
)
spending = frames.spending_frame(stopping)
privacy_plots.draw_spending(spending, 3.0, privacy_plots.conditions_line(stopping.config))

# %% [markdown]
# ## Clipping, and signal to noise
# These numbers are measured on single rows, and no guarantee covers them: in a deployment they stay at the client,
# and this notebook may show them because it simulates the clients. Nearly all rows clipped: the clip is small beside
# the gradients, and sets the length of steps together with the learning rate.

# %%
largest = [one for one in private.runs if one.config.privacy.epsilon == EPSILONS[-1] and one.config.seed == SEEDS[0]]
privacy_plots.draw_diagnostics(frames.diagnostics_frame(largest))

# %% [markdown]
# ## One budget, spent in other ways
# Of eight clients with 200 rows each, at an epsilon of 4: more rounds, larger batches, or more clients a round.

# %%
if not FAST:
    ways = sweep(
        "ways",
        {
            **PRIVATE,
            "strategy.name": "ffa-lora",
            "federation.num-clients": 8,
            "privacy.client-size": ROWS // 2,
            "privacy.epsilon": 4.0,
            "train.local-steps": 1,
        },
        {
            "rounds": [6, 24],
            "train.batch-size": [50, 200],
            "federation.clients-per-round": [2, 8],
            "seed": SEEDS,
        },
        folder=FOLDER,
        workers=WORKERS,
    )
    display(privacy_plots.draw_cells(ways.groups, "test_accuracy", CONDITIONS))

# %% [markdown]
# ## What an attacker finds out
# Many clients train for one round, each on a random half of the same rows. An attacker who knows a row asks: was it
# in? Two are tried: one has the adapter that a client releases and compares how the model does on the row with how
# models do that have not seen it (a likelihood ratio, Carlini et al. 2022); the other is the server, which compares
# the update with the row's gradient. The figure shows the share of the training rows that each names, where one in a
# hundred of the others is named wrongly. The over-fitted training shows that the attacks work where they should; the
# bars show the most that any attacker could do under that epsilon.

# %%
whole = {**planned.config.to_flat(), "strategy.name": "fedavg", "privacy.mode": "none", "privacy.epsilon": 0.0}
whole |= {"privacy.noise-multiplier": 0.0, "privacy.delta": 0.0, "privacy.client-size": 0, "train.learning-rate": 0.0}
models, rows = (12, 20) if FAST else (128, 200)
free_step = {"train.optimizer": "adamw", "train.batch-size": 8 if FAST else 16}
dp_step = {"privacy.mode": "dp", "train.batch-size": rows // 2, "train.local-steps": 2 if FAST else 20}
trainings = {
    "over-fitted": {**free_step, "train.local-steps": 10 if FAST else 400},
    "without DP": {**free_step, "train.local-steps": 2 if FAST else 40},
    **{f"epsilon {epsilon:g}": {**dp_step, "privacy.epsilon": epsilon} for epsilon in EPSILONS},
}
attacked = membership([{**whole, **own} for own in trainings.values()], models=models, rows=rows)
named = pd.concat(
    [one.frame().assign(training=name) for name, one in zip(trainings, attacked, strict=True)], ignore_index=True
)
named[["training", "attack", "named", "named_at_most", "area", "loss_seen", "loss_not_seen"]].round(3)

# %%
privacy_plots.draw_membership(named, privacy_plots.conditions_line(attacked[-1].config))

# %% [markdown]
# ## What the study found
# - **Which strategy** is worth as much as a factor of four in epsilon: `ffa-lora` at 2 (0.49) does what `fedavg` does
#   at 8 (0.47). Without privacy the order is nearly turned round: `fedavg` 0.77, `ffa-lora` 0.73.
# - **At an epsilon of 1** with 400 rows a client nothing but `ffa-lora` and `s2-lora` is clearly above chance.
# - **One budget** goes furthest over many rounds with large batches and all clients: 0.54, against 0.16 for few rounds,
#   small batches and two clients a round. Each of the three helps by itself.
# - **Clients that stop** take what they know with them: the federation above was at 0.30 after six rounds, and at 0.18
#   after eight, when one client was left. Choose the noise for the rounds that there are.
# - **Attacks**: without DP the released adapter gives away 47 % of the training rows at 1 % false ones, over-fitted
#   60 %; at an epsilon of 8 it is 1.5 %, of 1 the 1.0 % of a blind guess. An epsilon of 8 allows far more than these
#   attacks find. The bound is for the worst row and the best attacker.
# - **Every row was clipped** in every round: the clip of 1 is small beside these gradients, and sets the step's length.
#
# ## Where to go on
# `docs/choosing-epsilon.md` walks from a question to a configuration; `fedlora audit --statistical` attacks the code
# of this installation, to see that it does what its epsilon assumes.
