"""The demo model through the real process: what the README promises."""

from support.wire import Wire

MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_the_greedy_answer_to_the_capital_of_france_contains_paris(demo_server: Wire) -> None:
    answer = demo_server.result("generate", model=MODEL, messages=QUESTION, maxTokens=24)
    assert "Paris" in answer["text"]
    assert answer["finishReason"] == "stop"


def test_a_streamed_answer_is_the_whole_answer_in_pieces(demo_server: Wire) -> None:
    whole = demo_server.result("generate", model=MODEL, messages=QUESTION, maxTokens=24)
    streamed = demo_server.result(
        "generate", model=MODEL, messages=QUESTION, maxTokens=24, partialResultToken="paris"
    )
    pieces = demo_server.progress("paris")
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert [token for piece in pieces for token in piece["tokens"]] == whole["tokens"]
    assert [piece["seq"] for piece in pieces] == list(range(1, len(pieces) + 1))
    assert streamed["lastSeq"] == len(pieces)
    assert "text" not in streamed
    assert streamed["usage"] == whole["usage"]


def test_load_says_what_it_loaded_and_why_as_float32_on_a_cpu(demo_server: Wire) -> None:
    loaded = demo_server.result("load", model=MODEL)
    device = demo_server.result("stats")["engine"]["device"]
    assert loaded["contextLength"] == 8192
    assert loaded["vocabulary"] == 49152
    assert loaded["parameters"] == 134_515_008
    assert 0 <= loaded["pages"]["residentBytes"] <= loaded["pages"]["totalBytes"]
    assert loaded["pages"]["totalBytes"] > 90_000_000
    if device == "cpu":
        assert loaded["dtype"] == "float32"
        assert "CPU" in loaded["reason"]
        assert loaded["bytes"] == 4 * loaded["parameters"]
    else:
        assert loaded["dtype"] == "4-bit"
        assert "reason" not in loaded


def test_text_survives_tokenize_and_detokenize(demo_server: Wire) -> None:
    text = "Zwölf Boxkämpfer jagen 12 🦊 quer über\n\tden Deich."
    tokens = demo_server.result("tokenize", model=MODEL, text=text)["tokens"]
    assert demo_server.result("detokenize", model=MODEL, tokens=tokens)["text"] == text


def test_messages_are_tokenized_through_the_chat_template(demo_server: Wire) -> None:
    tokens = demo_server.result("tokenize", model=MODEL, messages=QUESTION)["tokens"]
    text = demo_server.result("detokenize", model=MODEL, tokens=tokens, skipSpecialTokens=False)["text"]
    assert text.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_two_answers_at_once_are_those_of_each_alone(demo_server: Wire) -> None:
    prompts = ["The sun is", "One, two, three,"]
    alone = [
        demo_server.result("generate", model=MODEL, prompt=prompt, maxTokens=8)["text"] for prompt in prompts
    ]
    ids = [demo_server.send("generate", model=MODEL, prompt=prompt, maxTokens=8) for prompt in prompts]
    assert [demo_server.response(request_id)["result"]["text"] for request_id in ids] == alone


def test_a_cancel_during_prefill_ends_it_at_the_next_chunk(demo_server: Wire) -> None:
    before = demo_server.result("stats")["engine"]["steps"]
    generate = demo_server.send("generate", model=MODEL, tokens=[500] * 4000, partialResultToken="long")
    while demo_server.result("stats")["engine"]["steps"] == before:
        pass
    demo_server.notify("$/cancelRequest", id=generate)
    result = demo_server.response(generate)["result"]
    assert (result["finishReason"], result["usage"]["completionTokens"]) == ("cancelled", 0)
    stats = demo_server.result("stats")["engine"]
    # Whole, it takes one step for every chunk of 128 on a CPU and of 512 elsewhere: seven at the least.
    assert stats["steps"] - before <= 3
    assert stats["sequences"] == 0


def test_stats_tell_memory_tokens_and_what_the_native_components_do(demo_server: Wire) -> None:
    demo_server.result("generate", model=MODEL, prompt="The", maxTokens=2)
    stats = demo_server.result("stats")
    assert stats["memory"]["mlxActiveBytes"] >= stats["models"][0]["bytes"]
    assert stats["memory"]["residentBytes"] > 50_000_000
    assert stats["tokens"]["completion"] > 0
    assert stats["engine"]["sequences"] == 0
    assert stats["native"]["pages"]["active"]
    if stats["engine"]["device"] == "cpu":
        assert stats["native"]["blas"]["calls"] > 100
