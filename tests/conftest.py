"""Settings for all tests."""

from __future__ import annotations

import importlib.util
import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import torch

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
settings.register_profile("fedlora", deadline=None)  # how long an example takes is the machine's business
settings.load_profile("fedlora")

# It lies apart (`make test-quantised`): where it is installed, every process that imports PEFT imports it, for seconds.
collect_ignore_glob = [] if importlib.util.find_spec("bitsandbytes") else ["test_*quantised*.py"]
