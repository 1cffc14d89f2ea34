import json
import os
from typing import Any

import pytest
from support.channels import NarrowChannel, line

from mlx_sidecar.protocol import openrpc
from mlx_sidecar.protocol.framing import (
    MAX_INBOUND_FRAME_BYTES,
    MAX_OUTBOUND_FRAME_BYTES,
    FrameReader,
    Framing,
)
from mlx_sidecar.protocol.version import VERSION
from mlx_sidecar.runtime.api.presence import PresenceApi
from mlx_sidecar.runtime.server.intake import Intake
from mlx_sidecar.runtime.server.outbox import MAX_UNSENT_BYTES, Outbox
from mlx_sidecar.runtime.telemetry.vitals import Vitals


@pytest.fixture
def vitals() -> Vitals:
    return Vitals()


class Peer:
    def __init__(self, vitals: Vitals) -> None:
        self._channel = NarrowChannel()
        self._channel.open()
        self.outbox = Outbox(self._channel, Framing.NDJSON.wrap)
        self.intake = Intake(FrameReader(Framing.NDJSON), self.outbox, PresenceApi(vitals).methods())

    def ask(self, method: str, **params: Any) -> Any:
        message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        self.intake.feed(line(message))
        response = json.loads(self._channel.writes[-1])
        return response.get("result", response.get("error"))


@pytest.fixture
def peer(vitals: Vitals) -> Peer:
    return Peer(vitals)


def test_initialize_says_who_we_are_what_we_can_do_and_within_what_bounds(peer: Peer) -> None:
    result = peer.ask("initialize", protocolVersion=1)
    assert result["protocolVersion"] == 1
    assert result["serverInfo"] == {"name": "mlx-sidecar", "version": VERSION}
    assert result["capabilities"] == {"streaming": True, "cancel": True, "batch": True, "flowControl": True}
    assert result["limits"] == {
        "maxFrameBytes": MAX_INBOUND_FRAME_BYTES,
        "maxSentFrameBytes": MAX_OUTBOUND_FRAME_BYTES,
        "maxBatchMembers": 64,
        "maxInFlight": 1024,
        "maxUnsentBytes": MAX_UNSENT_BYTES,
    }
    assert peer.intake.initialized


@pytest.mark.parametrize("version", [0, 2, -1])
def test_another_version_is_refused_by_the_name_of_the_parameter(peer: Peer, version: int) -> None:
    assert peer.ask("initialize", protocolVersion=version)["data"]["path"] == "protocolVersion"
    assert not peer.intake.initialized


@pytest.mark.parametrize("window", [0, -1, 2**53, "8"])
def test_a_window_that_cannot_be_is_refused_and_opens_nothing(peer: Peer, window: Any) -> None:
    error = peer.ask("initialize", protocolVersion=1, flowControl={"windowBytes": window})
    assert error["data"]["path"] == "flowControl.windowBytes"
    assert not peer.intake.initialized


def test_without_flow_control_streams_have_no_window(peer: Peer) -> None:
    peer.ask("initialize", protocolVersion=1)
    assert peer.outbox.window is None


def test_a_window_that_was_asked_for_is_set(peer: Peer) -> None:
    peer.ask("initialize", protocolVersion=1, flowControl={"windowBytes": 9})
    assert peer.outbox.window == 9


def test_ping_tells_the_engines_state_and_age_and_what_this_peer_has_in_flight(
    peer: Peer, vitals: Vitals
) -> None:
    result = peer.ask("ping")
    assert (result["state"], result["inFlight"], result["lastStepAgeMs"]) == ("starting", 0, None)
    vitals.state, vitals.last_step_at = "ready", 0.0
    peer.intake.in_flight |= {7, "x"}
    result = peer.ask("ping")
    assert (result["state"], result["inFlight"]) == ("ready", 2)
    assert result["lastStepAgeMs"] > 0


def test_info_is_what_initialize_would_say_and_the_process_behind_it(peer: Peer) -> None:
    info = peer.ask("server/info")
    opened = peer.ask("initialize", protocolVersion=1)
    assert info.items() >= opened.items()
    assert (info["processId"], info["state"]) == (os.getpid(), "starting")


def test_discover_returns_the_document_on_one_line(peer: Peer) -> None:
    assert peer.ask("rpc.discover") == json.loads(openrpc.stored())
