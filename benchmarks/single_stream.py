"""One stream through the Node client against `mlx_lm.stream_generate` in process, in turn.

    make bench, or: .venv/bin/python benchmarks/single_stream.py [ROUNDS]

Same model, same prompt, greedy, same number of tokens; the tokens of both sides must be the same. Ratios
above 1 mean that the sidecar is faster.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import publish

from mlx_sidecar.config.settings import default_home
from mlx_sidecar.runtime.models.store import ModelStore

HERE = Path(__file__).parent
SCRIPTS = Path(sys.executable).parent
MODEL = "smollm2-135m"
PROMPT_TOKENS = 128
NEW_TOKENS = 64

Process = subprocess.Popen[str]


def start(*command: str) -> Process:
    """Start one side and wait until it is ready."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline()) == {"ready": True}
    return process


def ask(process: Process, max_tokens: int = NEW_TOKENS) -> Any:
    """Have one side answer and return its ids and times."""
    assert process.stdin is not None
    assert process.stdout is not None
    # Any ids do; these are ordinary words, far from the special tokens.
    request = {"tokens": list(range(1000, 1000 + PROMPT_TOKENS)), "maxTokens": max_tokens}
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def decode_rate(answer: Any) -> float:
    """Return tokens per second after the first token."""
    return (len(answer["ids"]) - 1) * 1000 / (answer["lastMs"] - answer["firstMs"])


def main() -> None:
    """Measure in turn, after one warm round of each side."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    folder = ModelStore(default_home({})).find(MODEL)
    assert folder is not None, "run: make demo"
    sides = {
        "node": start("node", str(HERE / "node_stream.mjs"), str(SCRIPTS / "mlx-sidecar"), MODEL),
        "reference": start(sys.executable, str(HERE / "reference_stream.py"), str(folder)),
    }
    warm = [ask(side)["ids"] for side in sides.values()]
    assert warm[0] == warm[1], "the two sides do not say the same"
    answers: dict[str, list[Any]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            answers[name].append(ask(sides[name]))
    for side in sides.values():
        side.communicate()
    _publish(answers["node"], answers["reference"])


def _publish(node: list[Any], reference: list[Any]) -> None:
    pairs = list(zip(node, reference, strict=True))
    publish(
        "single_stream",
        "benchmarks/single_stream.py",
        "tokens/s, ms, ratios",
        {
            "node client, tokens/s": [decode_rate(one) for one in node],
            "stream_generate, tokens/s": [decode_rate(one) for one in reference],
            "ratio of tokens/s": [decode_rate(one) / decode_rate(other) for one, other in pairs],
            "node client, first token ms": [one["firstMs"] for one in node],
            "stream_generate, first token ms": [one["firstMs"] for one in reference],
            "ratio of whole answers": [other["lastMs"] / one["lastMs"] for one, other in pairs],
        },
    )


if __name__ == "__main__":
    main()
