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


@pytest.fixture(scope="session", autouse=True)
def _compiled_here(tmp_path_factory):
    """Compile in a cache of this run's own: PyTorch's knows operators by name, and would take an old one for ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield
