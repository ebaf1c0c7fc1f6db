"""The script of a job: everything of the command line is data in it, and a template that cannot work is refused."""

import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megaflow.errors import UserError
from megaflow.launch import script
from megaflow.launch.script import Job, Resources

UGLY = """$(touch x); "a b" 'c' `d` \\ é # @python@ %j"""


def job(**own: object) -> Job:
    return replace(Job("name", ["pretrain", "a.yaml"], Path("/runs/a/slurm"), Resources(), "runs/a"), **own)


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_what_is_asked_for_is_in_the_script():
    resources = Resources(2, 8, 1, 64, "1-00:00:00", "gpu", "us", "long", "a100", margin=300, more=("--exclusive", "--mem=0"))
    found = directives(script.render(job(resources=resources, dependency="afterok:7"), script.folder(), Path("/here")))
    for line in (
        "--nodes=2",
        "--gpus-per-node=8",
        "--cpus-per-task=64",
        "--time=1-00:00:00",
        "--partition=gpu",
        "--account=us",
        "--qos=long",
        "--constraint=a100",
        "--signal=B:USR1@300",
        "--dependency=afterok:7",
        "--kill-on-invalid-dep=yes",
        "--exclusive",
        "--mem=0",
        "--output=/runs/a/slurm/%j.log",
        "--requeue",
        "--open-mode=append",
    ):
        assert line in found
    usual = directives(script.render(job(), script.folder(), Path("/here")))
    assert not [line for line in usual if line.startswith(("--gpus", "--time", "--partition", "--dependency", "--array"))]


def test_the_step_has_what_a_host_is_to_give_it():
    resources = Resources(nodes=2, gpus=4, cpus=16)
    (line,) = re.findall(r"^srun (.*?) -m megaflow", script.render(job(resources=resources), script.folder(), Path("/here")), re.MULTILINE)
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--cpus-per-task=16"} <= set(line.split())


def test_a_shell_reads_names_as_they_are(tmp_path):
    """The script, with printf for srun and python: every word arrives, and nothing else has happened."""
    text = script.render(job(name=UGLY, words=["pretrain", UGLY, f"run.dir={UGLY}"], directory=UGLY), script.folder(), tmp_path / UGLY)
    (tmp_path / UGLY).mkdir()
    command = next(line for line in text.splitlines() if line.startswith("srun "))
    words = shlex.split(command.replace('"$place"', "PLACE").rstrip("& "))
    assert words[words.index("--", 1) + 1 :] == ["pretrain", UGLY, f"run.dir={UGLY}"]
    entered = next(line for line in text.splitlines() if line.startswith("cd "))
    done = subprocess.run(["bash", "-c", f"{entered}; pwd"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.rstrip("\n") == str(tmp_path / UGLY)
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == [UGLY]


@pytest.mark.parametrize("own, words", [({"name": "a\nb"}, "line break"), ({"place": Path("/runs/50%")}, "without them")])
def test_what_slurm_cannot_read_is_refused(own, words):
    with pytest.raises(UserError, match=words):
        script.render(job(**own), script.folder(), Path("/here"))


def test_an_option_of_sbatch_is_written_as_one():
    with pytest.raises(UserError, match="--sbatch exclusive: an option of sbatch is written --name"):
        script.render(job(resources=Resources(more=("exclusive",))), script.folder(), Path("/here"))


def test_templates_of_one_s_own(tmp_path):
    shutil.copytree(script.folder(), tmp_path / "mine")
    (tmp_path / "mine" / "site.sh").write_text("module load mine\n")
    assert "\nmodule load mine\n" in script.render(job(), script.folder(str(tmp_path / "mine")), Path("/here"))
    template = tmp_path / "mine" / "job.sbatch"
    text = template.read_text()
    template.write_text(text + "\n@whatever@\n")
    with pytest.raises(UserError, match="there is no @whatever@; there are @directives@"):
        script.render(job(), tmp_path / "mine", Path("/here"))
    template.write_text(text.replace("@command@", ""))
    with pytest.raises(UserError, match="@command@ is missing"):
        script.render(job(), tmp_path / "mine", Path("/here"))
    with pytest.raises(UserError, match="there is no job.sbatch with a site.sh beside it"):
        script.folder(str(tmp_path))


def test_ranks_in_a_container_have_its_python():
    text = script.render(job(resources=Resources(container="img.sqsh")), script.folder(), Path("/here"))
    command = next(line for line in text.splitlines() if line.startswith("srun "))
    assert "--container-image=img.sqsh" in command and " python -m megaflow.launch.host" in command


def test_a_container_sees_what_the_job_reads_and_writes():
    mounts = ("/scratch/run", "/data")
    text = script.render(job(resources=Resources(container="img.sqsh", mounts=mounts)), script.folder(), Path("/here"))
    assert "--container-mounts=/here:/here,/scratch/run:/scratch/run,/data:/data,/runs/a/slurm:/runs/a/slurm " in text
    with pytest.raises(UserError, match="/a,b: pyxis reads , and : in the names of folders"):
        script.render(job(resources=Resources(container="img.sqsh", mounts=("/a,b",))), script.folder(), Path("/here"))


def test_ranks_without_gpus_have_a_core_each():
    for resources, cores in (
        (Resources(processes=4), "4"),
        (Resources(processes=4, cpus=16), "16"),
        (Resources(gpus=8), None),
        (Resources(), None),
    ):
        text = script.render(job(resources=resources), script.folder(), Path("/here"))
        assert re.findall(r"--cpus-per-task=(\d+)", text) == ([cores] * 2 if cores else [])
