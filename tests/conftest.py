# SPDX-License-Identifier: Apache-2.0
"""Sizes of the same tests. HISAC_PROFILE=quick (the default) draws the same few examples every time; deep the same
many, and runs what is marked `deep`, so that only a change turns CI red; soak draws new ones, to find what that missed.
--hypothesis-profile does the same for one run."""

import os

import pytest
from cuda_places import on_cuda, place  # noqa: F401
from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("quick", max_examples=25, derandomize=True, **COMMON)
settings.register_profile("deep", max_examples=400, derandomize=True, **COMMON)
settings.register_profile("soak", max_examples=400, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("HISAC_PROFILE", "quick"))


def is_deep() -> bool:
    return str(settings.get_current_profile_name()).startswith(("deep", "soak"))


def pytest_configure(config):
    config.addinivalue_line("markers", "deep: takes long; runs with HISAC_PROFILE=deep")


def pytest_report_header(config):
    return f"hisac profile: {settings.get_current_profile_name()}"


def pytest_collection_modifyitems(items):
    if not is_deep():
        for item in items:
            if item.get_closest_marker("deep"):
                item.add_marker(pytest.mark.skip(reason=f"deep: {item.name} runs with HISAC_PROFILE=deep"))
