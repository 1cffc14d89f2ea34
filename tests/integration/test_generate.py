"""Sampling, stopping and streaming, on a tiny model whose answers are noise."""

from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import make_tokenizer
from support.wire import Wire

TOKENIZER = make_tokenizer()
END = TOKENIZER.token_to_id("<|end|>")
PROMPT = "hello world"
NO_END = {str(END): -1000}


@pytest.fixture
def generate(tiny_server: Wire, tiny_model: Path) -> Any:
    def call(**params: Any) -> Any:
        defaults = {"model": str(tiny_model), "prompt": PROMPT, "maxTokens": 12, "logitBias": NO_END}
        return tiny_server.result("generate", **(defaults | params))

    return call


def test_max_tokens_ends_an_answer_by_length(generate: Any) -> None:
    answer = generate(maxTokens=5)
    assert answer["finishReason"] == "length"
    assert len(answer["tokens"]) == answer["usage"]["completionTokens"] == 5


def test_greedy_is_the_default_and_always_the_same(generate: Any) -> None:
    assert generate()["tokens"] == generate()["tokens"] == generate(temperature=0, seed=5)["tokens"]


def test_top_k_of_one_is_greedy(generate: Any) -> None:
    assert generate(temperature=1.5, topK=1, seed=3)["tokens"] == generate()["tokens"]


def test_top_p_of_zero_and_min_p_of_one_are_greedy(generate: Any) -> None:
    assert generate(temperature=1.5, topP=0, seed=3)["tokens"] == generate()["tokens"]
    assert generate(temperature=1.5, minP=1, seed=3)["tokens"] == generate()["tokens"]


def test_the_same_seed_gives_the_same_text_and_other_seeds_others(generate: Any) -> None:
    texts = [generate(temperature=1.5, seed=seed)["tokens"] for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts}) == 3


def test_without_a_seed_answers_differ(generate: Any) -> None:
    assert len({tuple(generate(temperature=1.5)["tokens"]) for _ in range(4)}) > 1


def test_a_seed_gives_the_same_text_whatever_else_runs(
    generate: Any, tiny_server: Wire, tiny_model: Path
) -> None:
    sampled = {"temperature": 1.2, "topP": 0.95, "topK": 100, "repetitionPenalty": 1.1, "seed": 42}
    alone = generate(maxTokens=30, **sampled)["tokens"]
    company = [
        tiny_server.send(
            "generate", model=str(tiny_model), prompt="he" * n, maxTokens=20 + n, temperature=0.9
        )
        for n in range(1, 7)
    ]
    assert generate(maxTokens=30, **sampled)["tokens"] == alone
    for request_id in company:
        assert "result" in tiny_server.response(request_id)


def test_logit_bias_forces_and_forbids_tokens(generate: Any) -> None:
    token = TOKENIZER.token_to_id("he")
    assert generate(maxTokens=4, logitBias={str(token): 1000})["tokens"] == [token] * 4
    first = generate(maxTokens=1)["tokens"][0]
    assert generate(maxTokens=1, logitBias=NO_END | {str(first): -1000})["tokens"] != [first]


def test_a_frequency_penalty_forbids_what_has_been_said(generate: Any) -> None:
    forced = {str(TOKENIZER.token_to_id(token)): 90 for token in ("he", "ll", "ld")}
    tokens = generate(maxTokens=3, logitBias=forced, frequencyPenalty=100)["tokens"]
    assert {TOKENIZER.id_to_token(token) for token in tokens} == {"he", "ld", "ll"}


def test_a_presence_penalty_forbids_what_has_been_said(generate: Any) -> None:
    forced = {str(TOKENIZER.token_to_id(token)): 90 for token in ("he", "ll", "ld")}
    tokens = generate(maxTokens=3, logitBias=forced, presencePenalty=100)["tokens"]
    assert {TOKENIZER.id_to_token(token) for token in tokens} == {"he", "ld", "ll"}


def test_a_repetition_penalty_changes_a_repeating_answer(generate: Any) -> None:
    assert generate(repetitionPenalty=5, maxTokens=24)["tokens"] != generate(maxTokens=24)["tokens"]


def test_the_end_token_ends_an_answer_and_is_not_part_of_it(generate: Any) -> None:
    answer = generate(logitBias={str(END): 1000})
    assert (answer["finishReason"], answer["text"], answer["tokens"]) == ("stop", "", [])
    assert answer["usage"]["completionTokens"] == 0


def test_stop_token_ids_end_an_answer(generate: Any) -> None:
    tokens = generate()["tokens"]
    stop = tokens[4]
    answer = generate(stopTokenIds=[stop])
    assert answer["finishReason"] == "stop"
    assert answer["tokens"] == tokens[: tokens.index(stop)]


def test_a_stop_string_ends_an_answer_before_itself(generate: Any) -> None:
    forced = {str(TOKENIZER.token_to_id(token)): 90 for token in ("he", "ll", "ld")}
    whole = generate(maxTokens=3, logitBias=forced, frequencyPenalty=100)["text"]
    # From the middle of the first token to the middle of the second: a stop string across their border.
    answer = generate(maxTokens=3, logitBias=forced, frequencyPenalty=100, stop=[whole[1:3]])
    assert (answer["text"], answer["finishReason"]) == (whole[0], "stop")


def test_no_streamed_piece_holds_a_part_of_a_stop_string(generate: Any, tiny_server: Wire) -> None:
    letter = TOKENIZER.token_to_id("l")
    answer = generate(
        maxTokens=40, logitBias={str(letter): 1000}, stop=["l" * 20], partialResultToken="stops"
    )
    pieces = tiny_server.progress("stops")
    assert "".join(piece["text"] for piece in pieces) == ""
    assert answer["finishReason"] == "stop"
    assert answer["usage"]["completionTokens"] == sum(len(piece["tokens"]) for piece in pieces) == 20


def test_an_unfinished_stop_string_is_shown_at_the_end(generate: Any) -> None:
    letter = TOKENIZER.token_to_id("l")
    answer = generate(maxTokens=10, logitBias={str(letter): 1000}, stop=["l" * 20])
    assert (answer["text"], answer["finishReason"]) == ("l" * 10, "length")


def test_partial_utf_8_is_never_sent(generate: Any) -> None:
    start, rest = TOKENIZER.encode("é").ids[0], TOKENIZER.token_to_id("Ã")
    answer = generate(maxTokens=1, logitBias={str(rest): 1000})
    assert (answer["text"], answer["tokens"]) == ("", [rest])
    answer = generate(maxTokens=1, logitBias={str(start): 1000})
    assert answer["text"] == "é"


def test_ids_can_be_the_prompt(tiny_server: Wire, tiny_model: Path, generate: Any) -> None:
    answer = tiny_server.result(
        "generate",
        model=str(tiny_model),
        tokens=TOKENIZER.encode(PROMPT).ids,
        maxTokens=12,
        logitBias=NO_END,
    )
    assert answer["tokens"] == generate()["tokens"]


def test_the_context_bounds_the_answer(tiny_server: Wire, tiny_model: Path) -> None:
    answer = tiny_server.result(
        "generate", model=str(tiny_model), tokens=[1] * 250, maxTokens=1000, logitBias=NO_END
    )
    assert (answer["finishReason"], answer["usage"]["completionTokens"]) == ("length", 6)


def test_a_prompt_of_one_token_is_enough(tiny_server: Wire, tiny_model: Path) -> None:
    answer = tiny_server.result("generate", model=str(tiny_model), tokens=[5], maxTokens=3, logitBias=NO_END)
    assert len(answer["tokens"]) == 3


def test_timings_are_told_and_add_up(generate: Any) -> None:
    timings = generate()["timings"]
    assert timings["ttftMs"] >= timings["prefillMs"] > 0
    assert timings["decodeMs"] > 0
    assert timings["tokensPerSecond"] > 0


def test_many_requests_at_once_all_end_and_nothing_is_left(
    tiny_server: Wire, tiny_model: Path, generate: Any
) -> None:
    alone = {n: generate(prompt="he" * n)["tokens"] for n in range(1, 9)}
    ids = {
        n: tiny_server.send(
            "generate", model=str(tiny_model), prompt="he" * n, maxTokens=12, logitBias=NO_END
        )
        for n in range(1, 9)
    }
    assert {n: tiny_server.response(ids[n])["result"]["tokens"] for n in ids} == alone
    stats = tiny_server.result("stats")
    assert stats["engine"]["sequences"] == 0
    assert stats["models"][0]["inUse"] == 0


def test_log_probabilities_come_with_the_tokens_for_those_who_ask(generate: Any) -> None:
    plain, answer, bare = generate(), generate(logProbs=3), generate(logProbs=0)
    assert answer["tokens"] == plain["tokens"]
    assert "logProbs" not in plain
    assert len(answer["logProbs"]) == len(answer["tokens"])
    for token, said in zip(answer["tokens"], answer["logProbs"], strict=True):
        likeliest = {one["token"]: one["logProb"] for one in said["top"]}
        assert len(likeliest) == 3
        assert sorted(likeliest.values(), reverse=True) == [*likeliest.values()]
        assert END in likeliest or likeliest[token] == said["logProb"] == max(likeliest.values())
        assert said["logProb"] < 0
    assert [said["logProb"] for said in bare["logProbs"]] == [said["logProb"] for said in answer["logProbs"]]
    assert all(said["top"] == [] for said in bare["logProbs"])


def test_log_probabilities_are_the_models_own_whatever_the_sampling(generate: Any) -> None:
    token = TOKENIZER.token_to_id("he")
    forced = generate(maxTokens=1, logitBias={str(token): 1000}, temperature=2, topK=5, logProbs=20)
    free = generate(maxTokens=1, logProbs=20)
    assert forced["tokens"] == [token] != free["tokens"]
    assert forced["logProbs"][0]["top"] == free["logProbs"][0]["top"]


def test_a_stream_has_a_log_probability_for_each_of_its_tokens(tiny_server: Wire, tiny_model: Path) -> None:
    asked: dict[str, Any] = {"model": str(tiny_model), "prompt": PROMPT, "maxTokens": 12, "logitBias": NO_END}
    whole = tiny_server.result("generate", **asked, logProbs=2)
    done = tiny_server.result("generate", **asked, logProbs=2, partialResultToken="likely")
    parts = tiny_server.progress("likely")
    assert "logProbs" not in done
    assert all(len(part["logProbs"]) == len(part["tokens"]) for part in parts)
    assert [said for part in parts for said in part["logProbs"]] == whole["logProbs"]


@pytest.mark.parametrize("count", [-1, 21, 1.5, "all", True])
def test_how_many_log_probabilities_is_a_small_number(
    tiny_server: Wire, tiny_model: Path, count: Any
) -> None:
    error = tiny_server.error("generate", model=str(tiny_model), prompt=PROMPT, logProbs=count)
    assert (error["data"]["kind"], error["data"]["path"]) == ("invalid_params", "logProbs")
