"""The Python client against the real process."""

import os
import sys
from pathlib import Path

import anyio
import pytest
from support.tiny_model import make_tokenizer
from support.wire import COMMAND

from mlx_sidecar.client import Sidecar, SidecarExited, SidecarNotStarted, SidecarRequestError

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


SERVE = [COMMAND, "serve"]
END = make_tokenizer().token_to_id("<|end|>")
LONG = {"tokens": [1], "maxTokens": 250, "logitBias": {"3": 1000}}
SHORT = {"prompt": "hello world", "maxTokens": 8, "logitBias": {str(END): -1000}}


async def test_an_answer_is_streamed_and_its_result_known(tiny_model: Path) -> None:
    async with Sidecar.spawn(SERVE) as sidecar:
        loaded = await sidecar.load(str(tiny_model))
        generation = sidecar.generate(loaded.model, **SHORT)
        parts = [part async for part in generation]
        result = await generation.result()
        assert [part.seq for part in parts] == list(range(1, len(parts) + 1))
        assert result.finish_reason == "length"
        assert result.usage.completion_tokens == sum(len(part.tokens) for part in parts) == 8
        assert await sidecar.generate(loaded.model, **SHORT).text() == "".join(part.text for part in parts)
        assert await sidecar.close() == 0


async def test_every_method_has_its_result(tiny_model: Path) -> None:
    async with Sidecar.spawn(SERVE) as sidecar:
        model = (await sidecar.load(str(tiny_model), dtype="float32")).model
        tokens = await sidecar.tokenize(model, text="hello world")
        assert await sidecar.detokenize(model, tokens) == "hello world"
        assert [entry.model for entry in await sidecar.models()] == [model]
        assert (await sidecar.stats()).engine.state == "ready"
        assert (await sidecar.ping()).in_flight == 0
        assert (await sidecar.unload(model)).state == "unloaded"


async def test_errors_are_typed_and_the_next_request_works(tiny_model: Path) -> None:
    async with Sidecar.spawn(SERVE) as sidecar:
        with pytest.raises(SidecarRequestError) as caught:
            await sidecar.generate("nothing", prompt="x").text()
        assert caught.value.kind == "model_not_loaded"
        with pytest.raises(SidecarRequestError) as caught:
            await sidecar.load(str(tiny_model), nonsense=1)
        assert (caught.value.kind, caught.value.data["path"]) == ("invalid_params", "nonsense")
        await sidecar.load(str(tiny_model))


async def test_an_error_in_the_block_comes_out_as_itself_and_the_process_ends() -> None:
    process_ids: list[int] = []

    async def fail() -> None:
        async with Sidecar.spawn(SERVE) as sidecar:
            process_ids.append(sidecar.process_id)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    with pytest.raises(ProcessLookupError):
        os.kill(process_ids[0], 0)


async def test_cancelling_the_waiting_task_cancels_the_request(tiny_model: Path) -> None:
    async with Sidecar.spawn(SERVE) as sidecar:
        model = (await sidecar.load(str(tiny_model))).model
        async with sidecar.generate(model, **LONG) as generation:
            await anext(generation)
        assert (await generation.result()).finish_reason == "cancelled"
        assert (await sidecar.stats()).engine.sequences == 0


async def test_several_answers_at_once_are_kept_apart(tiny_model: Path) -> None:
    async with Sidecar.spawn(SERVE) as sidecar:
        model = (await sidecar.load(str(tiny_model))).model
        prompts = ["he" * n for n in range(1, 6)]
        alone = [await sidecar.generate(model, **SHORT | {"prompt": prompt}).text() for prompt in prompts]
        together: dict[str, str] = {}

        async def ask(prompt: str) -> None:
            together[prompt] = await sidecar.generate(model, **SHORT | {"prompt": prompt}).text()

        async with anyio.create_task_group() as tasks:
            for prompt in prompts:
                tasks.start_soon(ask, prompt)
        assert [together[prompt] for prompt in prompts] == alone


async def test_a_process_that_is_killed_fails_what_is_in_flight_with_its_last_words(tiny_model: Path) -> None:
    async with Sidecar.spawn(SERVE) as sidecar:
        model = (await sidecar.load(str(tiny_model))).model
        generation = sidecar.generate(model, **LONG)
        await anext(generation)
        os.kill(sidecar.process_id, 9)
        with pytest.raises(SidecarExited) as caught:
            await generation.text()
        assert caught.value.exit_code == -9
        assert "MLX" in caught.value.stderr_tail
        with pytest.raises(SidecarExited):
            await sidecar.ping()


async def test_a_missing_program_says_what_to_do() -> None:
    with pytest.raises(SidecarNotStarted, match="Install it, or pass `command`"):
        async with Sidecar.spawn(["/no/such/program"]):
            pass


async def test_a_program_that_ends_at_once_is_told_with_its_stderr() -> None:
    script = "import sys; print('cannot go on', file=sys.stderr); sys.exit(3)"
    with pytest.raises(SidecarExited, match="cannot go on") as caught:
        async with Sidecar.spawn([sys.executable, "-c", script]):
            pass
    assert caught.value.exit_code == 3
