"""What made a checkpoint: data, command, commit, versions, device, curve, measurements."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import torch
import transformers

from tidar import __version__
from tidar.sources import HUB, local_files, source_name
from tidar.train.config import TrainConfig

if TYPE_CHECKING:
    from tidar.train.trainer import ConversionTrainer


def provenance(config: TrainConfig, trainer: ConversionTrainer, facts: dict[str, Any], seconds: float) -> dict:
    """The content of training.json. `summary` also goes into the checkpoint's own config."""
    device = trainer.args.device
    options = {k: _plain(v) for k, v in asdict(config).items()}
    options["data"] = [source_name(source) for source in config.data]
    summary = {
        "base": config.model,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "seed": config.seed,
        "data": facts,
        "processes": trainer.args.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": {
            "tidar": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "python": platform.python_version(),
        },
    }
    sources = [source for source in (*config.data, config.answers, config.measure_prompts) if source is not None]
    local = [source for source in sources if not str(source).startswith(HUB)]
    files = [(source, file) for source in local for file in local_files(source) if file.is_file()]
    return {
        "summary": summary,
        "options": options,
        "command": _command(),
        "commit": commit(),
        "files": {_name_in(source, file): _fingerprint(file) for source, file in files},
        "rows_consumed": trainer.consumed,
        "measured": [measured.to_dict() for measured in trainer.measured],
        "curve": trainer.state.log_history,
    }


def commit() -> str | None:
    """The commit of tidar's own code, with + if files differ from it; None where it is installed without git."""
    here = Path(__file__)

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not git("ls-files", here.name):
            return None
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except OSError:  # no git
        return None


def _command() -> str:
    """The command line, without the path of the program; `python -m tidar.cli.main` is `tidar`."""
    program = Path(sys.argv[0]).name
    return shlex.join(["tidar" if program == "main.py" else program, *sys.argv[1:]])


def _name_in(source: Path, file: Path) -> str:
    return f"{source.name}/{file.relative_to(source).as_posix()}" if source.is_dir() else file.name


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
