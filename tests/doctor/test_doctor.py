"""What is missing is missing for real wherever a test can have it so: full disks, broken packages, hosts that hang, slow cables."""

import errno
import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import pytest

from megaflow.doctor import command as doctor
from megaflow.doctor import config as doctor_config
from megaflow.doctor import findings as doctor_findings
from megaflow.doctor import host as doctor_host
from megaflow.doctor import ranks as doctor_ranks
from megaflow.doctor.findings import Check, Finding, Late
from megaflow.errors import UserError
from tests.conftest import ROOT

DOCTOR = "import sys; from megaflow.doctor.command import doctor; sys.exit(doctor(*sys.argv[1:]))"


def state(findings: list[Finding], name: str) -> str:
    """Of the one finding with this name; what is not ok says what mends it."""
    (found,) = [finding for finding in findings if finding.name == name]
    assert (found.state == "ok") == (found.mend == "") and found.found, found
    return found.state


@pytest.fixture
def empty_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def package(place: Path, name: str, version: str, metadata: str = "", code: str | None = None) -> None:
    """An installed package as importlib sees it."""
    folder = place / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}")
    if code is not None:
        (place / f"{name}.py").write_text(code)


class TestExamined:
    def test_what_hangs_is_given_up_and_the_others_are_asked(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")  # nobody will ever write into it

        def hangs() -> list[Finding]:
            return [Finding("hangs", "ok", (tmp_path / "pipe").read_text())]

        began = time.monotonic()
        checks = [Check("hangs", hangs, 0.2, "unblock it"), Check("works", lambda: [Finding("works", "ok", "well")], 5.0)]
        found = doctor_findings.examined(checks, 10.0)
        assert found == [Finding("hangs", "missing", "no answer within 0 s", "unblock it"), Finding("works", "ok", "well")]
        doctor_findings.examined([Check("hangs", hangs, 5.0)] * 10, 0.5)
        assert time.monotonic() - began < 4.0

    def test_what_raises_is_a_finding(self):
        def broken() -> list[Finding]:
            raise ZeroDivisionError("of all things")

        def refuses() -> list[Finding]:
            raise UserError("there is none; make one")

        found = doctor_findings.examined([Check("a", broken, 1.0), Check("b", refuses, 1.0), Check("c", broken, 1.0, needs="a")], 10.0)
        assert found[0] == Finding("a", "missing", "ZeroDivisionError: of all things", "see to that, and ask again")
        assert found[1:] == [Finding("b", "missing", "there is none", "make one")]

    def test_work_in_time_is_returned_or_raised(self):
        assert doctor_findings.within(5.0, lambda: 7) == 7
        with pytest.raises(KeyError):
            doctor_findings.within(5.0, lambda: {}["a"])
        with pytest.raises(Late, match="within 0 s"):
            doctor_findings.within(0.05, lambda: time.sleep(1.0))

    @pytest.mark.parametrize(
        ("sentence", "found", "mend"),
        [("a; b; c", "a; b", "c"), ("a: b.", "a", "b"), ("a", "a", "see to that, and ask again")],
    )
    def test_our_sentences_have_two_parts(self, sentence, found, mend):
        assert doctor_findings.refused("x", UserError(sentence)) == Finding("x", "missing", found, mend)


class TestPackages:
    def test_those_here(self):
        assert state(doctor_host.packages(), "packages") == "ok"

    def test_old_and_absent_ones(self, tmp_path, monkeypatch):
        needs = "Requires-Python: >=3.99\nRequires-Dist: torch>=99\nRequires-Dist: nowhere-at-all>=1\nRequires-Dist: b>=2; extra == 'x'\n"
        package(tmp_path, "megaflow", "0.0", needs)
        monkeypatch.syspath_prepend(tmp_path)
        found = doctor_host.packages()
        assert [(f.name, f.state) for f in found] == [("python", "missing"), ("torch", "missing"), ("nowhere-at-all", "missing")]
        assert found[1].mend == "pip install 'torch>=99'"

    def test_megaflow_that_is_not_installed(self, monkeypatch, tmp_path):
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not hasattr(finder, "find_distributions")])
        assert state(doctor_host.packages(), "packages") == "warn"


class TestTorch:
    def test_a_gpu_that_is_there_and_cannot_be_used(self, tmp_path):
        import torch

        if torch.cuda.is_available():
            pytest.skip("this host's GPU can be used")
        assert state(doctor_host.device(tmp_path, ""), "torch") == "ok"
        assert state(doctor_host.device(tmp_path, "2"), "torch") == "missing"  # Slurm has given two
        (tmp_path / "nvidia0").touch()
        assert state(doctor_host.device(tmp_path, ""), "torch") == "missing"

    @pytest.mark.cuda
    def test_a_gpu_computes(self):
        assert state(doctor_host.device(), "torch") == "ok"
        assert state(doctor_host.collectives(), "NCCL") == "ok"

    @pytest.mark.parametrize("words", [(), (".", ROOT / "configs" / "quickstart" / "flow.yaml")])
    def test_torch_that_cannot_be_imported(self, process, words):
        said = process("-c", f"import sys; sys.modules['torch'] = None; {DOCTOR}", *words)
        assert said.returncode == 1 and said.stderr == ""
        names = {line.split()[1]: line.split()[0] for line in said.stdout.splitlines()}
        assert (
            names.get("config", "missing") == names["torch"] == "missing" and "DeepSpeed" not in names and names["free"] in ("ok", "warn")
        )

    def test_driver(self, tmp_path):
        (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\n")
        assert doctor_host.driver(tmp_path / "version") == "535.104.05" and doctor_host.driver(tmp_path / "none") == "unknown"

    def test_torch_without_collectives(self, monkeypatch):
        import torch

        assert state(doctor_host.collectives(), "NCCL") == "ok"
        monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
        assert state(doctor_host.collectives(), "gloo") == "missing"
        monkeypatch.undo()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
        assert state(doctor_host.collectives(), "NCCL") == "missing"

    def test_peers(self):
        assert doctor_host.peers(1, lambda a, b: False) == []
        assert state(doctor_host.peers(4, lambda a, b: True), "peer access") == "ok"
        (found,) = doctor_host.peers(4, lambda a, b: a // 2 == b // 2)
        assert found.state == "warn" and found.found == "none between GPUs 0-2, 0-3, 1-2, 1-3"


class TestFlash:
    @pytest.fixture(autouse=True)
    def asked_anew(self):
        from megaflow.model.attention import installed

        installed.cache_clear()
        yield
        installed.cache_clear()
        sys.modules.pop("flash_attn", None)

    def test_what_is_not_installed(self):
        if shutil.which("nvidia-smi"):
            pytest.skip("flash-attn may be here")
        assert state(doctor_host.flash(False), "flash-attn") == "ok"
        assert state(doctor_host.flash(True), "flash-attn") == "warn"

    @pytest.mark.parametrize(
        ("code", "expected"),
        [("raise ImportError('undefined symbol')", "missing"), ("flash_attn_func = flash_attn_varlen_func = None", "ok")],
    )
    def test_what_is_installed(self, code, expected, tmp_path, monkeypatch):
        package(tmp_path, "flash_attn", "2.8.1", code=code)
        monkeypatch.syspath_prepend(tmp_path)
        assert state(doctor_host.flash(True), "flash-attn") == expected


class TestCompiler:
    def test_that_of_this_host(self):
        if shutil.which("g++") is None:
            pytest.skip("needs g++")
        assert state(doctor_host.compiler(False, True), "compiler") == "ok"
        assert state(doctor_host.compiler(True, True), "compiler") == "ok"

    def test_none(self, empty_path, monkeypatch):
        monkeypatch.delenv("CXX", raising=False)
        assert state(doctor_host.compiler(False, False), "compiler") == "warn"
        assert state(doctor_host.compiler(False, True), "compiler") == "missing"

    def test_one_that_does_not_compile(self, tmp_path, monkeypatch):
        (tmp_path / "broken").write_text("#!/bin/sh\necho 'a.cpp:1: fatal error: Python.h: No such file' >&2\nexit 1\n")
        (tmp_path / "broken").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "broken"))
        (found,) = doctor_host.compiler(False, True)
        assert found.state == "missing" and "Python.h" in found.found and "python3-dev" in found.mend


class TestDeepSpeedAndWandb:
    def test_deepspeed(self, monkeypatch):
        assert state(doctor_host.deepspeed(), "DeepSpeed") == "ok"
        monkeypatch.setitem(sys.modules, "deepspeed", None)
        assert state(doctor_host.deepspeed(), "DeepSpeed") == "missing"

    def test_wandb_works_offline(self):
        assert state(doctor_host.wandb(True), "wandb") == "ok" and state(doctor_host.wandb(False), "wandb") == "ok"

    def test_wandb_without_room(self, full, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(full))
        assert state(doctor_host.wandb(True), "wandb") == "missing"
        assert [path.name for path in full.iterdir()] == ["all of it"]

    def test_wandb_that_cannot_be_imported(self, tmp_path, monkeypatch):
        (tmp_path / "wandb.py").write_text("raise ImportError('built for another Python')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        (found,) = doctor_host.wandb(True)
        assert found.state == "missing" and "built for another Python" in found.found


class TestDisk:
    def test_a_place_that_works(self, tmp_path, monkeypatch):
        found = doctor_host.file_system(tmp_path)
        assert state(found, "file system") in ("ok", "warn") and state(found, "locks") == "ok"
        assert list(tmp_path.iterdir()) == []

    def test_a_place_without_room(self, full):
        assert state(doctor_host.file_system(full), "file system") == "missing"
        assert [path.name for path in full.iterdir()] == ["all of it"]

    def test_a_place_that_may_only_be_read(self, disk):
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert state(doctor_host.file_system(disk), "file system") == "missing"

    def test_no_place(self, tmp_path):
        assert state(doctor_host.file_system(tmp_path / "none"), "file system") == "missing"
        assert doctor_host.free_disk(tmp_path / "none") == []

    def test_latency_is_the_median(self, tmp_path):
        assert doctor_host.speed(tmp_path, [0.04] * 11 + [9.0] * 9).state == "ok"
        slow = doctor_host.speed(tmp_path, [0.01] * 9 + [0.06] * 11)
        assert slow.state == "warn" and "60.0 ms" in slow.found

    def test_locks_that_are_none(self, tmp_path):
        def refused(file: int, how: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        assert state(doctor_host.file_system(tmp_path, refused), "locks") == "missing"
        (_, found) = doctor_host.file_system(tmp_path, lambda file, how: None)
        assert found.state == "missing" and "at once" in found.found

    def test_free_disk(self, disk, tmp_path, monkeypatch):
        (found,) = doctor_host.free_disk(disk)
        assert found.state == "warn" and found.found.startswith("1 MB")
        monkeypatch.setattr(doctor_host, "ROOM", 1.0)
        assert state(doctor_host.free_disk(tmp_path), "free disk") == "ok"


class TestSlurm:
    def test_none_is_here(self, empty_path, monkeypatch):
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        assert state(doctor_host.slurm_answers(), "Slurm") == "ok"
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        assert state(doctor_host.slurm_answers(), "Slurm") == "warn"

    @pytest.mark.long
    def test_one_that_works_or_does_not(self, cluster, monkeypatch):
        monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        assert state(doctor_host.slurm_answers(), "Slurm") == "ok"
        cluster.run("scontrol", "update", "nodename=ALL", "state=down", "reason=test")
        try:
            assert state(doctor_host.slurm_answers(), "Slurm") == "warn"
        finally:
            cluster.run("scontrol", "update", "nodename=ALL", "state=resume")
            cluster.until(lambda: cluster.run("sinfo", "-h", "-N", "-p", "usual", "-o", "%T").split() == ["idle"] * 3)
        os.kill(cluster.pid("slurmctld"), signal.SIGSTOP)
        try:
            (found,) = doctor_host.slurm_answers()
        finally:
            os.kill(cluster.pid("slurmctld"), signal.SIGCONT)
        assert found.state == "warn" and "did not answer within 10 s" in found.found


class TestConfig:
    def test_shards(self, shards, tmp_path):
        assert state(doctor_config.shards(str(shards("coded"))), "data.path") == "ok"
        assert state(doctor_config.shards(str(tmp_path / "none")), "data.path") == "missing"
        copy = shutil.copytree(shards("coded"), tmp_path / "copy")
        (copy / "unigram.npy").unlink()
        (found,) = doctor_config.shards(str(copy))
        assert found.state == "missing" and "unigram.npy" in found.found and "megaflow prepare" in found.mend

    def test_a_checkpoint_is_about_so_large(self, trained):
        from megaflow.train import checkpoint

        run = trained("coded")
        loaded, vocab = doctor_config.read(str(run / "config.yaml"), [])
        folder = checkpoint.folder(run, checkpoint.steps(run)[-1])
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.suffix == ".safetensors")
        assert 0.7 < size / (doctor_config.CHECKPOINT * doctor_config.parameters(loaded, vocab)) < 1.1

    def test_room_for_checkpoints(self, config, disk, trained, monkeypatch):
        loaded, vocab = doctor_config.read(str(config("coded")), [f"run.dir={disk}/below/run", "train.keep_checkpoints=2"])
        size = doctor_config.CHECKPOINT * doctor_config.parameters(loaded, vocab)
        monkeypatch.setattr(doctor_config, "room", lambda path: 3 * size)
        assert state(doctor_config.run_dir(loaded, vocab), "run.dir") == "ok"
        monkeypatch.setattr(doctor_config, "room", lambda path: 3 * size - 1)
        assert state(doctor_config.run_dir(loaded, vocab), "run.dir") == "missing"
        loaded.config.run.dir = str(trained("coded"))  # which has two of its checkpoints already
        monkeypatch.setattr(doctor_config, "room", lambda path: size)
        assert state(doctor_config.run_dir(loaded, vocab), "run.dir") == "ok"
        monkeypatch.undo()
        loaded.config.run.dir, loaded.config.train.keep_checkpoints = f"{disk}/run", 2 + 2**20 // size
        (found,) = doctor_config.run_dir(loaded, vocab)
        assert found.state == "missing" and "1 MB are free" in found.found

    def test_a_directory_that_cannot_be_written(self, config, full, tmp_path):
        loaded, vocab = doctor_config.read(str(config("coded")), [f"run.dir={full}/run"])
        assert state(doctor_config.run_dir(loaded, vocab), "run.dir") == "missing"
        (tmp_path / "file").touch()
        loaded.config.run.dir = str(tmp_path / "file" / "run")
        assert state(doctor_config.run_dir(loaded, vocab), "run.dir") == "missing"
        loaded.config.run.dir = str(tmp_path / "run")
        assert state(doctor_config.run_dir(loaded, None), "run.dir") == "ok"

    def test_teacher(self, trained, tmp_path):
        assert state(doctor_config.teacher(str(trained("coded"))), "teacher") == "ok"
        assert state(doctor_config.teacher(str(tmp_path)), "teacher") == "missing"

    def test_precision(self):
        import torch

        half = {torch.bfloat16: 1.0, torch.float32: 2.0}
        assert state(doctor_config.precision(half.get), "precision") == "ok"
        (found,) = doctor_config.precision({torch.bfloat16: 3.0, torch.float32: 2.0}.get)
        assert found.state == "warn" and "takes 1.5 of" in found.found
        assert state(doctor_config.precision(), "precision") in ("ok", "warn")

    def test_attention(self, config):
        loaded, _ = doctor_config.read(str(config("coded")), ["model.attention=flash", "model.heads=auto", "model.hidden=64"])
        assert state(doctor_config.attention(loaded), "attention") == "missing"

    def test_credentials(self, tmp_path, monkeypatch):
        for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
            monkeypatch.delenv(name, raising=False)

        def found() -> str:
            return state(doctor_config.credentials(tmp_path), "credentials")

        file = tmp_path / ".netrc"
        assert found() == "missing"
        file.write_text("machine elsewhere.org login user password no\n")
        assert found() == "missing"
        file.write_text("machine api.wandb.ai login user password no\n")
        assert found() == "ok"
        monkeypatch.setenv("WANDB_BASE_URL", "https://ours.org:8443")
        assert found() == "missing"
        file.write_text("machine ours.org:8443 login user password no\n")
        assert found() == "ok"
        file.write_text("machine\n")
        assert found() == "missing"
        monkeypatch.setenv("WANDB_API_KEY", "x")
        assert found() == "ok"

    def test_a_home_that_hangs(self, config, tmp_path, monkeypatch):
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        os.mkfifo(tmp_path / "netrc")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        loaded, vocab = doctor_config.read(str(config("coded")), ["log.wandb=online"])
        (check,) = [check for check in doctor_config.checks(loaded, vocab, 1) if check.name == "credentials"]
        assert state(doctor_findings.examined([check], 0.5), "credentials") == "missing"

    def test_layout(self, config):
        loaded, vocab = doctor_config.read(str(config("coded")), ["parallel.tensor=2"])
        assert [state(doctor_config.layout(loaded, count), "layout") for count in (2, 3, 6, 8)] == ["ok", "missing", "missing", "ok"]
        assert "layout" in [check.name for check in doctor_config.checks(loaded, vocab, 2)]

    def test_what_is_asked_for_is_looked_at(self, config):
        words = ["train.precision=bf16", "model.attention=flash", "log.wandb=online", "parallel.zero=1"]
        loaded, vocab = doctor_config.read(str(config("coded")), words)
        names = [check.name for check in doctor_config.checks(loaded, vocab, 1)]
        assert names == ["data.path", "run.dir", "precision", "attention", "credentials"]


class TestCommand:
    @pytest.fixture(autouse=True)
    def few(self, monkeypatch):
        """Checks of the host that need no second, and no launcher's words."""
        every = doctor_host.checks
        quick = ("packages", "compiler", "file system", "free disk", "wandb")
        monkeypatch.setattr(doctor_host, "checks", lambda *words: [check for check in every(*words) if check.name in quick])
        for name in ("RANK", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_NUM_NODES"):
            monkeypatch.delenv(name, raising=False)

    def test_one_line_a_finding(self, config, capsys, tmp_path, monkeypatch):
        assert doctor.doctor(str(tmp_path), str(config("coded")), [f"run.dir={tmp_path / 'run'}"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] in ("ok", "warn") for line in lines] == [True] * 8
        assert any(line.startswith("ok       wandb        not needed") for line in lines)
        assert list(tmp_path.iterdir()) == []
        monkeypatch.setenv("CXX", "none")
        assert doctor.doctor(str(tmp_path), str(config("coded")), [f"run.dir={tmp_path / 'run'}", "parallel.compile=true"]) == 1
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
        assert line.split()[1] == "compiler" and line.endswith("; install gcc and g++, or set CC and CXX")

    def test_json(self, tmp_path, capsys):
        code = doctor.doctor(str(tmp_path / "none"), as_json=True)
        found = json.loads(capsys.readouterr().out)
        assert code == 1 and found["missing"] == 1 and set(found["findings"][0]) == {"name", "state", "found", "mend"}

    def test_a_config_that_is_none(self, tmp_path, capsys):
        assert doctor.doctor(str(tmp_path), str(tmp_path / "none.yaml")) == 1
        assert "missing  config" in capsys.readouterr().out

    def test_a_process_alone_in_an_allocation(self):
        assert doctor.alone({}) == [] == doctor.alone({"SLURM_JOB_NUM_NODES": "1"})
        assert state(doctor.alone({"SLURM_JOB_NUM_NODES": "4"}), "ranks") == "warn"

    def test_hosts_are_named_where_they_differ(self):
        well, other = Finding("disk", "ok", "9 GB"), Finding("disk", "ok", "8 GB")
        bad = Finding("disk", "missing", "none", "get one")
        assert doctor.merged([("a", [well]), ("a", []), ("b", [other])]) == [well]
        found = doctor.merged([("a", [well]), ("b", [bad]), ("c", [bad]), ("d", [other])])
        assert found == [Finding("disk", "ok", "9 GB (on a, d)"), Finding("disk", "missing", "none (on b, c)", "get one")]
        assert doctor.merged([("a", [bad]), ("b", [bad])]) == [bad]


class TestFormulas:
    def test_skew(self):
        """Ten seconds ahead, 0.25 there and 0.25 back; and a way back that takes all the time errs by half of it."""
        assert doctor_ranks.skew(100.0, 110.25, 100.5) == (10.0, 0.25)
        assert doctor_ranks.skew(100.0, 100.0, 101.0) == (-0.5, 0.5)

    def test_bandwidth(self):
        assert doctor_ranks.bandwidth(2, 1e9, 0.5) == 2e9 and doctor_ranks.bandwidth(8, 8e9, 1.0) == 14e9

    def test_links_are_judged(self):
        def states(kind: str, seconds: float, latency: float) -> list[str]:
            return [finding.state for finding in doctor_ranks.judged(2, "x", kind, seconds, latency)]

        assert states("cuda", 2**26 / 1.01e9, 5e-3) == ["ok", "ok"] and states("cuda", 2**26 / 0.99e9, 5.1e-3) == ["warn", "warn"]
        assert states("cpu", 2**23 / 1.01e8, 20e-3) == ["ok", "ok"] and states("cpu", 2**23 / 0.99e8, 21e-3) == ["warn", "warn"]

    def test_a_host_without_gpu(self):
        assert doctor_ranks.unequal([("a", "cuda"), ("b", "cuda")]) == [] == doctor_ranks.unequal([("a", "cpu")])
        (found,) = doctor_ranks.unequal([("a", "cuda"), ("b", "cpu"), ("c", "process 3 of c has no GPU, there are 2")])
        assert found.state == "missing" and "on b, c have none (process 3 of c has no GPU" in found.found

    def test_who_one_is(self, empty_path):
        srun = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
        words = doctor_ranks.described(srun | {"SLURM_STEP_NODELIST": "127.0.0.1"})
        assert words == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "20390"}
        batch = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        assert doctor_ranks.described(batch) is None and doctor_ranks.described({}) is None
        assert doctor_ranks.described({"RANK": "0", "WORLD_SIZE": "1"}) is None
        assert doctor_ranks.described({"RANK": "1", "WORLD_SIZE": "2"} | srun) == {}
        assert doctor_ranks.address({"SLURM_STEP_NODELIST": "no[1-2].such.host", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}) == "10.0.0.1"


def mesh():
    import torch
    import torch.distributed as dist

    from megaflow.parallel.mesh import ALONE, Axis, Mesh

    return Mesh(Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD), ALONE, ALONE, torch.device("cpu"))


def clocks(ahead: list[float]) -> list[Finding]:
    here = mesh()
    rank = here.world.rank
    firsts = list(range(here.world.size))
    return doctor_ranks.clocks(here, firsts, [f"h{number}" for number in firsts], lambda: time.time() + ahead[rank])


def folder(places: list[str], locks: bool = True, hangs: str = "") -> list[Finding]:
    """hangs: the function of doctor_ranks that stands for a file server that does not answer."""
    here = mesh()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor_ranks, "SEEN", 0.3)
        if not locks:
            patch.setattr(fcntl, "flock", lambda file, how: None)
        if hangs:
            patch.setattr(doctor_ranks, hangs, lambda file: time.sleep(20.0))
        return doctor_ranks.one_folder(here, Path(places[here.world.rank]))


def agreement(values: list[int]) -> Finding:
    here = mesh()
    return doctor_ranks.agreement(here, {"the version of torch": values[here.world.rank], "a": 1})


def links(broken: bool) -> list[Finding]:
    import torch.distributed as dist

    kept = dist.all_reduce
    if broken and mesh().world.rank == 1:
        dist.all_reduce = lambda values, group: kept(values.clone(), group=group)
    try:
        return doctor_ranks.links(mesh())
    finally:
        dist.all_reduce = kept


class TestRanks:
    def test_a_clock_that_is_wrong(self, ranks):
        (found,) = ranks(2, clocks, [0.0, 0.0])[0]
        assert found.state == "ok" and float(found.found.split()[2]) < 50.0
        for ahead in (3.0, -3.0):
            (found,) = ranks(2, clocks, [0.0, ahead])[0]
            assert found.state == "warn" and found.found == f"h1 is 3 s {'ahead' if ahead > 0 else 'behind'}, of h0's"

    def test_places_that_are_not_one(self, ranks, tmp_path, full):
        for name in "ab":
            (tmp_path / name).mkdir()
        a, b = str(tmp_path / "a"), str(tmp_path / "b")
        (found,) = ranks(2, folder, [a, a])[0]
        assert found.state == "ok"
        first, second = ranks(2, folder, [a, b])
        assert first == second and first[0].state == "missing" and "rank 1 (" in first[0].found
        assert ranks(2, folder, [str(full), str(full)])[0][0].state == "missing"
        assert list((tmp_path / "a").iterdir()) == [] and [path.name for path in full.iterdir()] == ["all of it"]

    @pytest.mark.long
    def test_a_place_that_hangs(self, ranks, tmp_path):
        began = time.monotonic()
        (found,) = ranks(2, folder, [str(tmp_path)] * 2, True, "announced")[0]
        assert found.state == "missing" and "no answer within" in found.found
        (found,) = ranks(2, folder, [str(tmp_path)] * 2, True, "look")[0]
        assert found.state == "missing" and "rank 1 (" in found.found
        assert time.monotonic() - began < 15.0 and list(tmp_path.iterdir()) == []

    def test_locks_that_others_do_not_see(self, ranks, tmp_path):
        found = ranks(2, folder, [str(tmp_path)] * 2, False)[0]
        assert [finding.state for finding in found] == ["ok", "warn"] and "rank 1" in found[1].found

    def test_versions_that_differ(self, ranks):
        assert ranks(2, agreement, [1, 1])[0].state == "ok"
        found = ranks(2, agreement, [1, 2])[1]
        assert found.state == "missing" and "the version of torch is 1 on rank 0" in found.found and found.mend.startswith("start all")

    def test_sums(self, ranks):
        found = ranks(2, links, False)[0]
        assert [finding.name for finding in found] == ["bandwidth", "latency"] and all("missing" != finding.state for finding in found)
        (wrong,) = ranks(2, links, True)[0]
        assert wrong.name == doctor_ranks.HANGS and wrong.state == "missing" and "a sum of 2 ones is 1.0" in wrong.found


QUICK = """import os, signal, sys
from megaflow.errors import UserError
from megaflow.doctor import command as doctor, host as doctor_host, ranks as doctor_ranks
doctor_host.checks = lambda *words: [doctor_host.Check("free disk", lambda: doctor_host.free_disk(words[0]), 5.0)]
doctor_ranks.PATIENCE, doctor_ranks.LOST, doctor.FIRST_TELLS = 4.0, 4.0, 0.0
{}
try:
    sys.exit(doctor.doctor(*sys.argv[1:]))
except UserError as error:
    sys.exit(f"megaflow: {{error}}")
"""


@pytest.fixture
def start(environment, tmp_path):
    """start(rank, change, size): one of several processes that meet; `change` is code before it begins."""
    from torch.distributed import TCPStore

    port = TCPStore("127.0.0.1", 0, 1, True, timeout=timedelta(seconds=5)).port
    started = []

    def call(rank: int, change: str = "", size: int = 2) -> subprocess.Popen[str]:
        words = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", QUICK.format(change), str(tmp_path)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=environment | words, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()


class TestProcesses:
    def test_one_that_never_comes(self, start):
        first = start(0)
        out, err = first.communicate(timeout=60)
        lines = [line for line in out.splitlines() if line.startswith("missing")]
        assert first.returncode == 1 and len(lines) == 1 and lines[0].split()[1] == "ranks" and "cannot meet at 127.0.0.1" in lines[0]
        assert "Traceback" not in err and "free disk" in out

    @pytest.mark.long
    def test_the_first_one_never_comes(self, start):
        other = start(1)
        out, err = other.communicate(timeout=60)
        sentences = [line for line in err.splitlines() if line.startswith("megaflow: ")]
        assert other.returncode == 1 and out == "" and len(sentences) == 1 and "Traceback" not in err

    @pytest.mark.long
    @pytest.mark.parametrize("signal_name", ["SIGSTOP", "SIGKILL"])
    def test_one_that_comes_and_is_lost(self, start, signal_name):
        first = start(0)
        start(1, f"doctor_ranks.one_folder = lambda *words: os.kill(os.getpid(), signal.{signal_name})")
        out, err = first.communicate(timeout=60)
        (line,) = [line for line in out.splitlines() if line.startswith("missing")]
        assert first.returncode == 1 and line.split()[1] == "ranks" and "Traceback" not in err, (out, err)

    def test_sums_that_never_come_back(self, start):
        """The measurement hangs on one process: all end, and say which."""
        first = start(0, "doctor_ranks.SENDING = 1.0; doctor_ranks.LOST = 20.0")
        start(1, "doctor_ranks.SENDING = 1.0; doctor_ranks.LOST = 20.0\ndoctor_ranks.measured = lambda *words: signal.pause()")
        out, _ = first.communicate(timeout=60)
        (line,) = [line for line in out.splitlines() if line.startswith("missing")]
        assert first.returncode == 1 and line.split()[1] == doctor_ranks.HANGS and "rank 1 (" in line, out

    @pytest.mark.long
    @pytest.mark.parametrize(("burst", "name", "expected"), [("256k", "bandwidth", "warn"), ("64k", doctor_ranks.HANGS, "missing")])
    def test_a_cable_that_is_slow_or_loses_large_packets(self, environment, tmp_path, burst, name, expected):
        """Two processes in a network of their own, whose loopback passes 50 MB a second, and no packet above `burst`."""
        cable = f"ip link set lo up && tc qdisc add dev lo root tbf rate 400mbit burst {burst} latency 400ms"
        if subprocess.run(["unshare", "--net", "sh", "-c", cable], capture_output=True).returncode:
            pytest.skip("needs root, iproute2, and a kernel that slows cables (sch_tbf)")
        script = tmp_path / "script.py"
        script.write_text(QUICK.format("doctor_ranks.PATIENCE = doctor_ranks.LOST = 60.0; doctor_ranks.SENDING = 5.0"))
        launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2 {script} {tmp_path}"
        words = ["unshare", "--net", "sh", "-c", f"{cable} && {launch}"]
        done = subprocess.run(words, env=environment | {"GLOO_SOCKET_IFNAME": "lo"}, capture_output=True, text=True, timeout=120)
        (line,) = [line for line in done.stdout.splitlines() if line.split()[1] == name]
        assert line.startswith(expected) and "GLOO_SOCKET_IFNAME" in line, (done.stdout, done.stderr)
        assert (done.returncode == 0) == (expected == "warn")


class TestOnACluster:
    @pytest.mark.long
    def test_two_hosts(self, cluster, tmp_path, config):
        def srun(place: str, *words: str) -> subprocess.CompletedProcess[str]:
            command = [
                "srun",
                "--nodelist=n1,n2",
                "--ntasks-per-node=1",
                "sh",
                "-c",
                f'exec "$@" {place} {" ".join(words)}',
                "sh",
                sys.executable,
            ]
            quick = f"from megaflow.doctor import ranks as doctor_ranks; doctor_ranks.SEEN = 1.0; {DOCTOR}"
            return subprocess.run([*command, "-c", quick], env=cluster.environment, capture_output=True, text=True, timeout=120)

        done = srun(str(tmp_path), str(config("coded")))
        names = {line.split()[1]: line.split()[0] for line in done.stdout.splitlines()}
        assert done.returncode == 0 and "Traceback" not in done.stderr, (done.stdout, done.stderr)
        assert "2 processes on 2 hosts: n1, n2" in done.stdout and "missing" not in names.values()
        assert {"packages", "wandb", "Slurm", "data.path", "layout", "ranks", "clocks", "one", "agreement", "bandwidth"} <= names.keys()
        for name in ("n1", "n2"):
            (tmp_path / name).mkdir()
        done = srun(f"{tmp_path}/$SLURMD_NODENAME")
        lines = [line for line in done.stdout.splitlines() if line.startswith("missing")]
        assert done.returncode == 1 and len(lines) == 1 and "one folder" in lines[0] and "rank 1 (n2)" in lines[0], done.stdout

    @pytest.mark.long
    def test_a_batch_script_is_one_process(self, cluster, tmp_path):
        script = f"{sys.executable} -c '{DOCTOR}' {tmp_path}"
        cluster.run("sbatch", "--wait", "-N2", "--ntasks-per-node=1", f"--output={tmp_path}/log", f"--wrap={script}")
        text = (tmp_path / "log").read_text()
        assert "warn     ranks" in text and "this is one of 2 hosts" in text
