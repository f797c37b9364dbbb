import os
import platform
import subprocess
import sys

import pytest

FREED = """
import resource
import numpy as np
{call}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(16_000_000, np.float32)
before = faults()
for _ in range(10):
    np.ones(16_000_000, np.float32)
print(faults() - before)
"""
CALL = "from coaddflow.runtime.allocator import keep_freed_memory; print(keep_freed_memory())"


def run(call, **variables):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    }
    environment |= {"NUMPY_MADVISE_HUGEPAGE": "0", **variables}
    command = [sys.executable, "-c", FREED.format(call=call)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not the C library of GNU")
def test_freed_memory_is_used_again_without_the_system():
    usual = int(run("").stdout)
    kept, faults = run(CALL).stdout.split()
    assert kept == "True"
    assert usual > 100_000  # ten times 64 MB in pages of 4 kB
    assert int(faults) < usual / 10


def test_what_the_user_has_set_is_left_alone():
    assert run(CALL, MALLOC_TOP_PAD_="1000000").stdout.split()[0] == "False"
