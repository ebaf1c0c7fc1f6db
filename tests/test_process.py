"""What a process asks of the C runtime: seen from outside, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

AGAIN = """
import resource
from megaflow import process
{before}
def block():
    bytearray(200_000_000)
block()
first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""


def output(code: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT" and not name.startswith("MALLOC_")}
    return subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_freed_memory_is_not_asked_for_again():
    """Page faults of a second block of 200 MB: none where the memory of the first was kept."""
    assert int(output(AGAIN.format(before="process.settle()"))) < 100 < int(output(AGAIN.format(before="")))


def test_what_the_environment_says_comes_first():
    show = "import os; from megaflow import process; process.settle(); print(os.environ['GOMP_SPINCOUNT'])"
    assert output(show) == "30000" and output(show, GOMP_SPINCOUNT="7") == "7"
    if platform.libc_ver()[0] == "glibc":
        assert int(output(AGAIN.format(before="process.settle()"), MALLOC_MMAP_THRESHOLD_="131072")) > 100
