"""Which requests draft in a step, asked of the scheduler's class on stand-ins for requests."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from tidar.vllm.scheduler import TidarScheduler
from tidar.vllm.shapes import Curve, Shape

SHAPE = Shape(4, 2)


def request(tokens, computed, placeholders=0, chunk=False):
    params = SimpleNamespace(extra_args=None, logprobs=None)
    return SimpleNamespace(
        num_tokens=tokens, num_computed_tokens=computed, num_output_placeholders=placeholders, is_prefill_chunk=chunk,
        spec_token_ids=[], sampling_params=params, use_structured_output=False,
    )  # fmt: skip


def scheduler(running, free=1000, **queues):
    made = object.__new__(TidarScheduler)
    groups = [SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))]
    vars(made).update(
        running=running, waiting=[], admits=True, curve=Curve(((8, SHAPE),)),
        max_num_running_reqs=8, max_num_scheduled_tokens=512, max_model_len=256,
        kv_cache_config=SimpleNamespace(kv_cache_groups=groups),
        kv_cache_manager=SimpleNamespace(block_pool=SimpleNamespace(get_num_free_blocks=lambda: free)),
        **queues,
    )  # fmt: skip
    return made


@pytest.mark.parametrize(
    ("given", "drafts"),
    [
        (request(20, 19), True),
        (request(20, 31, placeholders=12), True),  # a step is in flight
        (request(20, 8), False),
        (request(20, 19, chunk=True), False),  # the last token of a prompt, or of what a preempted request had
    ],
)
def test_prompts_do_not_draft_even_if_one_token_is_left(given, drafts):
    scheduler([given])._place(SHAPE)
    assert len(given.spec_token_ids) == (SHAPE.slots - 1 if drafts else 0)


def test_all_that_wait_are_counted():
    waiting, skipped = [request(30, 0)], [request(100, 0), request(1000, 0)]
    for name in ("skipped_waiting", "kv_holding_waiting"):
        made = scheduler([request(20, 19), request(50, 10)], **{name: skipped})
        made.waiting = waiting
        assert made._prompt_tokens() == 40 + 30 + 1100
        made.max_num_running_reqs = 4
        assert made._prompt_tokens() == 40 + 30 + 100


def test_a_drafting_step_leaves_room_for_all_that_run():
    running = [request(20, 19)] * 5  # each step takes a block of each, and two more may be needed
    assert scheduler(running, free=15)._has_room(SHAPE, 0)
    assert not scheduler(running, free=14)._has_room(SHAPE, 0)
    assert not scheduler(running, free=15)._has_room(SHAPE, 1)
