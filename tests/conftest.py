"""Settings of the whole test suite."""

import warnings

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _few_heads_are_meant():
    """Ignore the stride types' warning about fewer heads than sparsity_factor. test_errors tests the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*covers all tokens only with")
        yield
