"""Say what this installation has, lacks and hides.

    python -m scripts.doctor

Ends with status 1 if a dependency is broken or a stranger's package hides one of ours, else 0. It imports nothing of
the project, so that it also runs where the project does not.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = "distill-lab"
PACKAGES = ("condense", "distill_feat", "kd", "distilltool", "condenser", "NCFM", "utils", "config", "scripts")
MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml"}  # distributions that are imported by another name
REPAIR = "run `bash scripts/setup_env.sh` and use the Python of .venv"
FOLDERS = {
    "dataset": "put your data sets here, each where dataset.data_dir of its config says",
    "models/model/bert-base-uncased": "put that encoder's config.json, vocab.txt and model.safetensors here; "
    "not needed with network.model_path=scratch:tiny",
    "pretrained_models": "nothing to do: condense/pretrain_script_text.py writes teachers here",
    "results": "nothing to do: runs are written here",
}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM")
# Run with -P, which leaves the current folder out: what a program that torchrun starts by its path finds.
LOCATE = """
import importlib.util, json, sys
specs = {name: importlib.util.find_spec(name) for name in sys.argv[1:]}
print(json.dumps({n: s and (s.origin or list(s.submodule_search_locations)[0]) for n, s in specs.items()}))
"""


def command_line() -> argparse.ArgumentParser:
    """No options but --help."""
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


def main(words: Sequence[str] = ()) -> int:
    """Print the report. Returns the exit status."""
    command_line().parse_args(words)
    if sys.version_info < (3, 11):  # noqa: UP036 - the doctor is what one runs with the wrong Python
        print(f"PROBLEM  Python {platform.python_version()}: 3.11 or newer is needed: {REPAIR}")
        return 1
    versions = list(dependencies())
    problems = [*name_problems(), *(problem for _, _, problem in versions if problem)]
    sections = {
        "System": system(),
        "Dependencies": [f"{name:<14}{found}" for name, found, _ in versions],
        "Hardware": hardware(),
        "Folders": folders(),
        "Hugging Face": hub(),
    }
    for title, lines in sections.items():
        print(title, *(f"  {line}" for line in lines), "", sep="\n")
    for problem in problems:
        print(f"PROBLEM  {problem}")
    print(f"{len(problems)} problem(s)" if problems else "healthy: nothing broken, nothing hidden")
    return 1 if problems else 0


def name_problems() -> Iterator[str]:
    """One line for every package of ours that a program would not find in this repository."""
    command = [sys.executable, "-P", "-c", LOCATE, *PACKAGES]
    places = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for name, place in places.items():
        if place is None:
            yield f"{name}: not found: {REPAIR}"
        elif Path(place).resolve() != REPOSITORY / name / "__init__.py":
            owners = [owner for owner in packages_distributions().get(name, ()) if owner != PROJECT]
            cure = f"uninstall {', '.join(owners)}" if owners else "take its folder off PYTHONPATH"
            yield f"{name}: another package hides ours: {place}: {cure}, or {REPAIR}"


def dependencies() -> Iterator[tuple[str, str, str]]:
    """Name, version and problem ("" if none) of every package that the project requires."""
    try:
        requirements = distribution(PROJECT).requires or []
    except PackageNotFoundError:
        yield PROJECT, "not installed", f"{PROJECT}: not installed: {REPAIR}"
        return
    from packaging.requirements import Requirement

    for need in map(Requirement, requirements):
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            found, problem = state(need.name)
            if not problem and not need.specifier.contains(found, prereleases=True):
                problem = f"{found} is outside {need.specifier}"
            yield need.name, found, f"{need.name}: {problem}: {REPAIR}" if problem else ""


def state(name: str) -> tuple[str, str]:
    """The version of an installed distribution, and what is wrong with it ("" if it can be imported)."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return "absent", "not installed"
    try:
        importlib.import_module(MODULES.get(name.lower(), name))
    except Exception as error:  # a broken installation can raise anything
        return found, f"cannot be imported ({type(error).__name__}: {str(error)[:200]})"
    return found, ""


def system() -> list[str]:
    """Python, operating system, repository."""
    python = f"Python {platform.python_version()}  {sys.executable}"
    return [python, platform.platform(), f"repository {REPOSITORY}"]


def hardware() -> list[str]:
    """CPU cores and threads; GPUs and NCCL as torch sees them (dependencies() has imported it)."""
    allowed = len(os.sched_getaffinity(0))
    lines = [f"{allowed} of {os.cpu_count()} CPU cores allowed"]
    lines += [f"{name}={os.environ[name]}" for name in THREADS if name in os.environ]
    torch = sys.modules.get("torch")
    if torch is None:
        return [*lines, "GPU: not known without torch"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index} {device.name}, {device.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append("no CUDA device: programs run on the CPU, with gloo")
    elif torch.distributed.is_nccl_available():
        lines.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    return lines


def folders() -> list[str]:
    """The folders that programs read and write by default, and the free disk."""
    lines = [
        f"{name}: {'present' if (REPOSITORY / name).exists() else f'absent ({advice})'}"
        for name, advice in FOLDERS.items()
    ]
    return [*lines, f"{shutil.disk_usage(REPOSITORY).free / 2**30:.0f} GiB free"]


def hub() -> list[str]:
    """Where encoders given by name come from."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    offline = os.environ.get("HF_HUB_OFFLINE", "not set (1 forbids the download of encoders given by name)")
    return [f"{cache}: {'present' if cache.exists() else 'absent'}", f"HF_HUB_OFFLINE: {offline}"]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
