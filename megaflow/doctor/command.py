"""`megaflow doctor`: what a run needs and whether it is here, a line each, with what mends it.

    megaflow doctor                                       this host
    megaflow doctor CONFIG a.b=c                          and what this config needs of it
    srun --ntasks-per-node=1 megaflow doctor CONFIG       on every host of an allocation, and between them; torchrun does as well

findings.py has what is said, host.py looks at a host, config.py at what a config needs, ranks.py at what lies
between processes. Whatever hangs is given up after its time; all of it ends within some minutes.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megaflow.doctor import config as of_config
from megaflow.doctor import host as of_host
from megaflow.doctor import ranks as of_ranks
from megaflow.doctor.findings import Check, Finding, examined, first_line, refused, within
from megaflow.errors import UserError

READ, LIMIT = 60.0, 180.0
"""Seconds that reading a config may take, and all checks of a host together."""
FIRST_TELLS = 5.0
"""Seconds that the others give the first process to say what it has found, before they say that they have lost it."""


def doctor(place: str = ".", config: str | None = None, overrides: Sequence[str] = (), as_json: bool = False) -> int:
    """Print what is here and what is missing. place: the folder that runs are to lie in. Returns 1 if something that a run needs is
    missing, else 0; of several processes the first one speaks, and the others return 0.

    Raises UserError on a process that is not the first and has lost the others.
    """
    words = of_ranks.described(os.environ)
    if words is None:
        return tell(here(Path(place), config, overrides) + alone(os.environ), as_json)
    os.environ.update(words)
    first, mine = os.environ["RANK"] == "0", list[Finding]()
    found: list[Finding] | None = None
    try:
        with of_ranks.meeting(of_ranks.PATIENCE, of_ranks.LOST) as mesh:
            from megaflow.parallel.mesh import exchanged

            if os.environ.get("LOCAL_RANK", "0") == "0":
                mine = here(Path(place), config, overrides, mesh.world.size)
            everyones = exchanged(mesh, (of_ranks.host(), mine))
            known = within(READ, lambda: facts(config, overrides))
            found = merged(everyones) + of_ranks.between(mesh, Path(place), known)
            if any(finding.name == of_ranks.HANGS for finding in found):
                code = tell(found, as_json) if first else 0
                sys.stdout.flush()
                os._exit(code)  # a thread that waits in NCCL would keep the process from its end
    except (UserError, RuntimeError, ImportError, OSError) as error:
        if found is None:
            lost = error if isinstance(error, UserError) else UserError(f"{first_line(error)}; {of_ranks.INTERFACES}")
            if not first:
                time.sleep(FIRST_TELLS)
                raise UserError(f"doctor: {lost}") from None
            found = [*(mine or here(Path(place), config, overrides)), refused("ranks", lost)]
    return tell(found or [], as_json) if first else 0


def here(place: Path, config: str | None, overrides: Sequence[str], processes: int = 1) -> list[Finding]:
    """What there is to say of this host, and of a config on it."""
    if config is None:
        return examined(of_host.checks(place), LIMIT)
    try:
        loaded, vocab = within(READ, lambda: of_config.read(config, list(overrides)))
    except Exception as error:  # without torch no config is read, and the checks say so
        lost = error if isinstance(error, UserError) else UserError(f"{config} cannot be read ({first_line(error)})")
        return [*examined(of_host.checks(place), LIMIT), refused("config", lost)]
    wants = loaded.config.parallel.compile, loaded.config.log.wandb != "off"
    config_checks: list[Check] = of_config.checks(loaded, vocab, processes)
    return examined(of_host.checks(place, *wants) + config_checks, LIMIT)


def alone(environment: "os._Environ[str] | dict[str, str]") -> list[Finding]:
    """A word where one process is alone in an allocation of several hosts: of the others it has seen nothing."""
    nodes = int(environment.get("SLURM_JOB_NUM_NODES") or 1)
    if nodes < 2:
        return []
    mend = f"srun --nodes={nodes} --ntasks-per-node=1 megaflow doctor looks at all of them, and at what lies between"
    return [Finding("ranks", "warn", f"this is one of {nodes} hosts of the allocation", mend)]


def facts(config: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """What processes of a run must agree on."""
    from megaflow.config.load import flatten, load
    from megaflow.train.run import source_digest, versions

    found: dict[str, Any] = {f"the version of {name}": value for name, value in versions().items()}
    found |= {"the source of megaflow": source_digest(), "GPU": of_ranks.gpu()}
    if config is not None:
        try:
            found |= flatten(load(config, list(overrides)).config)
        except UserError as error:
            found["config"] = str(error)
    return found


def merged(everyones: list[tuple[str, list[Finding]]]) -> list[Finding]:
    """The findings of several hosts, (host, findings): what is well everywhere is said once, in the first one's words; what differs names
    the hosts."""
    hosts = list(dict.fromkeys(host for host, findings in everyones if findings))
    alike: dict[str, dict[tuple[str, str, str], list[str]]] = {}
    kept: dict[tuple[str, tuple[str, str, str]], Finding] = {}
    for host, findings in everyones:
        for finding in findings:
            # two speeds that are well are the same
            key: tuple[str, str, str] = (finding.state, "" if finding.state == "ok" else finding.found, finding.mend)
            alike.setdefault(finding.name, {}).setdefault(key, []).append(host)
            kept.setdefault((finding.name, key), finding)
    found = []
    for name, groups in alike.items():
        for key, where in groups.items():
            finding = kept[name, key]
            everywhere = len(where) == len(hosts)
            found.append(finding if everywhere else replace(finding, found=f"{finding.found} (on {of_ranks.listed(where)})"))
    return found


def tell(findings: list[Finding], as_json: bool) -> int:
    """Print the findings. Returns the exit code."""
    missing = sum(finding.state == "missing" for finding in findings)
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings], "missing": missing}, indent=1), flush=True)
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            said = f"{finding.state:<8} {finding.name:<{width}}  {finding.found}"
            print(said + (f"; {finding.mend}" if finding.mend else ""), flush=True)
    return 1 if missing else 0
