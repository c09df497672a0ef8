"""The ablation recipe: every run trains and is measured, and one that is in two groups does so once."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

from tidar.train.config import TrainConfig
from tiny import tiny_folder
from train_options import conversations

RECIPE = Path(__file__).parent.parent / "recipes" / "ablations"


def test_a_run_is_trained_once_and_measured_by_decoding(tmp_path):
    model = tiny_folder(tmp_path / "model", mask_token=True)
    data = conversations(tmp_path / "rows.jsonl", 12)
    base = {"data": [str(data)], "self-generate": False, "steps": 2, "batch-size": 2, "sequence-length": 64}
    base |= {"block-size": 4, "rank": 2, "sampler-width": 8, "device": "cpu"}
    groups = [
        {"title": "targets", "runs": [{"name": "hard", "base": "small", "loss": "hard"}]},
        {
            "title": "lengths",
            "draft-lengths": [2, 4],
            "likelihood": True,
            "runs": [{"name": "K=4", "base": "small", "loss": "hard"}],
        },
    ]
    runs = tmp_path / "runs.yaml"
    runs.write_text(yaml.safe_dump({"bases": {"small": base}, "groups": groups}))
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"context": "say", "choices": ["1 2", "3"], "gold": 0}) + "\n")
    out, folder = tmp_path / "out.json", tmp_path / "trained"
    command = [
        sys.executable,
        RECIPE / "run.py",
        f"rows={data}:2",
        "--model",
        model,
        "--runs",
        runs,
        "--folder",
        folder,
    ]
    command += ["--answers", tmp_path / "samples.safetensors", "--out", out, "--choices", f"items={items}"]
    subprocess.run([*map(str, command), "--new-tokens", "6"], check=True, capture_output=True)
    first, second = json.loads(out.read_text())["rows"]
    assert (first["group"], first["name"], second["group"], second["name"]) == ("targets", "hard", "lengths", "K=4")
    assert len(list(folder.iterdir())) == 1
    assert first["fields"] == second["fields"]
    assert first["fields"]["loss"] == "hard"
    assert [row["draft_length"] for row in second["rows"]] == [2, 4, 8]
    assert all(row["tokens_per_forward"] >= 1 for row in second["rows"])
    assert second["training"]["seconds"] > 0
    assert second["choices"]["items"]["items"] == 1


def test_every_run_of_the_recipe_is_a_config():
    plan = yaml.safe_load((RECIPE / "runs.yaml").read_text())
    for group in plan["groups"]:
        for run in group["runs"]:
            fields = plan["bases"][run["base"]] | {k: v for k, v in run.items() if k not in ("name", "base")}
            names = {name.replace("-", "_") for name in fields}
            assert names <= set(TrainConfig.__dataclass_fields__), names
