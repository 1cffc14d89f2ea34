import pickle

import pytest

from mlx_sidecar.client import SidecarDisconnected, SidecarError, SidecarExited, SidecarRequestError
from mlx_sidecar.protocol.errors import ModelNotFound


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (3, "The sidecar ended with code 3. It last said:\nOh no."),
        (-9, "The sidecar ended by SIGKILL. It last said:\nOh no."),
        (-250, "The sidecar ended by signal 250. It last said:\nOh no."),
    ],
)
def test_an_exit_says_how_and_what_was_said_last(code: int, message: str) -> None:
    assert str(SidecarExited(code, "Oh no.")) == message


def test_an_exit_is_a_lost_connection_and_everything_is_a_sidecar_error() -> None:
    assert issubclass(SidecarExited, SidecarDisconnected)
    assert issubclass(SidecarDisconnected, SidecarError)
    assert issubclass(SidecarRequestError, SidecarError)


@pytest.mark.parametrize(
    "error", [SidecarExited(-9, "Oh"), SidecarRequestError(ModelNotFound("m").to_wire())]
)
def test_errors_cross_to_other_processes(error: SidecarError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert vars(arrived) == vars(error)
    assert str(arrived) == str(error)
