"""generate: what is asked, the parts of an answer, and its end."""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from ..jsonrpc import SAFE_INTEGER
from .base import ModelName, Params, ProgressToken, Result, StopString, Text, TokenId, TokenIds
from .models import AdapterName

FinishReason = Annotated[
    Literal["stop", "length", "cancelled"],
    Meta(title="FinishReason", description="`length`: `maxTokens`, or the end of the model's context."),
]
PriorityClass = Annotated[
    Literal["critical", "high", "normal", "low"],
    Meta(title="PriorityClass", description="Who goes first; one that is passed over for long rises."),
]


class Message(Params):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text


Messages = Annotated[
    list[Message],
    Meta(min_length=1, max_length=65536, description="Goes through the model's chat template."),
]
LogitBias = Annotated[
    dict[int, Annotated[float, Meta(ge=-1000, le=1000)]],
    Meta(
        max_length=65536,
        description="By the id of a token: what is added to its logit.",
        extra_json_schema={"propertyNames": {"pattern": "^[0-9]+$"}},
    ),
]
Seed = Annotated[
    Annotated[int, Meta(ge=0, le=SAFE_INTEGER)] | None,
    Meta(description="The same seed gives the same text, whatever else runs; null is another one each time."),
]
StopTexts = Annotated[
    StopString | Annotated[list[StopString], Meta(max_length=16)],
    Meta(description="The answer ends before the first of these texts."),
]
StopTokenIds = Annotated[
    list[TokenId],
    Meta(max_length=256, description="The answer ends before the first of these tokens."),
]
LogProbCount = Annotated[
    Annotated[int, Meta(ge=0, le=20)] | None,
    Meta(
        description="Whether to say how likely each token was, and how many of the likeliest to name with it."
    ),
]
DeadlineMs = Annotated[
    Annotated[int, Meta(ge=1, le=2**31 - 1)] | None,
    Meta(description="From the request's arrival to the end of its answer; then it is `deadline_exceeded`."),
]
Deduplicate = Annotated[
    bool, Meta(description="Whether work that is under way for an identical request may be shared.")
]


class GenerateParams(Params):
    """One of `messages`, `prompt`, `tokens`, and how to sample.

    Sampling follows this order: repetition, presence and frequency penalties, logit bias, temperature, then
    top-k, top-p and min-p on the tempered distribution. `temperature` 0 takes the likeliest token, whatever
    the truncations say. The repetition penalty looks at prompt and answer, the other two at the answer only.

    None of `priority`, `deadlineMs`, `deduplicate` and `logProbs` changes the answer.
    """

    model: ModelName
    messages: Messages | UnsetType = UNSET
    prompt: Annotated[Text, Meta(description="Is continued as it stands.")] | UnsetType = UNSET
    tokens: Annotated[TokenIds, Meta(description="A prompt as ids.")] | UnsetType = UNSET
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1, description="The longest answer.")] = 1024
    temperature: Annotated[float, Meta(ge=0, le=100, description="0 is greedy.")] = 0.0
    top_p: Annotated[float, Meta(ge=0, le=1, description="1 is off.")] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1, description="0 is off.")] = 0
    min_p: Annotated[float, Meta(ge=0, le=1, description="0 is off.")] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100, description="1 is off.")] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-100, le=100, description="0 is off.")] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-100, le=100, description="0 is off.")] = 0.0
    logit_bias: LogitBias = {}
    seed: Seed = None
    stop: StopTexts = []
    stop_token_ids: StopTokenIds = []
    log_probs: LogProbCount = None
    adapter: AdapterName | UnsetType = UNSET
    priority: PriorityClass = "normal"
    deadline_ms: DeadlineMs = None
    deduplicate: Deduplicate = True
    partial_result_token: ProgressToken | UnsetType = UNSET


LogProb = Annotated[float | None, Meta(description="A natural logarithm; null is minus infinity.")]


class Candidate(Result):
    """A token that could have come, and the logarithm of its probability."""

    token: int
    log_prob: LogProb


class TokenLogProbs(Result):
    """The logarithm of the probability of the token that came; `top` holds the likeliest ones, in order.

    The probabilities are the model's own, before penalties, bias, temperature and truncation.
    """

    log_prob: LogProb
    top: list[Candidate]


class GenerateProgress(Result):
    """`value` of `$/progress`: text that became final, and the ids of the tokens it came from.

    `seq` counts from 1. While the connection is busy what follows is merged into one value: its `seq` is then
    that of the last part, and `merged` says how many parts there are. `logProbs` has one element for each of
    `tokens`, if the request asked for that.
    """

    seq: int
    text: str
    tokens: list[int]
    merged: int = 1
    log_probs: list[TokenLogProbs] | UnsetType = UNSET


class Usage(Result):
    """Token counts. An end-of-sequence or stop token is not counted as part of the answer."""

    prompt_tokens: int
    completion_tokens: int


class Timings(Result):
    """Measured where the work is done. `ttftMs` runs from the request's arrival to its first token.

    Of a request that shared the work of another only what was done after it came is counted.
    """

    queue_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms: float
    tokens_per_second: float


class GenerateResult(Result):
    """The end of a generation. `text`, `tokens` and `logProbs` stand here only when it was not streamed.

    When it was, `lastSeq` is the `seq` of the last progress (0 if there was none) and `textBytes` the length
    of all its text in UTF-8, so that a client can tell that it has everything. `shared` says that its tokens
    were not computed for it, but for an identical request that came before and was under way.
    """

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    text: str | UnsetType = UNSET
    tokens: list[int] | UnsetType = UNSET
    log_probs: list[TokenLogProbs] | UnsetType = UNSET
    last_seq: int | UnsetType = UNSET
    text_bytes: int | UnsetType = UNSET
    shared: bool = False
