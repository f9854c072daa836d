"""One thread per process (tests may run side by side), no network, no colours; tests of identities can be chosen."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NO_COLOR", "1")

import hypothesis
import torch
from identities import add_options as pytest_addoption
from identities import configure as pytest_configure

# the same examples in every run: a failure is one of the change, not of the draw; HYPOTHESIS_PROFILE=default looks further
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

torch.set_num_threads(1)

__all__ = ["pytest_addoption", "pytest_configure"]
