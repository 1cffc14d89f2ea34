"""mlx-lm in this process, three ways: a plain forward pass, `stream_generate` and `BatchGenerator`.

python in_process.py FOLDER DTYPE FIRST_REQUEST

MLX runs on the same BLAS as the sidecar's. mlx-lm's own defaults are left alone.
"""

import os
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from child import answer_rounds, first_request, matrix_products
from rounds import Answer, Ready, Round

from mlx_sidecar.native.blas import Blas


class Models:
    """One model and the ways to run it."""

    def __init__(self, folder: Path, dtype: str, has_tokenizers: bool) -> None:
        import mlx.core as mx
        from mlx_lm import utils

        self._folder = folder
        self._has_tokenizers = has_tokenizers
        self.module = cast(Any, utils).load_model(folder, lazy=True)[0]
        if dtype == "float32":
            self.module.set_dtype(mx.float32)
        mx.eval(self.module.parameters())
        self._tokenizer: Any = None

    def answer(self, asked: Round) -> list[Answer]:
        """Run one round."""
        ways = {"plain": self._plain, "stream_generate": self._stream, "BatchGenerator": self._batch}
        prompts = [request.tokens for request in asked.requests]
        (most,) = {request.max_tokens for request in asked.requests}
        answers = [Answer(sent=0.0, parts=[]) for _ in prompts]
        began = time.perf_counter()
        for row, token in ways[asked.how](prompts, most):
            answers[row].parts.append(((time.perf_counter() - began) * 1000, 1))
            answers[row].ids.append(token)
        return answers

    def _plain(self, prompts: list[list[int]], most: int) -> Iterator[tuple[int, int]]:
        """Forward and argmax over one cache; prompts of one length. A step begins before the last is read."""
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        cache = cast(Any, make_prompt_cache)(self.module)

        def step(inputs: mx.array) -> mx.array:
            chosen = mx.argmax(self.module(inputs, cache=cache)[:, -1], axis=-1)
            mx.async_eval(chosen)
            return chosen

        tokens = step(mx.array(prompts))
        for number in range(most):
            following = step(tokens[:, None]) if number + 1 < most else tokens
            yield from enumerate(cast(list[int], tokens.tolist()))
            tokens = following

    def _stream(self, prompts: list[list[int]], most: int) -> Iterator[tuple[int, int]]:
        import mlx.core as mx

        library: Any = import_module("mlx_lm.generate")

        (prompt,) = prompts
        if not self._has_tokenizers:
            # The same without the text: stream_generate needs a tokenizer made with transformers.
            for token, _ in library.generate_step(mx.array(prompt), self.module, max_tokens=most):
                yield 0, token
            return
        if self._tokenizer is None:
            from mlx_lm import tokenizer_utils

            self._tokenizer = cast(Any, tokenizer_utils).load(self._folder)
        for part in library.stream_generate(self.module, self._tokenizer, prompt, max_tokens=most):
            yield 0, part.token

    def _batch(self, prompts: list[list[int]], most: int) -> Iterator[tuple[int, int]]:
        import mlx.core as mx
        from mlx_lm.generate import BatchGenerator

        generator: Any = BatchGenerator(self.module, stream=mx.default_stream(mx.default_device()))
        rows = {
            uid: row for row, uid in enumerate(generator.insert(prompts, max_tokens=[most] * len(prompts)))
        }
        left = len(prompts)
        while left:
            for answer in generator.next()[1]:
                yield rows[answer.uid], answer.token
                left -= answer.finish_reason is not None
        generator.close()


def import_mlx_lm(blas: Blas) -> bool:
    """Import mlx-lm as its users do, or as the sidecar does; return whether it was as its users do.

    Its users need a transformers that fits; without one there is no tokenizer of mlx-lm.
    """
    blas.activate()
    try:
        import_module("mlx_lm.generate")
    except Exception:
        for name in [name for name in sys.modules if name.startswith("mlx_lm")]:
            del sys.modules[name]
        from mlx_sidecar.runtime.engine.mlx_start import start_mlx

        start_mlx(blas)
        return False
    return True


def main() -> None:
    """Load, answer the first request, then every line."""
    folder, dtype, first = sys.argv[1:]
    blas = Blas()
    has_tokenizers = import_mlx_lm(blas)
    import mlx.core as mx

    began = time.perf_counter()
    models = Models(Path(folder), dtype, has_tokenizers)
    ready = Ready(os.getpid(), load_ms=(time.perf_counter() - began) * 1000)
    if (request := first_request(first)) is not None:
        models.answer(Round([request], "BatchGenerator"))
    ready.gflops, ready.blas_threads = matrix_products(blas)
    answer_rounds(ready, models.answer)
    del models
    mx.clear_streams()


if __name__ == "__main__":
    main()
