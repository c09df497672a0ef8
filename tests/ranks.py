"""Runs conversions in one process of several: RANK, WORLD_SIZE, ... are set; argv[1] is a JSON list of options."""

import faulthandler
import json
import sys
from pathlib import Path

import torch

from tidar.train.config import TrainConfig
from tidar.train.convert import convert

torch.set_num_threads(1)
faulthandler.dump_traceback_later(200, exit=True)  # should both wait for each other
PATHS = ("output", "measure_prompts")
for given in json.loads(Path(sys.argv[1]).read_text()):
    paths = {name: Path(given[name]) for name in PATHS if given.get(name)}
    convert(TrainConfig(**{**given, **paths, "data": [Path(p) for p in given["data"]]}))
torch.distributed.destroy_process_group()
