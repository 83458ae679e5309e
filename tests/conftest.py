"""Settings every test shares: eight simulated devices, float32 throughout, no silent broadcasting of ranks."""

import gc
import os

# Both must stand before jax is imported. A machine with libtpu installed and no TPU would otherwise probe for one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what the tests do, and tiny models do not need an optimised program.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Drop the programs that a test file compiled: each holds memory maps, and Linux gives a process only 65,530."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that need it are skipped if it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data is not at {SHARED_DATA}")
    return SHARED_DATA
