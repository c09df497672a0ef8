"""Runs steps over one batch's state: eagerly on any device, as captured CUDA graphs on a GPU.

A runner keeps its buffers and graphs between runs, so that only the first answer pays for capturing (and compiling
kernels, which Triton keeps on disk).
"""

from __future__ import annotations

import gc
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tidar.decode.cache import ROUND, RowCache
from tidar.decode.step import Observer, Plan, State, StepResult, pack_prompts, prefill, prefill_rows, step
from tidar.errors import first_line, out_of_memory
from tidar.kernels.launch import triton
from tidar.layout import prefill_layout
from tidar.model.network import Network
from tidar.sampling import Logprobs, MixedParams

FUSED_ERROR, FUSED_ERROR_16_BIT = 1e-3, 0.1
"""Relative difference of the median final state that rounding explains."""
FAILURES = (RuntimeError,) if triton is None else (RuntimeError, triton.TritonError)
"""What a kernel that does not compile, or does not fit into a GPU, raises."""
MOST_GRAPHS = 256
"""Captured graphs that are kept; a server may be asked for any number of temperatures."""
CAPACITY = 1024
"""Cache room on a GPU is this times a power of two, so that the next run's prompts fit as well."""
MOST_SLOTS = 8192
"""Slots of a captured prefill, padding included. With PREFILL_WORK this bounds the memory that graphs hold: keys and
values of a prefill take at most 190 MB at the shapes of SmolLM2-135M (8192 slots) and of Qwen3-8B (1220), the logits of
its drafts some 400 MB where many short prompts come at once."""
LONGEST = 2048
"""Slots a row of a captured prefill: the mask of longer ones would outgrow their keys and values."""
PREFILL_WORK = 2e13
"""Floating-point operations of prompts that are not worth a graph: their products take as long as their launches."""

PREFILL_USES = 8
"""Prefills of a size that run eagerly before it is captured, which costs as much as several (how many is a guess): rows
that end one by one come in many sizes."""
SHRINK_SLOTS, SHRINK_ROW = 20_000, 5
"""Slots that forwards compute for places that a smaller batch would not have, until its step is captured; each place
costs so many more. On an H200 all of these take about as long as a capture, for 135M parameters."""
STAND_INS = ((2, 1), (1, 2), (4, 1), (2, 2), (1, 4))
STAND_IN_USES = 8
"""Captured prefills of other sizes that take the place of an eager one: (how many of them, how many times as wide). A
size waits STAND_IN_USES times longer for its own graph then. An eager prefill of 135M parameters takes 25 to 40 ms on
an H100, whatever its size, a captured one some 3 ms, and to capture one 32 to 55 ms on an H200, or seconds if its
kernels must be compiled (results/captures-smollm2-135m-h200)."""


class Pending:
    """A step's result, perhaps still on its way to the host."""

    def __init__(self, packed: Tensor, logprobs: Logprobs | None = None) -> None:
        self.logprobs = logprobs  # of its tokens, on the device, where the plan asks for them
        self.event: torch.cuda.Event | None = None
        self.host = packed
        if packed.is_cuda:
            self.host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self.host.copy_(packed, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def get(self) -> list[Gain]:
        """What each row gained; waits if it must."""
        step = StepResult(self.arrived())
        columns = (column.tolist() for column in (step.accepted, step.drafted, step.known, step.new))
        return [Gain(drafted, known, new[:accepted]) for accepted, drafted, known, new in zip(*columns, strict=True)]

    def arrived(self) -> Tensor:
        """The tensor on the host; waits if it must."""
        if self.event is not None:
            self.event.synchronize()
        return self.host


class Admitted(NamedTuple):
    """Prefills that are on their way, each [rows] first tokens."""

    pieces: list[Pending]

    def tokens(self) -> list[int]:
        """Every row's first token; waits if it must."""
        return [token for piece in self.pieces for token in piece.arrived().tolist()]


class Gain(NamedTuple):
    """A row's share of a step: drafts that were judged, how many of them were certain, and the new tokens."""

    drafted: int
    known: int
    tokens: list[int]


class Runner:
    """Steps of one network over one state. The eager runner; see `GraphRunner` for the fast one."""

    captures = False
    """Whether forwards are CUDA graphs."""
    lag = 0
    """Forwards that are under way before the first of them is read back."""
    prefill_forwards = 0.1
    """What a prefill costs beside its prompts' own work, in forwards."""
    observer: Observer | None = None
    """Is shown every eager forward."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.state: State | None = None
        self.active: list[bool] = []
        self.busy = False

    def prepare(self, rows: int, capacity: int, plan: Plan) -> State:
        """A state for a new run, of at least this size; no row is active."""
        self.active = []
        self.state = State.empty(rows, capacity, plan.draft_length, self.network, not plan.params.greedy)
        return self.state

    def batch_for(self, rows: int) -> int:
        """Batch size that `rows` running rows should be compacted to."""
        return rows

    def ready(self, plan: Plan, rows: int) -> bool:
        """Whether a step can run at once; else it is captured first, which takes as long as tens of steps."""
        return True

    def shrinks(self, plan: Plan, places: int, rows: int) -> bool:
        """Whether a batch of `places` that needs only `rows` for its next forward should be compacted to them."""
        return True

    @torch.inference_mode()
    def set_active(self, active: list[bool]) -> None:
        """Say which of the first rows run."""
        assert self.state is not None
        if active != self.active:
            send(torch.tensor(active), self.state.active[: len(active)])
            self.active = list(active)

    def admit(self, prompts: list[list[int]], rows: list[int], places: list[int], plan: Plan) -> Admitted:
        """Prefill the prompts of job rows `rows` and let them run in `places`."""
        assert self.state is not None
        joined = prefill(self.network, prompts, rows, plan, self.observer)
        self.state.put_rows(torch.tensor(places, device=self.state.active.device), joined)
        self.active = []  # they are active on the device, whatever was said last
        return Admitted([Pending(joined.drafts[:, 0], joined.logprobs)])

    def step(self, plan: Plan, rows: int, longest: int) -> Pending:
        """One forward over the first `rows` rows; `longest` is the largest of their lengths, known as nothing lags."""
        assert self.state is not None
        state = self.state.first(rows, plan)
        return Pending(step(self.network, state, plan, longest, self.observer).packed, state.logprobs)


def _lasting(plan: Plan) -> bool:
    """Whether a plan comes often enough to be captured: rows that want different things meet once."""
    return plan.logprobs is None and not isinstance(plan.params, MixedParams)


def send(values: Tensor, to: Tensor) -> None:
    """Copy a host tensor to the device, in the order of its work and without waiting for it."""
    to.copy_(values.pin_memory() if to.is_cuda else values, non_blocking=True)


class Graph(Protocol):
    """A torch.cuda.CUDAGraph, or what stands for one in tests."""

    def replay(self) -> None: ...


class Captured(NamedTuple):
    """A graph, the tensor it leaves its result in, and the one it reads (None for a step, which reads the state)."""

    graph: Graph
    result: Tensor
    inputs: Tensor | None = None


class _Size(NamedTuple):
    """Key of a captured prefill: what of its plan matters, its rows, and the slots of each, both powers of two."""

    plan: Plan
    rows: int
    slots: int


class GraphRunner(Runner):
    """Every (plan, batch size) is captured once as a CUDA graph and then replayed; so is every size of a prefill.

    Plans that a server makes for a few forwards only (see `_lasting`) run eagerly.
    Graphs never run at the same time, so they share one memory pool. A prefill's keys and values live in it until the
    graph itself has copied them to the rows' places.
    """

    captures = True
    lag = 1
    patient = True
    """Whether what comes rarely is not captured, as that takes longer than to do without."""
    prefill_forwards = 2.0  # an estimate: on an H200 135M has first tokens of 4 rows in 6 ms, and a forward takes 0.7

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.graphs: OrderedDict[tuple, Captured] = OrderedDict()
        self.met = Counter[tuple]()  # what came that is not captured yet, see `_comes_often`
        self.pool = torch.cuda.graph_pool_handle()
        self.weights = sum(p.numel() for p in network.lm.parameters())

    @torch.inference_mode()
    def prepare(self, rows: int, capacity: int, plan: Plan) -> State:
        held, sampled = self.state, not plan.params.greedy
        self.active = []
        if (
            held is not None
            and rows <= len(held.drafts)
            and capacity <= held.cache.capacity
            and plan.draft_length <= held.drafts.shape[1]
            and (held.draft_probs is not None or not sampled)
        ):
            held.active.zero_()
            return held
        length = plan.draft_length if held is None else max(plan.draft_length, held.drafts.shape[1])
        sampled |= held is not None and held.draft_probs is not None
        rows, capacity = self._grown(rows, capacity)
        self.forget()
        self.state = held = None  # its memory first
        self.state = State.empty(rows, capacity, length, self.network, sampled)
        step(self.network, self.state, replace(plan, draft_length=1))  # makes the cache's tensors
        return self.state

    def _grown(self, rows: int, capacity: int) -> tuple[int, int]:
        """Size of a new state: with room to grow, up to the model's context, and able to do what the old one could.

        A new state drops all graphs. The last is given up where it would take more than twice the memory.
        """
        roomy, context = roomy_capacity(capacity), self.network.max_positions
        # Behind the context's end there is only room for drafts and masks.
        capacity = roomy if context is None else max(capacity, min(roomy, context + CAPACITY))
        if self.state is None:
            return rows, capacity
        old_rows, old_capacity = len(self.state.drafts), self.state.cache.capacity
        both = max(rows, old_rows), max(capacity, old_capacity)
        worth_it = both[0] * both[1] <= 2 * max(rows * capacity, old_rows * old_capacity)
        return both if worth_it else (rows, capacity)

    def batch_for(self, rows: int) -> int:
        return power_of_two(rows)

    def ready(self, plan: Plan, rows: int) -> bool:
        return not _lasting(plan) or (plan.key, rows) in self.graphs

    def shrinks(self, plan: Plan, places: int, rows: int) -> bool:
        slots = (places - rows) * (plan.slots + SHRINK_ROW)
        return self.ready(plan, rows) or self._comes_often((plan.key, rows), SHRINK_SLOTS, slots)

    @torch.inference_mode()
    def step(self, plan: Plan, rows: int, longest: int) -> Pending:
        if not _lasting(plan):
            return super().step(plan, rows, longest)
        graph, result, _ = self._captured((plan.key, rows), lambda: self._capture_step(plan, rows))
        graph.replay()
        return Pending(result)

    @torch.inference_mode()
    def admit(self, prompts: list[list[int]], rows: list[int], places: list[int], plan: Plan) -> Admitted:
        masks = plan.draft_length if plan.drafting else 0
        pieces = list(cut([len(prompt) + masks for prompt in prompts]))
        work = sum((piece.stop - piece.start) * slots for piece, slots in pieces) * 2 * self.weights
        if not _lasting(plan) or work > PREFILL_WORK or any(slots > LONGEST for _, slots in pieces):
            return super().admit(prompts, rows, places, plan)
        self.active = []
        plan = replace(plan, outcomes=None, alternatives=0)  # a prefill has one block, whatever the steps do
        admitted = list[Pending]()
        for piece, slots in pieces:
            size = self._size_for(_Size(plan.key, piece.stop - piece.start, slots))
            count = size.rows if size is not None else piece.stop - piece.start
            for at in range(piece.start, piece.stop, count):
                part = slice(at, at + count)
                given = prompts[part], rows[part], places[part], plan
                admitted += super().admit(*given).pieces if size is None else [self._admit(*given, size, masks)]
        return Admitted(admitted)

    def _size_for(self, wanted: _Size) -> _Size | None:
        """The captured size for a prefill, a new one if it comes often enough; None to run it eagerly."""
        if wanted in self.graphs:
            return wanted
        sizes = (wanted._replace(rows=wanted.rows // n, slots=wanted.slots * wider) for n, wider in STAND_INS)
        found = next((size for size in sizes if size in self.graphs), None)  # none has 0 rows
        often = self._comes_often(wanted, PREFILL_USES * (1 if found is None else STAND_IN_USES))
        return wanted if often else found

    def _comes_often(self, key: tuple, most: int, weight: int = 1) -> bool:
        """Whether something has come so often before, by weight, that its capture is worth it."""
        if not self.patient or self.met[key] >= most:
            del self.met[key]
            return True
        if len(self.met) > MOST_GRAPHS:
            self.met.clear()
        self.met[key] += weight
        return False

    def _admit(
        self, prompts: list[list[int]], rows: list[int], places: list[int], plan: Plan, key: _Size, masks: int
    ) -> Pending:
        """One graph's share: prompts that are padded to the same width."""
        width = key.slots - masks
        packed = pack_prompts(prompts, rows, plan.params.seed, width)
        inputs = torch.cat((packed, torch.tensor(places)[:, None]), 1)
        captured = self._captured(key, lambda: self._capture_admission(plan, inputs))
        assert captured.inputs is not None
        send(inputs, captured.inputs)
        captured.graph.replay()
        return Pending(captured.result)

    def _captured(self, key: tuple, capture: Callable[[], Captured]) -> Captured:
        """The graph of `key`; a new one may take the place of the one that was not used for longest."""
        if key not in self.graphs:
            if len(self.graphs) >= MOST_GRAPHS:
                torch.cuda.synchronize()  # it may still be replaying
                self.graphs.popitem(last=False)
            self.graphs[key] = capture()
        self.graphs.move_to_end(key)
        return self.graphs[key]

    def forget(self) -> None:
        """Drop all graphs and the memory that they share."""
        torch.cuda.synchronize()  # the last run's last step may still be replaying
        self.graphs.clear()
        self.pool = torch.cuda.graph_pool_handle()

    def _capture_step(self, plan: Plan, rows: int) -> Captured:
        assert self.state is not None
        state = self.state.first(rows, plan)
        tensors = [state.cache.lengths, *state.tensors()]
        kept = [tensor.clone() for tensor in tensors]
        graph, result = self.record(
            lambda: step(self.network, state, plan).packed, f"a step of {plan.slots} slots x {rows} rows"
        )
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
        return Captured(graph, result)

    def _capture_admission(self, plan: Plan, inputs: Tensor) -> Captured:
        """A prefill of as many rows and as wide as `inputs`: packed prompts, each followed by its place.

        It is run before it is captured, which puts the rows of `inputs` in their places; to do so again is harmless.
        """
        assert self.state is not None
        state, held = self.state, torch.empty(inputs.shape, dtype=inputs.dtype, device=self.network.device)
        send(inputs, held)

        def admission() -> Tensor:
            joined = prefill_rows(self.network, held[:, :-1], plan)
            state.put_rows(held[:, -1], joined)
            return joined.drafts[:, 0].clone()

        return Captured(*self.record(admission, f"a prefill of {inputs.shape[1]} x {len(inputs)} tokens"), held)

    def record(self, work: Callable[[], Tensor], what: str) -> tuple[Graph, Tensor]:
        """Run `work` once, then capture it: the graph and its result."""
        started = time.perf_counter()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # compiles kernels and makes the libraries' workspaces
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = work()
        torch.cuda.synchronize()
        if (seconds := time.perf_counter() - started) > 2:
            print(f"captured {what} in {seconds:.1f} s", file=sys.stderr)
        return graph, result


def cut(slots: list[int]) -> Iterator[tuple[slice, int]]:
    """Cut a queue of prompts that need `slots` into pieces of few sizes: (which, slots a row).

    Rows and slots are powers of two; rows are not padded, since seven rows are four, two and one.
    """
    start = 0
    while start < len(slots):
        rows = 1 << ((len(slots) - start).bit_length() - 1)
        while rows * (widest := bucket(max(slots[start : start + rows]))) > MOST_SLOTS and rows > 1:
            rows //= 2
        yield slice(start, start + rows), widest
        start += rows


def bucket(slots: int) -> int:
    return max(ROUND, power_of_two(slots))


def roomy_capacity(tokens: int) -> int:
    """Room a row that a state on a GPU is given for so many tokens, where the model's context does not end before."""
    return CAPACITY * power_of_two(-(-tokens // CAPACITY))


def power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def runner_for(network: Network) -> Runner:
    """The runner of a network: kept with it on a GPU, a new one elsewhere and while that one is in use.

    Whatever was built from the network's weights is built again if they have changed.
    """
    prepare_fused(network)
    if network.device.type != "cuda":
        return Runner(network)
    # One in use may belong to a stream that nobody reads any more: later runs share the newest.
    if not isinstance(network.runner, GraphRunner) or network.runner.busy:
        network.runner = GraphRunner(network)
    return network.runner


@contextmanager
def captured_at_once(network: Network) -> Iterator[None]:
    """Meanwhile everything is captured when it first comes: what is timed after that need not be."""
    runner = runner_for(network)
    if not isinstance(runner, GraphRunner):
        yield
        return
    patient, runner.patient = runner.patient, False
    try:
        yield
    finally:
        runner.patient = patient


def prepare_fused(network: Network) -> None:
    """Give the network its fused backbone, unless it has one of the weights as they are."""
    if network.device.type in ("cpu", "cuda") and network.fused_from != network.state():
        network.fused = network.runner = None
        network.learned.clear()
        fuse(network)
        network.fused_from = network.state()


def release(network: Network) -> None:
    """Give back the memory of everything that was built for decoding: caches, graphs, fused weights.

    A stream that is not read to its end keeps its own.
    """
    network.fused = network.runner = network.fused_from = None
    if network.device.type == "cuda":
        torch.cuda.synchronize()  # the last step may still be replaying
        gc.collect()
        torch.cuda.empty_cache()


@torch.inference_mode()
def fuse(network: Network) -> None:
    """Give the network its fused backbone, if it has one that says the same as the stock modules on a few tokens."""
    network.fused = None
    fused = network.build_fused()
    if fused is None:
        return
    wanted = _say_something(network)
    network.fused = fused
    try:
        said = _say_something(network)
    except FAILURES as failure:
        network.fused = None
        if out_of_memory(failure) or isinstance(failure, torch.AcceleratorError):  # the device is of no use any more
            raise
        why = first_line(failure)
        print(f"fused layers do not run here, decoding is slow without them: {why}", file=sys.stderr)
        return
    error = float(((wanted - said).norm(dim=-1) / wanted.norm(dim=-1)).median())
    if not error < (FUSED_ERROR if network.lm.dtype.itemsize > 2 else FUSED_ERROR_16_BIT):
        print(
            f"fused layers differ from the model's own by {error:.1%}: decoding without them, slowly", file=sys.stderr
        )
        network.fused = None


def _say_something(network: Network) -> Tensor:
    """[48, H] float64 final hidden states of a few tokens, and masks behind them if it has any."""
    device = network.device
    # From all over the vocabulary: its first tokens are often special, and a row of those is mostly rounding.
    ids = torch.arange(1, 49, device=device)[None] * 7919 % network.vocabulary
    layout = prefill_layout(torch.tensor([48], device=device), 48, 4 if network.can_draft else 0)
    cache = RowCache(1, layout.size, device)
    cache.reserve(layout.size)
    return network(ids, layout, cache, fused=True)[0].double()
