"""What a process asks of the C runtime and of its console: seen from outside, in processes of their own."""

import json
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
    done = subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, check=True)
    return done.stdout.decode("latin-1" if "latin-1" in environment.get("PYTHONIOENCODING", "") else "utf-8").strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_freed_memory_is_not_asked_for_again():
    """Page faults of a second block of 200 MB: none where the memory of the first was kept."""
    assert int(output(AGAIN.format(before="process.settle()"))) < 100 < int(output(AGAIN.format(before="")))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_large_blocks_are_given_back():
    """Also those that lie below another one, which no limit on what is kept reaches: 1.2 GB in four blocks, and 4 KB above them."""
    resident = "int(next(line for line in open('/proc/self/status') if line.startswith('VmRSS')).split()[1])"
    code = "from megaflow import process; process.settle()"
    code += "; blocks = [bytearray(b'x') * (300 << 20) for _ in range(4)]; above = bytearray(4096);"
    assert int(output(f"{code} print({resident})")) > 1_200_000
    assert int(output(f"{code} del blocks; print({resident})")) < 200_000


def test_what_the_environment_says_comes_first():
    show = "import os; from megaflow import process; process.settle(); print(os.environ['GOMP_SPINCOUNT'])"
    assert output(show) == "30000" and output(show, GOMP_SPINCOUNT="7") == "7"
    if platform.libc_ver()[0] == "glibc":
        assert int(output(AGAIN.format(before="process.settle()"), MALLOC_MMAP_THRESHOLD_="131072")) > 100


SAMPLE = """
import sys, types
from megaflow import __main__
# in the place of what takes seconds to import
sys.modules["megaflow.evaluate.generate"] = types.SimpleNamespace(sample=lambda *arguments: {{"texts": [{text!a}]}})
sys.argv = ["megaflow", "sample", "run", {option}]
__main__.main()
"""


def test_text_that_the_console_cannot_show_is_escaped():
    text = "café \N{GRINNING FACE}"
    for encoding, shown in (("ascii", r"caf\xe9 \U0001f600"), ("latin-1:strict", r"café \U0001f600"), ("utf-8", text)):
        assert output(SAMPLE.format(text=text, option=""), PYTHONIOENCODING=encoding) == shown
        assert json.loads(output(SAMPLE.format(text=text, option="'--json'"), PYTHONIOENCODING=encoding)) == {"texts": [text]}


KEEP = """
from pathlib import Path
from megaflow.files import read_json, write_atomically
write_atomically(Path({path!a}), {text!a})
print(ascii(read_json(Path({path!a}))))
"""


def test_files_are_utf_8_whatever_the_locale(tmp_path):
    kept, text = {"title": "café"}, '{"title": "café"}'
    code = KEEP.format(path=str(tmp_path / "run.json"), text=text)
    assert output(code, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0") == ascii(kept)
    assert (tmp_path / "run.json").read_bytes() == text.encode("utf-8")


@pytest.mark.parametrize(
    "place, words", [("0", "megaflow: stopped by a signal outside of training steps; the same command goes on\n"), ("1", "")]
)
def test_the_first_process_of_a_host_says_that_a_signal_ended_them(place, words):
    code = "import os, signal; from megaflow import process; process.leave_on_signals(); os.kill(os.getpid(), signal.SIGTERM)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"LOCAL_RANK": place}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (75, words)
