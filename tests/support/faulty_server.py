"""The real sidecar over an engine that breaks down on a word: a prompt whose last token is PILL.

    python faulty_server.py hang|lose serve [OPTIONS]

`hang` never returns from that step, `lose` finds the device gone.
"""

import sys
import threading

from mlx_sidecar.runtime import cli
from mlx_sidecar.runtime.engine.sequence import Sequence

PILL = 7


def _break_down(how: str) -> None:
    from mlx_sidecar.runtime.engine import model_batch
    from mlx_sidecar.runtime.engine.device import DeviceLost

    class Faulty(model_batch.ModelBatch):
        def add(self, sequence: Sequence) -> None:
            super().add(sequence)
            if sequence.prompt[-1] == PILL:
                if how == "lose":
                    self.step = self._lose
                else:
                    self.step = self._hang

        def _lose(self) -> list[model_batch.Emission]:
            raise DeviceLost

        def _hang(self) -> list[model_batch.Emission]:
            threading.Event().wait()
            return []

    model_batch.ModelBatch = Faulty


if __name__ == "__main__":
    _break_down(sys.argv.pop(1))
    cli.main()
