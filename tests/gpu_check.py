"""What only a GPU can show: kernels, captured steps and their speed. `make gpu-check`; under 8 minutes on one H100.

Greedy output of the fast engine must be that of the reference engine: token for token in float32, and in bfloat16 up to
places where the reference's own logits of the two tokens lie within rounding of each other.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tidar import TidarModel
from tidar.bench import shapes, slots
from tidar.config import TidarConfig
from tidar.decode import block_diffusion, engine, runner
from tidar.decode.block_diffusion import BlockDiffusion, Denoiser
from tidar.decode.engine import Engine, Limits
from tidar.decode.planner import AutoPlanner
from tidar.decode.record import gather
from tidar.decode.runner import Runner
from tidar.decode.step import Plan
from tidar.errors import TidarError
from tidar.kernels.weights import KINDS
from tidar.model.network import Network
from tidar.prompts import encode_prompt
from tidar.sampling import Reveal, SamplingParams

HERE = Path(__file__).parent
runner.GraphRunner.patient = False  # everything is captured at once, as captures are what is checked
TIE = 0.25
"""Two bfloat16 roundings of a logit between 16 and 32."""
TEXTS = (
    "Tom has 5 bags with 7 marbles each. How many marbles does he have?",
    "Write a short story about a lighthouse keeper.",
    "List the planets of the solar system.",
    "Why is the sky blue?",
    "What is wrong with this text? " + "The keeper climbed the stairs and lit the lamp, as he did every evening. " * 70,
)
"""Five, so that prefills are cut; the last is too long for the fused backbone, but not for a captured prefill."""


def decode(
    network: Network, prompts: list[list[int]], plan: object, new: int, batch: int
) -> tuple[list[list[int]], float]:
    answers, forwards = {}, 0
    for updates in Engine(network, plan).run(prompts, Limits(new, network.eos_ids), batch):
        for update in updates:
            answers[update.answer.row] = update.answer
    forwards = sum(a.forwards for a in answers.values())
    tokens = [answers[i].token_ids for i in range(len(prompts))]
    return tokens, sum(map(len, tokens)) / forwards


def reference(network: Network, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Plain decoding by the stock modules, eagerly."""
    fused, network.fused, fast = network.fused, None, engine.runner_for
    engine.runner_for = Runner
    try:
        return decode(network, prompts, Plan(1), new, len(prompts))[0]
    finally:
        network.fused, engine.runner_for = fused, fast


@torch.inference_mode()
def tie(network: Network, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """How far the reference's logits of the first two different tokens lie apart; 0 if there are none."""
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if place is None:
        return 0.0 if len(ours) == len(theirs) else float("inf")
    ids = torch.tensor([prompt + theirs[:place]], device=network.device)
    logits = network.lm(ids).logits[0, -1].float()
    return float((logits[theirs[place]] - logits[ours[place]]).abs())


PLANS = (
    Plan(1),
    Plan(8),
    Plan(8, outcomes=3, alternatives=16),
    Plan(16, outcomes=6, alternatives=16),
    AutoPlanner(SamplingParams()),
)


def check_parity(dtype: str, plans: Sequence[Plan | AutoPlanner] = PLANS, weights: str | None = None) -> None:
    try:
        model = TidarModel.from_pretrained("smollm2-135m", dtype=dtype, weights=weights)
        network, what = model.network, "smollm2-135m"
        prompts = [encode_prompt(model.tokenizer, text) for text in TEXTS]
    except TidarError:
        network, what = shapes.build("random:smollm2-135m", True, None, dtype, weights), "random weights"
        prompts = [list(range(5 + i, 40 + 9 * i)) for i in range(4)]
    precision = dtype if weights is None else f"{dtype}, {weights} weights,"
    wanted = reference(network, prompts, 96)
    for plan in plans:
        for batch in (1, len(prompts)):
            got, per_forward = decode(network, prompts, plan, 96, batch)
            gaps = [tie(network, *row) for row in zip(prompts, got, wanted, strict=True)]
            same = sum(a == b for a, b in zip(got, wanted, strict=True))
            shape = "auto"
            if isinstance(plan, Plan):
                shape = f"K={plan.draft_length} outcomes={plan.blocks} alternatives={plan.alternatives}"
            print(
                f"{what} {precision} {shape} batch {batch}: {same}/{len(got)} identical, {per_forward:.2f} tokens per "
                f"forward, largest gap where they part {max(gaps):.3f}",
                flush=True,
            )
            assert max(gaps) <= (0 if dtype == "float32" else TIE), "the fast engine says something else"


def check_block_diffusion() -> None:
    """Captured forwards decode what eager ones of the stock modules do (random weights, float32), and their speed."""
    network = shapes.build("random:smollm2-135m", False, None, "float32")
    network.config = TidarConfig(8, "block-diffusion", mask_token_id=0)
    prompts = [list(range(5 + i, 40 + 9 * i)) for i in range(5)]

    def run(name: str, batch: int) -> tuple[list[list[int]], int]:
        engine, answers = BlockDiffusion(network, Reveal.parse(name)), {}
        for updates in engine.run(prompts, Limits(64, frozenset([7])), batch):
            answers.update({update.answer.row: update.answer for update in updates})
        ordered = [answers[i] for i in range(len(prompts))]
        return [a.token_ids for a in ordered], sum(a.forwards for a in ordered)

    fast = block_diffusion.denoiser_for
    for name in ("max-confidence", "fixed-2", "confidence>0.001"):
        for batch in (1, 5):
            got, _ = run(name, batch)
            torch.cuda.synchronize()
            started = time.perf_counter()
            got, forwards = run(name, batch)
            seconds, fused = time.perf_counter() - started, network.fused
            block_diffusion.denoiser_for, network.fused = Denoiser, None
            try:
                wanted, _ = run(name, batch)
            finally:
                block_diffusion.denoiser_for, network.fused = fast, fused
            same = sum(a == b for a, b in zip(got, wanted, strict=True))
            ms = 1e3 * seconds * batch / forwards
            print(f"block diffusion {name} batch {batch}: {same}/5 identical, {ms:.3f} ms a forward", flush=True)
            # Of random weights the confidences are nearly equal: one may go the other way.
            assert same >= 4, "captured forwards decode something else"


def check_trace() -> None:
    """Forwards that are looked at run eagerly, and say what captured ones say."""
    try:
        model = TidarModel.from_pretrained("smollm2-135m", dtype="float32")
    except TidarError:
        return
    for options in ({"draft_length": 8}, {"draft_length": 16, "outcomes": 6, "alternatives": 8}, {"mode": "ar"}):
        answer = model.generate(TEXTS[0], max_new_tokens=64, **options)
        run = gather(model.trace(TEXTS[0], max_new_tokens=64, **options))
        assert run["token_ids"] == answer.token_ids, "a trace says something else"
        assert all(outcome["tokens"] for step in run["steps"] for outcome in step["outcomes"])
        print(f"trace {options}: {run['forwards']} forwards, the engine's own {answer.forwards}", flush=True)


def main() -> None:
    assert torch.cuda.is_available(), "this needs a CUDA GPU"
    torch.set_float32_matmul_precision("highest")  # float32 parity means float32, whatever the environment says
    started = time.time()
    subprocess.run([sys.executable, HERE / "kernel_twins.py", "8"], check=True)
    if sanitizer := shutil.which("compute-sanitizer"):
        command = [
            sanitizer,
            "--tool",
            "memcheck",
            "--error-exitcode",
            "1",
            sys.executable,
            HERE / "kernel_twins.py",
            "1",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print("compute-sanitizer: clean")
    for dtype in ("float32", "bfloat16"):
        check_parity(dtype)
    for kind in KINDS:
        check_parity("bfloat16", (Plan(1), Plan(8), Plan(16, outcomes=6)), kind)
    check_block_diffusion()
    check_trace()
    network = shapes.build("random:smollm2-135m", True, None, None)
    for length, outcomes, alternatives in slots.STEPS:
        plan = Plan(length, outcomes=outcomes, alternatives=alternatives)
        print(f"step {plan.slots} slots (K={length}): {slots.time_step(network, plan, 1024).seconds * 1e3:.3f} ms")
    print(f"gpu check passed in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
