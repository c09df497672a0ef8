"""What the plug-in reads from vLLM's configuration and from requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidar.errors import TidarError
from tidar.vllm.shapes import Curve

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

ON, OFF = (True, 1, "true", "1", "on"), (False, 0, "false", "0", "off")
PLAIN_ONLY = ("logprobs", "logprob_token_ids", "thinking_token_budget")
"""Sampling parameters, not all of which every version has, that make a request decode plainly."""


def curve_of(config: VllmConfig) -> Curve:
    """The shapes of the server's steps. Raises TidarError where its flags do not fit each other."""
    entry: Any = config.additional_config
    try:
        curve = Curve.parse(entry["tidar"]["curve"])
    except (KeyError, TypeError) as error:
        raise TidarError(
            f"additional_config is {entry!r}, without tidar's curve: start it with `tidar serve`"
        ) from error
    if config.num_speculative_tokens != curve.longest.slots - 1:
        raise TidarError(
            f"canvas_length is {config.num_speculative_tokens}, but the curve's longest step needs "
            f"{curve.longest.slots - 1}: start the server with `tidar serve`"
        )
    return curve


def drafting_switch(value: object) -> bool:
    """What a request's "tidar" says. Raises TidarError for anything but a truth value."""
    if _plainly(value) in (*ON, *OFF):
        return _plainly(value) in ON
    raise TidarError(f"tidar is {value!r}, but must be true or false")


def _plainly(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def wants_drafts(request: Request) -> bool:
    """Whether a request may draft: it did not switch drafting off, and all that it asks for is judged draft by draft.

    Log-probabilities, structured output and thinking budgets come from plain decoding, where vLLM makes them as ever.
    """
    params = request.sampling_params
    if params is None or request.use_structured_output:
        return False
    if any(getattr(params, name, None) is not None for name in PLAIN_ONLY):
        return False
    return _plainly((params.extra_args or {}).get("tidar", True)) in ON  # `requests.py` has refused what is neither
