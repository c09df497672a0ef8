"""`tidar train`: a causal LM and data in, a TiDAR checkpoint out."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor

from tidar.api import TidarModel
from tidar.config import BlockAttention, Objective, TidarConfig
from tidar.decode.engine import Limits
from tidar.errors import TidarError
from tidar.model import hub
from tidar.model.compat import probe
from tidar.model.drafter import Drafter, DrafterSpec
from tidar.model.network import Network
from tidar.sources import BadRows, Reading, source_name
from tidar.train.card import card
from tidar.train.checkpoint import Cursor, digest
from tidar.train.config import TrainConfig
from tidar.train.conversion import Conversion, LossOptions
from tidar.train.data import Packed, pack
from tidar.train.measure import measure, read_measure_prompts
from tidar.train.prepare import Sources, answer_prompts, encode_given, model_card, packed_facts, recalled, report_packed
from tidar.train.provenance import provenance
from tidar.train.samples import Samples, load_samples
from tidar.train.selfgen import TEMPERATURES, Generation
from tidar.train.shard import named_once, shard, trained_weights
from tidar.train.trainer import (
    ConversionTrainer,
    join_processes,
    last_checkpoint,
    launcher_shards,
    trains_in_bf16,
)


def convert(config: TrainConfig) -> TidarModel:
    """Train a conversion and write it to `config.output`; Ctrl-C stops training early and still writes.

    Under a launcher (torchrun, accelerate launch) all processes call this. Returns the trained model; where weights are
    sharded, it is whole on the first process only.

    Raises:
        TidarError: for bad data, an impossible model or options that cannot be meant.
    """
    config.check()
    config = replace(config, fsdp=launcher_shards() or config.fsdp)
    launched = join_processes(config.device)
    if config.fsdp and not launched:
        raise TidarError("fsdp needs several processes: start with `torchrun` or `accelerate launch`")
    transformers.set_seed(config.seed)
    checkpoint = _checkpoint(config)
    model = prepare_model(config)
    # Before the data: what this model cannot do shows here, and a fresh drafter changes nothing in AR mode.
    install_conversion(config, model)
    prompts = _measure_prompts(config, model)
    packed, facts = prepare_data(config, model, resuming=checkpoint is not None)
    cursor = Cursor(0, len(packed), digest(*packed.content), config.seed, config.curve_options)
    done = 0
    if checkpoint is not None:
        cursor, done = cursor.at(checkpoint), _steps_done(checkpoint, config)
    module = prepare_module(config, model.network)
    with named_once(model.network.drafter):
        if config.fsdp:
            shard(module, trains_in_bf16(config, model.network.device))
        lengths = config.measure_draft_lengths or [config.block_size]
        limits = Limits(config.measure_tokens, model.network.eos_ids)
        decode = partial(measure, module, prompts, lengths, limits) if prompts else None
        trainer = ConversionTrainer(config, module, packed, cursor, done, config.fsdp, decode)
        started = time.time()
        trainer.run(checkpoint)
        seconds = time.time() - started
        _refuse_non_finite(module, trainer)
        weights = trained_weights(module) if config.fsdp else None
    if trainer.is_world_process_zero():
        if weights is not None:
            model = _whole(config, weights)
        _finish(model, provenance(config, trainer, facts, seconds), config)
    if launched:
        trainer.accelerator.wait_for_everyone()
    model.network.eval()
    module.uncompile()
    return model


def prepare_module(config: TrainConfig, network: Network) -> Conversion:
    """The module that trains the network."""
    return Conversion(
        network,
        loss_options(config),
        compiled=network.device.type == "cuda" if config.compiled is None else config.compiled,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def loss_options(config: TrainConfig) -> LossOptions:
    return LossOptions(
        ar=config.ar_weight,
        diffusion=config.diffusion_weight,
        marginal=config.marginal_weight,
        teacher_temperature=config.teacher_temperature,
        loss=config.chosen("loss"),
        position_weights=config.chosen("position_weights"),
        decay_gamma=config.decay_gamma,
    )


def _checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from."""
    if config.resume == "auto":
        return last_checkpoint(config.checkpoints)
    return None if config.resume is None else Path(config.resume)


def _steps_done(checkpoint: Path, config: TrainConfig) -> int:
    done = int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])
    if done >= config.steps:
        raise TidarError(f"steps is {config.steps}, but {checkpoint} has {done} steps already: nothing is left to do")
    return done


def _measure_prompts(config: TrainConfig, model: TidarModel) -> list[list[int]]:
    """Token ids of the measure prompts; those that leave no room in the model's context are refused by name."""
    if config.measure_prompts is None:
        return []
    assert model.tokenizer is not None
    prompts = read_measure_prompts(config.measure_prompts, model.tokenizer, config.measure_count)
    context = model.network.max_positions
    if context is not None and (longest := max(map(len, prompts))) >= context:
        raise TidarError(
            f"measure-prompts is {config.measure_prompts}, which has a prompt of {longest} tokens, but the model's "
            f"context is {context}"
        )
    return prompts


def _whole(config: TrainConfig, weights: dict[str, Tensor]) -> TidarModel:
    """The model again, unsharded on the CPU, with its trained weights."""
    with torch.random.fork_rng():
        model = prepare_model(replace(config, device="cpu"))
        install_conversion(config, model)
    odd = Conversion(model.network).load_state_dict(weights, strict=False).unexpected_keys
    assert not odd, odd
    return model


def _finish(model: TidarModel, record: dict[str, Any], config: TrainConfig) -> None:
    """Write the result: checkpoint or drafter, model card and provenance."""
    network, folder = model.network, config.output
    assert network.config is not None
    network.config = TidarConfig(**{**network.config.to_dict(), "provenance": record["summary"]})
    network.eval()
    model.save_pretrained(folder, with_base=config.with_base)
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "README.md").write_text(card(record))
    if config.checkpoints.is_dir() and not any(config.checkpoints.iterdir()):
        config.checkpoints.rmdir()
    print(f"wrote {folder}; try: tidar generate --model {folder} 'Hello'", file=sys.stderr)


def _refuse_non_finite(module: Conversion, trainer: ConversionTrainer) -> None:
    """All processes decide alike, though each may see its own part of the weights only."""
    trained = [p for p in module.parameters() if p.requires_grad]
    own = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
    bad = torch.tensor(sum(not bool(p.isfinite().all()) for p in own), device=trainer.args.device)
    if trainer.accelerator.reduce(bad, reduction="sum"):
        raise TidarError(
            "training diverged (some weights are not finite any more), so nothing is saved: lower --learning-rate"
        )


def prepare_model(config: TrainConfig) -> TidarModel:
    """The plain base model, in the precision that the objective trains it in."""
    dtype = training_dtype(config)
    model = TidarModel.from_pretrained(config.model, drafter="none", device=config.device, dtype=dtype)
    if model.tokenizer is None:
        raise TidarError(f"{config.model} has no tokenizer, so training data cannot be encoded")
    return model


def training_dtype(config: TrainConfig) -> str:
    """Frozen base weights can be bf16; weights that train need float32 masters (autocast does the rest)."""
    cuda = hub.resolve_device(config.device).type == "cuda"
    return "bfloat16" if cuda and config.objective == "lossless" else "float32"


def install_conversion(config: TrainConfig, model: TidarModel) -> None:
    """Give the network what its objective trains, and try whether it can. Raises TidarError if not."""
    set_up(config, model.network, free_mask_token(model) if needs_mask_token(config) else None)
    probe(config.model, model.network)


def needs_mask_token(config: TrainConfig) -> bool:
    """Whether masks are an entry of the vocabulary; `lossless` learns an embedding instead, `ar` has none."""
    return config.objective in ("paper", "block-diffusion")


def set_up(config: TrainConfig, network: Network, mask: int | None) -> None:
    """A gated drafter, or free weights and a mask token."""
    if config.objective == "lossless":
        spec = DrafterSpec(config.rank, config.alpha, config.target_modules, config.sampler_width)
        network.drafter = Drafter(network.lm, spec)
    else:
        network.lm.requires_grad_(True)
    network.config = TidarConfig(
        config.block_size, cast(Objective, config.objective), mask, cast(BlockAttention, config.block_attention)
    )


def free_mask_token(model: TidarModel) -> int:
    """A vocabulary id that text never uses: the tokenizer's own mask, a row beyond its tokens, or a reserved special.

    Raises:
        TidarError: if there is none (the lossless objective learns an embedding instead).
    """
    tokenizer, vocabulary = model.tokenizer, model.hf_model.get_input_embeddings().weight.shape[0]
    assert tokenizer is not None
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    if len(tokenizer) < vocabulary:
        return len(tokenizer)
    specials = set(tokenizer.all_special_ids)
    added = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if i not in specials}
    for word in ("mask", "reserved", "unused", "extra_id", "reponame", "filename"):
        for token_id, text in sorted(added.items()):
            if word in text.lower():
                return int(token_id)
    raise TidarError("this model has no free token to serve as the mask: use --objective lossless, which learns one")


def prepare_data(config: TrainConfig, model: TidarModel, resuming: bool = False) -> tuple[Packed, dict[str, Any]]:
    """Read, generate or reload the samples, and pack them. Returns the rows and facts about the data.

    The main process makes the samples' file; all of them map it into memory. A run that is resumed never generates
    answers in the place of those that it has seen.
    """
    sources = Sources(
        [str(path) for path in config.data],
        Reading(config.row_limit, config.stream),
        BadRows(config.skip_bad_rows),
    )
    with PartialState().main_process_first():
        samples, facts = _samples(config, model, sources, resuming)
    _refuse_beyond_context(config, model, samples)
    packed = pack(samples, config.sequence_length)
    if PartialState().is_main_process:
        report_packed(packed)
    return packed, {**facts, "bad_rows": sources.bad.count, **packed_facts(packed)}


def _refuse_beyond_context(config: TrainConfig, model: TidarModel, samples: Samples) -> None:
    """There are no positions for tokens past the context; rows may be longer, as long as documents in them are not."""
    context = model.network.max_positions
    longest = int((samples.ends - samples.starts).max(initial=0))
    if context is not None and min(longest, config.sequence_length) > context:
        raise TidarError(
            f"sequence-length is {config.sequence_length}, and the longest document has {longest} tokens, but the "
            f"model's context is {context}: make sequence-length {context} or less"
        )


def _samples(
    config: TrainConfig, model: TidarModel, sources: Sources, resuming: bool
) -> tuple[Samples, dict[str, Any]]:
    """The samples, and where they come from.

    A file named by `--answers` is read if it exists (unless an interrupted job has left it: that goes on). The default
    file in the output folder is read if it was made from the same data by the same options, else written anew.
    """
    card, named = model_card(model), config.answers
    if named is not None and named.exists():
        stored = load_samples(named, card)
        if not (stored.origin.interrupted and config.data and config.self_generate):
            return recalled(stored, sources).samples, {"files": [], "answers": f"read from {named.name}"}
    files = [source_name(name) for name in sources.names]
    main = PartialState().is_main_process
    if config.self_generate:
        path = named or config.output / "answers.safetensors"
        if main:
            answer_prompts(model, sources, _generation(config, model), path, named is None, resuming)
        return load_samples(path, card).samples, {"files": files, "answers": "self-generated"}
    path = named or config.output / "samples.safetensors"
    if main:
        encode_given(model, sources, path)
    return load_samples(path, card).samples, {"files": files, "answers": "given in the data"}


def _generation(config: TrainConfig, model: TidarModel) -> Generation:
    context = model.network.max_positions or config.sequence_length
    return Generation(
        temperatures=tuple(config.temperatures or TEMPERATURES),
        answers=config.answers_per_prompt,
        max_new_tokens=config.answer_tokens,
        max_prompt_tokens=min(config.sequence_length - config.block_size, context - 1),
        batch_size=config.generation_batch or None,
        seed=config.seed,
        seconds=None if config.generation_minutes is None else 60 * config.generation_minutes,
    )
