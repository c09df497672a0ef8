"""What requests may say, in OpenAI's words. What cannot be honoured is refused by name; nothing is ignored."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tidar.errors import TidarError
from tidar.prompts import Message
from tidar.sampling import SamplingParams

MOST_CHOICES = 128
MOST_LOGPROBS = 20
NEUTRAL: dict[str, list[Any]] = {
    "presence_penalty": [0],
    "frequency_penalty": [0],
    "repetition_penalty": [1],
    "logit_bias": [{}],
    "best_of": [1],
    "suffix": [""],
    "tools": [[]],
    "functions": [[]],
    "tool_choice": ["none", "auto"],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "store": [False],
    "metadata": [{}],
    "service_tier": ["auto", "default"],
    "ignore_eos": [False],
    "min_tokens": [0],
}
"""Parameters that we do not have, and the values of them that ask for nothing; so does null, for any parameter."""


class ApiError(Exception):
    """An error in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = str(self).encode("utf-8", "replace").decode()  # JSON can spell half a character, UTF-8 cannot
        param = None if self.param is None else self.param.encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def _neutral(name: str, value: Any) -> bool:
    return any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in NEUTRAL.get(name, []))


def unsupported(param: str, why: str = "this server does not have it") -> ApiError:
    return ApiError(400, f"parameter '{param}' is not supported: {why}", param, "unsupported_parameter")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Body(BaseModel):
    """Strict: a number is not a text, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False


class ExtraArguments(Body):
    """How the request switch is spelled for vLLM."""

    tidar: bool | Annotated[int, Field(ge=0, le=1)] | None = None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list, str | list[str]), Field(max_length=16)
]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class Request(Body):
    """What both endpoints take.

    `usual_tokens` is how long an answer may be if the request does not say: no longer than what fits, anyway.
    """

    usual_tokens: ClassVar[int] = 2**31
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1, lt=2**31, description="0 and -1: off")
    min_p: float = Field(0.0, ge=0, le=1)
    stop: Stop = []
    max_tokens: Count | None = None
    tidar: bool | None = Field(None, description="false decodes without drafts")
    vllm_xargs: ExtraArguments | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, fields: Any) -> Any:
        """Leave out what asks for nothing, and refuse by name what asks for something that we do not have."""
        if not isinstance(fields, dict):
            return fields
        given = {name: value for name, value in fields.items() if value is not None}
        for name, value in given.items():
            if name not in cls.model_fields and not _neutral(name, value):
                raise unsupported(name)
        return {name: value for name, value in given.items() if name in cls.model_fields}

    def check(self) -> None:
        """Raise ApiError for fields that are fine on their own, but not together."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "'stream_options' needs 'stream': true", "stream_options")
        if self.tidar is not None and self.xargs_tidar not in (None, self.tidar):
            raise ApiError(400, "'tidar' and 'vllm_xargs.tidar' contradict each other", "vllm_xargs")

    @property
    def xargs_tidar(self) -> bool | None:
        given = None if self.vllm_xargs is None else self.vllm_xargs.tidar
        return None if given is None else bool(given)

    @property
    def switch(self) -> bool | None:
        """Whether drafts are wanted; None if the request does not say."""
        return self.xargs_tidar if self.tidar is None else self.tidar

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def likeliest(self) -> int | None:
        """Tokens that are told beside each one's log-probability; None if none is wanted."""
        raise NotImplementedError

    def longest(self) -> tuple[str, int | None]:
        """The parameter that limits the answer, and its value."""
        return "max_tokens", self.max_tokens

    def sampling(self, seed: int) -> SamplingParams:
        """How its tokens are chosen. Raises ApiError."""
        try:
            return SamplingParams(
                self.temperature,
                self.top_k if self.top_k > 0 else None,
                self.top_p if self.top_p < 1 else None,
                self.min_p or None,
                seed % 2**63,
            )
        except TidarError as error:
            raise ApiError(400, str(error)) from error


Token = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[Token], Field(min_length=1)]


class CompletionRequest(Request):
    """`/v1/completions`: the prompt is continued as it is."""

    prompt: str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1)]
    usual_tokens: ClassVar[int] = 16
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    def check(self) -> None:
        super().check()
        if self.echo and self.logprobs is not None:
            raise unsupported("logprobs", "with 'echo' it would ask for those of the prompt, which are not computed")

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt  # type: ignore[list-item, return-value]


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        """What a client sends back of an answer has fields that are null."""
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields

    def message(self) -> Message:
        """For the chat template; "developer" is a newer name for "system"."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Request):
    """`/v1/chat/completions`: the messages go through the model's chat template."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs': true", "top_logprobs")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ApiError(400, "'max_tokens' and 'max_completion_tokens' contradict each other", "max_tokens")

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def longest(self) -> tuple[str, int | None]:
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return name, getattr(self, name)


AnyRequest = ChatRequest | CompletionRequest
