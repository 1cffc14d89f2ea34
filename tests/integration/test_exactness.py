"""Greedy answers of the demo model in company are, token for token, what the server gives to each alone."""

import pytest
from support.wire import Json, Wire

MODEL = "smollm2-135m"
ANSWER = 16
# On each of these the model's closest call is clear by 0.03 logits, far beyond what rounding can turn around.
SHORT = (
    "def fibonacci(n):\n",
    "1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n",
    "My favourite recipe: take two eggs, some flour and",
)
LONG = " ".join(
    f"On day {day} the keeper counted {day * 7 % 13} ships and wrote it down." for day in range(20)
)


class Stream:
    """One request under way."""

    def __init__(
        self, wire: Wire, prompt: str, name: str, max_tokens: int = ANSWER, *, deduplicate: bool = True
    ) -> None:
        self._wire = wire
        self._name = name
        self.id = wire.send(
            "generate",
            model=MODEL,
            prompt=prompt,
            maxTokens=max_tokens,
            deduplicate=deduplicate,
            partialResultToken=name,
        )

    def said(self) -> list[int]:
        """Return the tokens that have come so far."""
        return [token for part in self._wire.progress(self._name) for token in part["tokens"]]

    def has_said(self, count: int) -> None:
        """Wait until that many tokens have come."""
        self._wire.stats_when(lambda _: len(self.said()) >= count)

    def end(self) -> Json:
        """Wait for the end and return the result."""
        return self._wire.response(self.id)["result"]


@pytest.fixture(scope="module")
def alone(demo_server: Wire) -> dict[str, list[int]]:
    """The answer to each prompt while the server does nothing else."""
    return {
        prompt: demo_server.result("generate", model=MODEL, prompt=prompt, maxTokens=ANSWER)["tokens"]
        for prompt in (*SHORT, LONG)
    }


def test_four_that_start_at_different_moments_get_the_tokens_of_each_alone(
    demo_server: Wire, alone: dict[str, list[int]]
) -> None:
    streams: list[Stream] = []
    for prompt in SHORT:
        streams.append(Stream(demo_server, prompt, f"together {prompt}"))
        streams[-1].has_said(3)
    for prompt, stream in zip(SHORT, streams, strict=True):
        assert stream.end()["finishReason"] == "length"
        assert stream.said() == alone[prompt]


def test_a_cancel_changes_no_token_of_a_neighbour(demo_server: Wire, alone: dict[str, list[int]]) -> None:
    stays, leaves, also_stays = (
        Stream(demo_server, prompt, f"cancel {prompt}", length)
        for prompt, length in zip(SHORT, (ANSWER, 1000, ANSWER), strict=False)
    )
    leaves.has_said(4)
    demo_server.notify("$/cancelRequest", id=leaves.id)
    assert leaves.end()["finishReason"] == "cancelled"
    said = leaves.said()[:ANSWER]
    assert said == alone[SHORT[1]][: len(said)]
    for prompt, stream in ((SHORT[0], stays), (SHORT[2], also_stays)):
        stream.end()
        assert stream.said() == alone[prompt]


def test_a_long_prompt_that_arrives_changes_no_token_of_the_others_or_of_its_own(
    demo_server: Wire, alone: dict[str, list[int]]
) -> None:
    first = Stream(demo_server, SHORT[0], "before")
    first.has_said(3)
    between = Stream(demo_server, LONG, "long")
    last = Stream(demo_server, SHORT[3], "after")
    for prompt, stream in ((SHORT[0], first), (LONG, between), (SHORT[3], last)):
        stream.end()
        assert stream.said() == alone[prompt]


@pytest.mark.parametrize("deduplicate", [True, False])
def test_two_equal_requests_get_the_same_tokens_whether_they_share_work_or_not(
    demo_server: Wire, alone: dict[str, list[int]], deduplicate: bool
) -> None:
    streams: list[Stream] = []
    for number in range(2):
        streams.append(Stream(demo_server, SHORT[1], f"{deduplicate} {number}", deduplicate=deduplicate))
        streams[-1].has_said(3)
    for stream in streams:
        stream.end()
        assert stream.said() == alone[SHORT[1]]
