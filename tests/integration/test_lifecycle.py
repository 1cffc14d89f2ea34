"""How the process starts, what it imports when, and every way in which it ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.wire import COMMAND, PATIENCE_SECONDS, Sidecar, Wire, lines

LONG: dict[str, Any] = {"tokens": [1], "maxTokens": 250, "logitBias": {"3": 1000}}


def run(
    stdin: bytes, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [COMMAND, "serve", *arguments],
        input=stdin,
        capture_output=True,
        check=False,
        env=os.environ | (env or {}),
        timeout=100,
    )


def test_initialize_tells_the_version_and_the_limits() -> None:
    with Wire() as wire:
        result = wire.initialize()
        assert result["protocolVersion"] == 1
        assert result["serverInfo"]["name"] == "mlx-sidecar"
        assert result["limits"]["maxFrameBytes"] == 64 * 1024 * 1024


def test_before_initialize_nothing_heavy_is_imported() -> None:
    done = run(lines({"id": 1, "method": "ping"}), env={"PYTHONPROFILEIMPORTTIME": "1"})
    imported = done.stderr.decode()
    assert "msgspec" in imported
    for heavy in (
        "mlx.core",
        "mlx_lm",
        "transformers",
        "tokenizers.tokenizers",
        "jinja2",
        "numpy",
        "huggingface_hub",
    ):
        assert f" {heavy}\n" not in imported, heavy


def test_a_host_that_speaks_at_once_is_answered_before_the_event_loop_is_imported(tmp_path: Path) -> None:
    # Without anyio there can be no loop: whatever is answered was answered before it.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['anyio'] = None\n")
    request = {"id": 1, "method": "initialize", "params": {"protocolVersion": 1}}
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as host:
        assert host.stdin is not None
        host.stdin.write(lines(request))
        host.stdin.close()
        host.wait(10)
        done = subprocess.run(
            [COMMAND, "serve"],
            stdin=host.stdout,
            capture_output=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            timeout=100,
        )
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [1]
    assert done.returncode == 70


def test_a_text_model_is_loaded_and_run_without_transformers_and_without_the_hub(tiny_model: Path) -> None:
    model = str(tiny_model)
    chat = [{"role": "user", "content": "hi"}]
    done = run(
        lines(
            {"id": 1, "method": "initialize", "params": {"protocolVersion": 1}},
            {"id": 2, "method": "load", "params": {"model": model}},
            {"id": 3, "method": "generate", "params": {"model": model, "messages": chat, "maxTokens": 2}},
        ),
        "--eof-grace-ms",
        "60000",
        env={"PYTHONPROFILEIMPORTTIME": "1"},
    )
    assert len(done.stdout.splitlines()) == 3
    imported = done.stderr.decode()
    assert " mlx.core\n" in imported
    for unneeded in ("transformers", "huggingface_hub", "torch", "requests"):
        assert f" {unneeded}\n" not in imported, unneeded


def test_the_end_of_stdin_lets_accepted_requests_end_and_exits_with_0(tiny_model: Path) -> None:
    done = run(
        lines(
            {"id": 1, "method": "initialize", "params": {"protocolVersion": 1}},
            {"id": 2, "method": "load", "params": {"model": str(tiny_model)}},
            {"id": 3, "method": "generate", "params": {"model": str(tiny_model), **LONG}},
        ).rstrip(b"\n"),
        "--eof-grace-ms",
        "60000",
    )
    frames = {frame["id"]: frame for frame in map(json.loads, done.stdout.splitlines())}
    assert frames[3]["result"]["usage"]["completionTokens"] == 250
    assert done.returncode == 0


def test_after_the_grace_what_still_runs_is_cancelled_and_answered(tiny_model: Path) -> None:
    requests: list[dict[str, Any]] = [
        {"id": n, "method": "generate", "params": {"model": str(tiny_model), **LONG}} for n in range(3, 30)
    ]
    done = run(
        lines(
            {"id": 1, "method": "initialize", "params": {"protocolVersion": 1}},
            {"id": 2, "method": "load", "params": {"model": str(tiny_model)}},
            *requests,
        ),
        "--eof-grace-ms",
        "0",
    )
    assert done.returncode == 0
    assert sorted(json.loads(line)["id"] for line in done.stdout.splitlines()) == list(range(1, 30))


def test_shutdown_then_exit_is_0_and_requests_in_flight_are_cancelled(tiny_model: Path) -> None:
    with Wire() as wire:
        wire.initialize()
        wire.result("load", model=str(tiny_model))
        generate = wire.send("generate", model=str(tiny_model), **LONG)
        assert wire.result("shutdown") is None
        assert wire.response(generate)["result"]["finishReason"] == "cancelled"
        assert wire.error("ping")["data"]["kind"] == "shutting_down"
        wire.notify("exit")
        assert wire.wait() == 0


def test_what_follows_a_shutdown_in_the_same_write_is_refused() -> None:
    with Wire() as wire:
        wire.initialize()
        wire.write(lines({"id": "down", "method": "shutdown"}, {"id": "late", "method": "stats"}))
        assert wire.response("late")["error"]["data"]["kind"] == "shutting_down"
        assert wire.response("down")["result"] is None


def test_exit_without_shutdown_is_1() -> None:
    with Wire() as wire:
        wire.initialize()
        wire.notify("exit")
        assert wire.wait() == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cancels_answers_and_exits_with_128_plus_its_number(
    tiny_model: Path, number: signal.Signals
) -> None:
    with Wire() as wire:
        wire.initialize()
        wire.result("load", model=str(tiny_model))
        generate = wire.send("generate", model=str(tiny_model), **LONG, partialResultToken="t")
        while not wire.progress("t"):
            wire.result("ping")
        wire.process.send_signal(number)
        assert wire.response(generate)["result"]["finishReason"] in ("cancelled", "length")
        assert wire.wait() == 128 + number


def test_a_host_that_dies_takes_the_sidecar_with_it_even_if_the_pipe_stays_open(tiny_model: Path) -> None:
    # The "host" only lends its id; the pipe is ours and stays open, as a wrapper would keep it.
    host = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with Wire() as wire:
        wire.result("initialize", protocolVersion=1, processId=host.pid)
        wire.result("load", model=str(tiny_model))
        host.communicate(b"\n")
        assert wire.wait() == 0


def test_a_host_that_stops_reading_ends_the_sidecar() -> None:
    with subprocess.Popen(
        [COMMAND, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.close()
        process.stdin.write(lines({"id": 1, "method": "ping"}))
        process.stdin.flush()
        assert process.wait(60) == 1
        process.stdin.close()


def test_a_cancel_during_decode_ends_the_answer_and_frees_the_sequence(
    tiny_server: Wire, tiny_model: Path
) -> None:
    generate = tiny_server.send("generate", model=str(tiny_model), **LONG, partialResultToken="cancelled")
    while not tiny_server.progress("cancelled"):
        tiny_server.result("ping")
    tiny_server.notify("$/cancelRequest", id=generate)
    result = tiny_server.response(generate)["result"]
    assert result["finishReason"] == "cancelled"
    pieces = tiny_server.progress("cancelled")
    assert result["lastSeq"] == pieces[-1]["seq"]
    assert result["usage"]["completionTokens"] == sum(len(piece["tokens"]) for piece in pieces) < 250
    assert tiny_server.result("stats")["engine"]["sequences"] == 0


def test_a_cancel_in_the_same_write_as_its_request_still_ends_in_a_result(
    tiny_server: Wire, tiny_model: Path
) -> None:
    params = {"model": str(tiny_model), **LONG}
    tiny_server.write(
        lines(
            {"id": "early", "method": "generate", "params": params},
            {"method": "$/cancelRequest", "params": {"id": "early"}},
        )
    )
    result = tiny_server.response("early")["result"]
    assert (result["finishReason"], result["usage"]["completionTokens"]) == ("cancelled", 0)
    assert tiny_server.result("stats")["engine"]["sequences"] == 0


def test_ping_is_answered_while_a_model_loads() -> None:
    with Wire() as wire:
        wire.initialize()
        load = wire.send("load", model="smollm2-135m")
        assert wire.result("ping")["inFlight"] == 1
        assert wire.result("models")["models"][0]["state"] in ("queued", "loading")
        assert "result" in wire.response(load)


def test_without_the_native_module_the_sidecar_runs_and_says_so(tiny_model: Path, tmp_path: Path) -> None:
    # A module by the same name that cannot be imported stands for one that was never built.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mlx_sidecar.native._core'] = None\n")
    with Wire(env={"PYTHONPATH": str(tmp_path), "MLX_SIDECAR_BLAS": "off"}) as wire:
        wire.initialize()
        assert "pages" not in wire.result("load", model=str(tiny_model))
        wire.result("generate", model=str(tiny_model), tokens=[1], maxTokens=2)
        native = wire.result("stats")["native"]
        assert native["pages"] == {"active": False, "reason": "the native module was not built"}
        assert native["blas"]["active"] is False
        assert native["blas"]["reason"]


def test_without_mlx_every_load_says_so_and_everything_else_is_answered(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mlx.core'] = None\n")
    with Wire(env={"PYTHONPATH": str(tmp_path)}) as wire:
        wire.initialize()
        for _ in range(2):
            error = wire.error("load", model="smollm2-135m")
            assert error["data"]["kind"] == "backend_unavailable"
        assert wire.result("ping")["state"] == "failed"
        assert "device" not in wire.result("stats")["engine"]
        (line,) = wire.result("models")["models"]
        assert (line["state"], line["failure"]["kind"]) == ("failed", "backend_unavailable")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-flag"],
        ["--listen", "a", "--pipe", "b"],
        ["--framing", "xml"],
        ["--eof-grace-ms", "soon"],
        ["--eof-grace-ms", "-1"],
        ["--eof-grace-ms", "nan"],
        ["--eof-grace", "5"],
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str]) -> None:
    assert run(b"", *arguments).returncode == 2


def test_where_mlx_cannot_start_the_exit_code_says_so(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mlx.core'] = None\n")
    done = run(
        lines(
            {"id": 1, "method": "initialize", "params": {"protocolVersion": 1}},
            {"id": 2, "method": "load", "params": {"model": "smollm2-135m"}},
        ),
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 69
    assert json.loads(done.stdout.splitlines()[1])["error"]["data"]["kind"] == "backend_unavailable"


def test_a_host_that_only_pings_is_answered_before_the_rest_is_imported(tmp_path: Path) -> None:
    # The import of the event loop waits for a file that appears only once the pings have been answered.
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    (tmp_path / "anyio.py").write_text(f"open({str(gate)!r}).read()\nraise ImportError('no loop')\n")
    with Wire(env={"PYTHONPATH": str(tmp_path)}) as wire:
        for _ in range(100):
            assert wire.result("ping")["state"] == "starting"
        assert wire.error("models")["data"]["kind"] == "not_initialized"
        gate.write_text("")
        assert wire.wait() == 70


def test_the_log_can_be_json_line_by_line(tiny_model: Path, tmp_path: Path) -> None:
    model = str(tiny_model)
    with Wire("--log-format", "json", "--log-level", "debug") as wire:
        wire.initialize()
        wire.result("load", model=model)
        (tmp_path / "config.json").write_text("{")
        wire.error("load", model=str(tmp_path))
        wire.notify("$/cancelRequest", wrong=1)
        wire.result("generate", model=model, tokens=[1], maxTokens=2)
        wire.result("shutdown")
        wire.notify("exit")
        assert wire.wait() == 0
    entries = [json.loads(line) for line in bytes(wire.stderr).splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*(set(entry) for entry in entries))
    assert {"debug", "info", "warning"} >= {entry["level"] for entry in entries} >= {"info", "warning"}


@pytest.mark.parametrize("options", [("--log-format", "json"), ("--log-level", "error")])
def test_the_log_is_as_asked_for_from_the_first_byte_on(options: tuple[str, str]) -> None:
    server = [COMMAND, "serve", *options]
    first = lines({"method": "$/cancelRequest", "params": 3})
    done = subprocess.run(server, input=first, capture_output=True, timeout=PATIENCE_SECONDS, check=True)
    levels = [json.loads(line)["level"] for line in done.stderr.splitlines()]
    assert "warning" in levels if "json" in options else levels == []


def test_the_log_level_is_the_least_that_is_written(tiny_model: Path) -> None:
    with Wire("--log-level", "error") as wire:
        wire.initialize()
        wire.result("load", model=str(tiny_model))
    assert wire.stderr == b""


def test_a_host_that_neither_speaks_nor_listens_any_more_ends_the_sidecar_at_once(tiny_model: Path) -> None:
    # With patience for the requests of a host that still listens; this one does not.
    with Sidecar("--eof-grace-ms", "1000000") as sidecar:
        assert sidecar.process.stdin is not None
        assert sidecar.process.stdout is not None
        sidecar.process.stdin.write(
            lines(
                {"id": 1, "method": "initialize", "params": {"protocolVersion": 1}},
                {"id": 2, "method": "load", "params": {"model": str(tiny_model)}},
                {"id": 3, "method": "generate", "params": {"model": str(tiny_model), **LONG}},
            )
        )
        sidecar.process.stdin.flush()
        assert b'"id":1' in sidecar.process.stdout.readline()
        sidecar.process.stdout.close()
        sidecar.process.stdin.close()
        assert sidecar.wait() in (0, 1)


def test_shutdown_and_the_end_of_stdin_together_end_at_once_with_every_answer(roomy_model: Path) -> None:
    model = str(roomy_model)
    with Wire("--eof-grace-ms", "1000000") as wire:
        wire.initialize()
        wire.result("load", model=model)
        endless = {"model": model, **LONG, "maxTokens": 10**9}
        wire.write(
            lines(
                {"id": "g", "method": "generate", "params": endless},
                {"id": "down", "method": "shutdown"},
            )
        )
        wire.end_input()
        answers = {message["id"]: message for message in wire.rest()}
        assert answers["g"]["result"]["finishReason"] == "cancelled"
        assert answers["down"]["result"] is None
        assert wire.wait() == 0


def test_shutdown_and_exit_in_one_write_are_both_obeyed(roomy_model: Path) -> None:
    model = str(roomy_model)
    with Wire() as wire:
        wire.initialize()
        wire.result("load", model=model)
        running = wire.send("generate", model=model, **(LONG | {"maxTokens": 10**9}), partialResultToken="t")
        while not wire.progress("t"):
            wire.result("ping")
        wire.write(lines({"id": "down", "method": "shutdown"}, {"method": "exit"}))
        assert wire.response(running)["result"]["finishReason"] == "cancelled"
        assert wire.response("down")["result"] is None
        assert wire.wait() == 0


def test_a_process_id_that_no_process_can_have_is_a_host_that_is_gone() -> None:
    with Wire() as wire:
        wire.send("initialize", protocolVersion=1, processId=2**31 - 1)
        assert wire.wait() == 0
        assert b"Traceback" not in wire.stderr


HOST = """
import json, os, subprocess, sys
command, detached, wrapped = sys.argv[1], "detached" in sys.argv, "wrapped" in sys.argv
sidecar = subprocess.Popen(
    [command, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=detached
)
params = {"protocolVersion": 1, "processId": os.getpid()} if wrapped else {"protocolVersion": 1}
request = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
sidecar.stdin.write(json.dumps(request).encode() + b"\\n")
sidecar.stdin.flush()
sidecar.stdout.readline()
if wrapped:
    pipes = (sidecar.stdin.fileno(), sidecar.stdout.fileno())
    # It holds the pipes until the test closes the other end of its stdin.
    subprocess.Popen(["cat"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=pipes)
print("ready", flush=True)
sidecar.wait()
"""


@pytest.mark.parametrize("how", ["attached", "detached", "wrapped"])
def test_a_host_that_is_killed_takes_the_sidecar_with_it(how: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOST, COMMAND, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as host:
        assert host.stdin is not None
        assert host.stdout is not None
        assert host.stderr is not None
        assert host.stdout.readline() == b"ready\n"
        host.kill()
        # A host that nobody has waited for still counts as a process.
        host.wait(PATIENCE_SECONDS)
        # The sidecar has this pipe too, so its end is the sidecar's.
        log = host.stderr.read()
        host.stdin.close()
    assert b"ending: " in log
    assert b"Traceback" not in log
