"""What the watch makes of beats; jobs of real processes that fail are in end_to_end/test_failure.py."""

import os
import socket
import subprocess
import sys

import torch
import torch.distributed as dist

from megaflow.errors import UserError
from megaflow.parallel import mesh as meshes
from megaflow.parallel import watch as watches
from megaflow.parallel.watch import Beat, Watch


def watching(limit: float, *beats: Beat) -> Watch:
    watch = Watch(limit)
    watch.hosts = ["a", "a", "b", "b"][: len(beats)]
    watch._beats = dict(enumerate(beats))
    return watch


def beat(step: int, calls: int, still: float, warm: bool = True) -> Beat:
    return Beat(step=step, calls=calls, still=still, warm=warm, stack="x.py:1 f")


class TestHangs:
    def test_who_is_behind_the_others_is_named(self):
        """In the same step the one that has begun fewer collective calls."""
        watch = watching(60.0, beat(5, 90, 61.0), beat(5, 88, 62.0), beat(5, 90, 61.0), beat(5, 90, 63.0))
        assert watch._hang()["text"] == "rank 1 on a hangs in step 5 since 61 s (train.hang_timeout); the stack of rank 1: x.py:1 f"
        watch = watching(60.0, beat(5, 90, 61.0), beat(4, 99, 62.0), beat(4, 99, 61.0), beat(5, 90, 63.0))
        assert watch._hang()["text"].startswith("ranks 1, 2 on a, b hang in step 4 since 61 s")

    def test_all_in_one_place_are_named_together(self):
        assert watching(60.0, beat(5, 90, 61.0), beat(5, 90, 62.0))._hang()["text"].startswith("all 2 ranks stand still in step 5")

    def test_nobody_hangs_while_one_moves(self):
        assert watching(60.0, beat(5, 90, 500.0), beat(5, 88, 59.0))._hang() is None

    def test_a_first_step_may_take_longer(self):
        """Whoever has not made one: 600 s at least, and three times the limit."""
        for limit, allowed in ((60.0, 600.0), (600.0, 1800.0)):
            for still in (allowed - 1.0, allowed + 1.0):
                watch = watching(limit, beat(5, 90, still), beat(1, 7, still, warm=False))
                assert (watch._hang() is None) == (still < allowed)

    def test_torch_waits_longer_than_the_watch(self):
        assert watches.patience(60.0) > watches.first_step(60.0) and watches.patience(0.0) > 1e7


def test_an_error_that_another_s_end_makes_is_told_from_one_s_own():
    assert watches._of_others(RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert watches._of_others(dist.DistBackendError("NCCL error"))
    assert not watches._of_others(RuntimeError("shape mismatch")) and not watches._of_others(UserError("no such file"))


def test_one_process_of_a_host_speaks():
    """Where there is no store to ask: others of the same job are told so by the kernel, until it has ended."""
    name = f"test {socket.gethostname()} {id(object())}"
    code = f"import sys\nfrom megaflow.parallel.watch import _first_of_host\nprint(_first_of_host({name!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    assert watches._first_of_host(name)
    assert not watches._first_of_host(name)


def test_one_process_and_a_rendezvous_by_a_file_have_no_watch():
    with meshes.gather() as mesh, watches.watching(mesh, 60.0) as watch:
        watch.at(1)
        assert watch._threads == [] and watch.stopped(75) is None


def facts(of: dict[int, dict]) -> str:
    """What agreement says on each process whose facts are those of its rank."""
    mesh = meshes.grid(1, torch.device("cpu"))
    try:
        meshes.agree(mesh, {"a": 1, "b": "x"} | of.get(mesh.world.rank, {}))
    except UserError as error:
        return str(error)
    return "agreed"


class TestAgreement:
    def test_the_same_facts_are_agreed_on(self, ranks):
        assert ranks(4, facts, {}) == ["agreed"] * 4

    def test_what_differs_is_named_with_ranks_and_hosts(self, ranks):
        host = os.uname().nodename
        (told,) = set(ranks(4, facts, {1: {"a": 2}, 3: {"a": 2, "c": 0}}))
        assert f"the processes do not agree: a is 1 on ranks 0, 2 ({host}), 2 on ranks 1, 3 ({host}); " in told
        assert f"c is nothing on ranks 0, 1, 2 ({host}), 0 on rank 3 ({host}); start all of them" in told
