"""What must be true of every stream, whoever received it."""

from typing import Any

from support.wire import Json


def joined(values: list[Json]) -> Json:
    """Return text, tokens and last `seq` of a stream; fail if a part is missing, double or early."""
    last_seq = 0
    for value in values:
        last_seq += value.get("merged", 1)
        assert value["seq"] == last_seq
    return {
        "text": "".join(value["text"] for value in values),
        "tokens": [token for value in values for token in value["tokens"]],
        "lastSeq": last_seq,
    }


def assert_streamed(values: list[Json], result: Json, answer: Json) -> None:
    """Check a finished stream and its result against the answer that our own driver got."""
    streamed = joined(values)
    assert {"text": streamed["text"], "tokens": streamed["tokens"]} == answer
    assert result["finishReason"] == "length"
    assert result["lastSeq"] == streamed["lastSeq"]
    assert result["textBytes"] == len(answer["text"].encode())
    assert result["usage"]["completionTokens"] == len(answer["tokens"])
    assert "text" not in result


def assert_cancelled(values: list[Json], result: Json, answer: Json) -> None:
    """Check a stream that was cancelled after its first part; `answer` is how it would have begun."""
    streamed = joined(values)
    tokens: list[Any] = streamed["tokens"]
    assert result["finishReason"] == "cancelled"
    assert result["lastSeq"] == streamed["lastSeq"] > 0
    assert result["usage"]["completionTokens"] == len(tokens)
    length = min(len(tokens), len(answer["tokens"]))
    assert tokens[:length] == answer["tokens"][:length]
