"""How tests compile: most of their time is that of XLA's compiler, whose backend is told to hurry.

LONGVID_TEST_OPTIMIZED=1 tests what users run, in twice the time.
"""

import os

QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes --xla_cpu_use_fusion_emitters=false"


def environment() -> dict[str, str]:
    """For a process that must compute to the bit what this one does."""
    if os.environ.get("LONGVID_TEST_OPTIMIZED") == "1":
        return {}
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY}".strip()}
