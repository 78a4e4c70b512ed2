"""What every test may ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from deploy.broker import EmbeddedBroker

# The same examples in every run: a failure is met by who caused it. For a hunt: HYPOTHESIS_PROFILE=default.
hypothesis.settings.register_profile("carousel", derandomize=True, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "carousel"))

torch.set_num_threads(1)  # small models: more threads would only wait for each other, and for Kafka


@pytest.fixture(scope="session")
def bootstrap_servers() -> Iterator[str]:
    """A genuine Kafka broker for the session: the one named in the environment, or an embedded one.

    Tests share it: each must name topics and groups of its own.
    """
    named = os.environ.get("CAROUSEL_TEST_BOOTSTRAP_SERVERS")
    if named:
        yield named
    else:
        with EmbeddedBroker() as broker:
            yield broker.bootstrap_servers
