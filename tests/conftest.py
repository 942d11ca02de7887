"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import torch

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
settings.register_profile("fedlora", deadline=None)  # how long an example takes is the machine's business
settings.load_profile("fedlora")
