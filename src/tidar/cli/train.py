"""`tidar train`: convert a causal LM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging as hf_logging

from tidar.errors import TidarError
from tidar.train.convert import TrainConfig, convert

Opt = typer.Option


def train(
    output: Annotated[Path, Opt(help="Folder for the result.")],
    model: Annotated[str, Opt(help="Base model: 'smollm2-135m', a folder or a Hugging Face id.")],
    data: Annotated[list[Path] | None, Opt(help="JSONL file of prompts or conversations (repeatable).")] = None,
    objective: Annotated[
        str, Opt(help="'lossless' (gated drafter, base frozen) or 'paper' (all weights).")
    ] = "lossless",
    block_size: Annotated[int, Opt(help="K, tokens in a mask block.")] = 8,
    rank: Annotated[int, Opt(help="LoRA rank of the drafter.")] = 32,
    alpha: Annotated[float, Opt(help="LoRA alpha; scaling is alpha / rank.")] = 64.0,
    target: Annotated[
        list[str] | None, Opt(help="Linear layers to adapt, by name (repeatable) [default: all].")
    ] = None,
    sampler_width: Annotated[int, Opt(help="Width of the sampler head; 0 for none.")] = 512,
    ar_weight: Annotated[float, Opt(help="Weight of the AR term (paper).")] = 1.0,
    diffusion_weight: Annotated[float, Opt(help="Weight of the diffusion term (paper).")] = 1.0,
    marginal_weight: Annotated[float, Opt(help="Weight of the masks' own loss beside the sampler head's.")] = 0.3,
    teacher_temperature: Annotated[float, Opt(help="Below 1 sharpens the soft targets (lossless).")] = 1.0,
    self_generate: Annotated[bool, Opt(help="Let the base model answer the prompts in the data.")] = True,
    answers: Annotated[Path | None, Opt(help="File for the generated answers; read instead, if it exists.")] = None,
    answers_per_prompt: Annotated[int, Opt(help="Answers generated for each prompt.")] = 1,
    answer_tokens: Annotated[int, Opt(help="Longest generated answer.")] = 256,
    generation_batch: Annotated[int, Opt(help="Answers generated together, in each worker.")] = 8,
    generation_workers: Annotated[int, Opt(help="Processes that generate on the same device.")] = 1,
    generation_minutes: Annotated[float | None, Opt(help="Stop generating after about this long.")] = None,
    steps: Annotated[int, Opt(help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, Opt(help="Rows a step and device.")] = 8,
    accumulate: Annotated[int, Opt(help="Batches a step.")] = 1,
    sequence_length: Annotated[int, Opt(help="Tokens in a packed row.")] = 512,
    anchors: Annotated[int, Opt(help="Random mask blocks a row; 0 for sequence length / block size.")] = 0,
    learning_rate: Annotated[float | None, Opt(help="Peak rate [default: 2e-3 lossless, 1e-5 paper].")] = None,
    warmup: Annotated[int, Opt(help="Warm-up steps.")] = 50,
    log_every: Annotated[int, Opt(help="Steps between log lines.")] = 20,
    seed: Annotated[int, Opt(help="Random seed.")] = 0,
    device: Annotated[str | None, Opt(help="Torch device [default: the GPU if there is one].")] = None,
    compiled: Annotated[bool | None, Opt(help="torch.compile the layers [default: on a GPU].")] = None,
    recompute_logits: Annotated[
        bool, Opt("--recompute-logits/--keep-logits", help="Save memory by making logits twice.")
    ] = True,
) -> None:
    """Convert a causal LM: by default a small drafter is trained and the base model stays as it is."""
    if objective not in ("lossless", "paper"):
        raise TidarError(f"objective is {objective!r}, but must be 'lossless' or 'paper'")
    hf_logging.set_verbosity_error()
    config = TrainConfig(
        model=model,
        output=output,
        data=data or [],
        objective=objective,  # type: ignore[arg-type]
        block_size=block_size,
        rank=rank,
        alpha=alpha,
        target_modules=target or None,
        sampler_width=sampler_width,
        ar_weight=ar_weight,
        diffusion_weight=diffusion_weight,
        marginal_weight=marginal_weight,
        teacher_temperature=teacher_temperature,
        self_generate=self_generate,
        answers=answers,
        answers_per_prompt=answers_per_prompt,
        answer_tokens=answer_tokens,
        generation_batch=generation_batch,
        generation_workers=generation_workers,
        generation_minutes=generation_minutes,
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        sequence_length=sequence_length,
        anchors=anchors,
        learning_rate=learning_rate,
        warmup=warmup,
        log_every=log_every,
        seed=seed,
        device=device,
        compiled=compiled,
        recompute_logits=recompute_logits,
    )
    convert(config)
    typer.echo(f"wrote {output}; try: tidar generate --model {output} 'Hello'", err=True)
