"""The model card (README.md) of a conversion: what it is, how it was made and what was measured."""

from __future__ import annotations

import json
from typing import Any

from tidar.train.config import DRAFTING

OBJECTIVES = {
    "lossless": "a drafter was trained; the base model's weights are unchanged",
    "paper": "all weights were trained with the loss of TiDAR (arXiv 2511.08923)",
    "ar": "plain fine-tuning, for comparison",
    "block-diffusion": "all weights were trained without an autoregressive term (arXiv 2503.09573), for comparison",
}

USE = """It drafts by one-step masked diffusion and verifies autoregressively in the same forward pass:

```python
from tidar import TidarModel

m = TidarModel.from_pretrained("FOLDER")
print(m.generate("Hello").text)
```"""


def card(record: dict[str, Any]) -> str:
    """Markdown from a provenance record; see provenance.py."""
    summary, options = record["summary"], record["options"]
    data = summary["data"]
    files = ", ".join(data["files"]) or "see answers"
    front = {"base_model": summary["base"], "library_name": "tidar", "tags": ["tidar", "speculative-decoding"]}
    rows = [
        ("base", summary["base"]),
        ("objective", f"{options['objective']}: {OBJECTIVES.get(options['objective'], '')}"),
        ("block size", options["block_size"]),
        (
            "data",
            f"{data['samples']:,} samples, {data['tokens']:,} tokens ({files})",
        ),
        ("answers", data["answers"]),
        ("steps", f"{summary['steps']:,} of {options['steps']:,}, {record['rows_consumed']:,} rows in all"),
        ("sequence length", options["sequence_length"]),
        ("device", f"{summary['processes']} x {summary['device']}, {summary['seconds']:,.0f} s in the last run"),
        ("versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())),
        ("commit", record["commit"] or "not recorded"),
    ]
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items()) + "---",
        f"# TiDAR conversion of {summary['base']}",
        USE if options["objective"] in DRAFTING else "It drafts nothing: it was made to be compared with.",
        "## Measured\n\n" + _measured(record),
        "## How it was made\n\n" + _table(("", ""), rows),
        f"```\n{record['command']}\n```\n\n[training.json](training.json) has all options, the curve and the "
        "fingerprints of the data files.",
    ]
    return "\n\n".join(parts) + "\n"


def _measured(record: dict[str, Any]) -> str:
    options, measured = record["options"], record["measured"]
    if not measured:
        return "Nothing was: no `measure_prompts` were given."
    rows = [
        (
            m["draft_length"],
            f"**{m['tokens_per_forward']:.2f}**",
            " ".join(f"{rate:.2f}" for rate in m["acceptance"]),
            f"{m['tokens']:,}",
        )
        for m in measured
    ]
    conditions = (
        f"Real decoder, greedy, chat template applied where there is one, first {options['measure_count']} prompts of "
        f"{options['measure_prompts']}, at most {options['measure_tokens']} new tokens; prefills count as forwards."
    )
    header = ("draft length", "tokens per forward", "steps in which drafts 2, 3, ... stood", "tokens")
    return _table(header, rows) + "\n\n" + conditions


def _table(header: tuple, rows: list[tuple]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
