"""The installation: what is pinned, what tools/install.sh decides, and the mend of a torchvision without operators."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "tools" / "site_packages"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what an install is made from, in a directory with a space in its name."""
    root = tmp_path / "a copy"
    shutil.copytree(SITE, root / "tools" / "site_packages", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "slurm", root / "slurm")
    (root / "megaflow").mkdir()
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "Makefile", "tools/install.sh", "megaflow/__init__.py"):
        shutil.copy(ROOT / name, root / name)
    return root


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(command, cwd=cwd, env={**clean, **env}, capture_output=True, text=True)


def python(code: str, *path: Path) -> str:
    """What `code` prints in an interpreter of its own, with `path` in front of its search path."""
    search = os.pathsep.join(map(str, path))
    result = run([sys.executable, "-c", textwrap.dedent(code)], ROOT, PYTHONPATH=search, PYTHONDONTWRITEBYTECODE="1")
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# What is pinned


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "a constraint is one exact version"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def requirements() -> list[Requirement]:
    """What setup.py asks for, of all extras but flash, which is compiled and not pinned."""
    code = """
        import json, setuptools, distutils.core
        package = distutils.core.run_setup("setup.py", stop_after="init")
        print(json.dumps([package.install_requires, package.extras_require]))
    """
    required, extras = json.loads(python(code))
    return [Requirement(line) for line in required + [line for name, lines in extras.items() if name != "flash" for line in lines]]


def test_every_requirement_is_pinned_to_a_version_it_accepts():
    versions = pins()
    names = {canonicalize_name(r.name) for r in requirements()}
    assert {"torch", "deepspeed", "mosaicml-streaming", "webdataset", "omegaconf", "wandb", "numpy", "tokenizers"} <= names
    for requirement in requirements():
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_pins_hold_everything_that_the_packages_ask_for(version):
    versions = pins()
    marks = {"python_version": version, "python_full_version": f"{version}.1", "sys_platform": "linux", "platform_system": "Linux"}
    seen, waiting = set(), [(r.name, "") for r in requirements()]
    while waiting:
        name, extra = waiting.pop()
        package = metadata.distribution(name)
        if package.version.split("+")[0] != versions[canonicalize_name(name)]:
            pytest.skip(f"this environment has {name} {package.version}: what the pinned version asks for is not known here")
        assert SpecifierSet(package.metadata.get("Requires-Python", "")).contains(f"{version}.1"), name
        for requirement in map(Requirement, package.requires or []):
            if requirement.marker and not requirement.marker.evaluate({**marks, "extra": extra}):
                continue
            pin = versions.get(canonicalize_name(requirement.name))
            assert pin and requirement.specifier.contains(pin, prereleases=True), f"{name} asks for {requirement}, pinned is {pin}"
            waiting += [(requirement.name, e) for e in ("", *requirement.extras) if (requirement.name, e) not in seen]
            seen |= {(requirement.name, e) for e in ("", *requirement.extras)}
    assert ("torchvision", "") in seen, "mosaicml-streaming brings torchvision, which asks for one version of torch"


# What tools/install.sh decides


def interpreters(folder: Path, versions: dict[str, tuple[int, int]], without_venv: tuple[str, ...] = ()) -> str:
    """A PATH on which python3 and its siblings report the given versions; names not given do not start."""
    folder.mkdir()
    for name in ("python3", "python3.13", "python3.12", "python3.11"):
        version = versions.get(name)
        lines = ["#!/bin/sh"]
        if version is None:
            lines += ["exit 127"]
        else:
            ok = "0" if (3, 11) <= version <= (3, 13) else "1"
            lines += [f'[ "$1" = -V ] && echo "Python {version[0]}.{version[1]}.0" && exit 0']
            lines += [f'case "$2" in *ensurepip*) exit {int(name in without_venv)};; *version_info*) exit {ok};; esac']
            lines += [f'[ "$2" = venv ] && echo "made by {name}" >&2', "exit 3"]
        script = folder / name
        script.write_text("\n".join(lines) + "\n")
        script.chmod(0o755)
    return f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin"


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [
        ({"python3": (3, 12), "python3.13": (3, 13)}, "python3"),
        ({"python3": (3, 9), "python3.11": (3, 11), "python3.12": (3, 12)}, "python3.12"),
        ({"python3": (3, 14), "python3.13": (3, 13), "python3.11": (3, 11)}, "python3.13"),
        ({"python3.11": (3, 11)}, "python3.11"),
    ],
)
def test_python3_is_used_if_it_will_do_else_the_newest_that_will(tree, tmp_path, versions, chosen):
    result = run(["bash", "tools/install.sh"], tree, PATH=interpreters(tmp_path / "bin", versions))
    assert result.returncode != 0 and f"made by {chosen}\n" in result.stderr


def test_no_suitable_python_is_one_sentence_that_names_the_versions(tree, tmp_path):
    result = run(["make", "test"], tree, PATH=interpreters(tmp_path / "bin", {"python3": (3, 9)}))
    first, rest = result.stderr.split("\n", 1)
    assert result.returncode == 2 and result.stdout == "" and rest.startswith("make: ***")
    assert "needs Python 3.11, 3.12 or 3.13" in first and "Python 3.9.0" in first
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize("name", ["python3", "python3.12"])
def test_no_venv_module_is_one_sentence_that_names_the_package(tree, tmp_path, name):
    result = run(["bash", "tools/install.sh"], tree, PATH=interpreters(tmp_path / "bin", {name: (3, 12)}, without_venv=(name,)))
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert f"apt install {name}-venv" in result.stderr
    assert not (tree / ".venv").exists()


ONLY_PYTHON_3_12 = {"python3": (3, 9), "python3.12": (3, 12)}


def finished_environment(tree: Path) -> Path:
    """A small .venv, whose pip is only a folder, with the record that the end of an install writes."""
    run([sys.executable, "-m", "venv", "--without-pip", ".venv"], tree)
    site = tree / ".venv" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "pip").mkdir()
    (site / "some_package").mkdir()
    names = {p.name for p in [*site.iterdir(), *(tree / ".venv" / "bin").iterdir()] if not p.name.endswith(".dist-info")}
    hooks = [f"tools/site_packages/{name}.{end}" for name in ("megaflow_lm_eval", "torchvision_mend") for end in ("pth", "py")]
    inputs = ["setup.py", "constraints.txt", "pyproject.toml", *hooks]
    digest = hashlib.sha256(b"".join((tree / name).read_bytes() for name in inputs)).hexdigest()
    (tree / ".venv" / "megaflow-installed").write_text("\n".join([str(tree), digest, *sorted(names)]) + "\n")
    return site


def decision(tree: Path, path: str) -> str:
    """What install.sh does with .venv: nothing, an install into it, or making it anew (neither of which ends well here)."""
    kept = tree / ".venv" / "kept"
    kept.touch()
    result = run(["bash", "tools/install.sh"], tree, PATH=path)
    if result.returncode == 0:
        assert result.stdout == result.stderr == ""
        return "nothing"
    assert kept.exists() != ("made by python3.12\n" in result.stderr), result.stderr
    return "install" if kept.exists() else "anew"


def test_a_finished_environment_is_left_alone_until_something_changes(tree, tmp_path):
    path = interpreters(tmp_path / "bin", ONLY_PYTHON_3_12)
    site = finished_environment(tree)
    assert decision(tree, path) == "nothing"
    (site / "another_version-2.0.dist-info").mkdir()  # somebody tries another package
    assert decision(tree, path) == "nothing"
    with (tree / "constraints.txt").open("a") as constraints:
        constraints.write("# changed\n")
    assert decision(tree, path) == "install"
    assert decision(tree, path) == "anew", "the install before did not finish"


def remove_package(tree: Path, site: Path) -> None:
    (site / "some_package").rmdir()


def remove_interpreter(tree: Path, site: Path) -> None:
    for link in (tree / ".venv" / "bin").glob("python*"):
        link.unlink()
        link.symlink_to("/nonexistent/python3")


def kill_install(tree: Path, site: Path) -> None:
    (tree / ".venv" / "megaflow-installed").write_text("unfinished\n")


def move(tree: Path, site: Path) -> None:
    record = tree / ".venv" / "megaflow-installed"
    record.write_text(record.read_text().replace(str(tree), "/elsewhere", 1))


@pytest.mark.parametrize("damage", [remove_package, remove_interpreter, kill_install, move])
def test_a_damaged_environment_is_made_anew(tree, tmp_path, damage):
    damage(tree, finished_environment(tree))
    path = interpreters(tmp_path / "bin", ONLY_PYTHON_3_12)
    assert decision(tree, f"{tree}/.venv/bin:{path}") == "anew", "with .venv activated, whose python must not be the one that makes it"


def test_an_environment_of_someone_elses_making_is_kept(tree, tmp_path):
    finished_environment(tree)
    (tree / ".venv" / "megaflow-installed").unlink()
    assert decision(tree, interpreters(tmp_path / "bin", ONLY_PYTHON_3_12)) == "install"


# What lies in site-packages: the mend of torchvision, and the name for lm_eval


@pytest.mark.parametrize("kind", ["editable", "wheel"])
def test_what_lies_in_site_packages_comes_and_goes_with_the_package(tree, tmp_path, kind):
    code = f"from setuptools import build_meta as b; print(b.build_{kind}('.'))"
    wheel = run([sys.executable, "-c", code], tree).stdout.split()[-1]
    run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], tree)
    env = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(env)]
    mended = [str(env), "-c", "import sys; print({'torchvision_mend', 'megaflow_lm_eval'} <= set(sys.modules))"]

    assert run([*pip, "install", "--no-deps", "--no-index", "--no-cache-dir", wheel], tree).returncode == 0
    assert run(mended, tmp_path).stdout == "True\n"
    assert run([*pip, "uninstall", "-y", "megaflow"], tree).returncode == 0
    assert run(mended, tmp_path).stdout == "False\n"
    assert not [path for name in ("torchvision_mend", "megaflow_lm_eval") for path in (tmp_path / "env").rglob(f"*{name}*")]


@pytest.mark.parametrize("name", ["torchvision_mend", "megaflow_lm_eval"])
def test_it_imports_nothing(name):
    code = f"""
        import sys
        sys.modules.pop("{name}", None)  # an installed megaflow has imported it by now
        before = set(sys.modules)
        import {name}
        print(*set(sys.modules) - before)
    """
    assert python(code, SITE) == name


def test_an_lm_eval_that_is_too_old_is_told(tmp_path):
    for package in ("lm_eval", "lm_eval/api", "lm_eval/models"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "lm_eval/api/registry.py").write_text("MODEL_REGISTRY = {}\n")
    code = "import sys; sys.stderr = sys.stdout; import megaflow_lm_eval; import lm_eval.models"
    said = python(code, tmp_path, SITE)
    assert said.startswith("megaflow: no model of this lm_eval (") and said.endswith("pip install 'lm-eval>=0.4.10'")


def torchvision_with(folder: Path, has_ops: str) -> None:
    """A torchvision of the same shape, whose `_has_ops()` is the expression given."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from . import extension, _meta_registrations\n")
    (package / "extension.py").write_text(f"def _has_ops():\n    return {has_ops}\n")
    (package / "_meta_registrations.py").write_text("")


# the last one raises: the mend must let the import go on all the same
@pytest.mark.parametrize(("has_ops", "declared"), [("True", "False False"), ("False", "True True"), ("1 / 0", "False False")])
def test_only_a_torchvision_without_operators_is_mended(tmp_path, has_ops, declared):
    torchvision_with(tmp_path, has_ops)
    code = """
        import torchvision_mend, torch, torchvision
        print(torchvision.__file__, *(hasattr(torch.ops.torchvision, name) for name in ("nms", "qnms")))
    """
    assert python(code, tmp_path, SITE) == f"{tmp_path}/torchvision/__init__.py {declared}"


def test_streaming_torchvision_and_transformers_import_beside_this_torch():
    code = """
        import torchvision_mend  # an installed megaflow does this at the start of every interpreter
        import torch, torchvision
        from streaming import StreamingDataset
        from transformers import AutoImageProcessor, AutoModel, GPT2Config, GPT2LMHeadModel, ViTImageProcessorFast
        config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8)
        tokens = torch.zeros(1, 3, dtype=torch.long)
        print(tuple(GPT2LMHeadModel(config)(tokens).logits.shape), type(AutoModel.from_config(config)).__name__)
        print(torchvision.transforms.Resize(4)(torch.zeros(3, 8, 8)).shape[-1])
        print(ViTImageProcessorFast(size={"height": 4, "width": 4})(torch.zeros(3, 8, 8))["pixel_values"][0].shape[-1])
        if not torchvision.extension._has_ops():
            try:
                torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
            except RuntimeError as error:
                print("custom C++ ops" in str(error))
        else:
            print(True)
    """
    assert python(code, SITE).split("\n") == ["(1, 3, 11) GPT2Model", "4", "4", "True"]


# The targets of the Makefile


@pytest.mark.parametrize("target", ["quickstart", "char", "test", "test-all", "lint", "format"])
def test_every_target_installs_first(tree, target):
    commands = run(["make", "-n", target], tree).stdout.splitlines()
    assert commands[0] == "bash tools/install.sh" and len(commands) > 1


def test_pyproject_holds_only_the_build_system_and_tools():
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert set(tomllib.load(file)) == {"build-system", "tool"}


def test_the_path_runs_the_commands_in_order(tmp_path):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "run_path.sh", tmp_path / "tools")
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name in ("python", "megaflow"):
        (commands / name).write_text('#!/bin/sh\n[ "$1" != distill ] || exit 7\n')
        (commands / name).chmod(0o755)
    result = run(["bash", "tools/run_path.sh", "char"], tmp_path)
    headings = [line.split("  ", 1)[1] for line in result.stdout.splitlines() if line]
    assert result.returncode == 7 and headings == [
        "python tools/kjv_text.py runs/char/text",
        "megaflow prepare configs/char/data.yaml",
        "megaflow pretrain configs/char/flow.yaml",
        "megaflow pretrain configs/char/autoregressive.yaml",
        "megaflow distill configs/char/flow_map.yaml",
    ], "a command that fails ends the path"
