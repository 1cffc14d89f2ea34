"""A target of the conformance runner whose every frame is held up to the schema as well."""

from support.eavesdropper import Eavesdropper

from mlx_sidecar.conformance.target import Channel, Target


class CheckedTarget:
    """Opens the channels of `target`; what a server says on one against the schema is an AssertionError."""

    def __init__(self, target: Target) -> None:
        self.offers = target.offers
        self._target = target

    def open(self) -> Channel:
        """Return a new connection to the target."""
        channel, eavesdropper = self._target.open(), Eavesdropper()
        read, write = channel.read, channel.write

        def checked_read(patience: float) -> bytes:
            data = read(patience)
            if data:
                eavesdropper.heard(data)
            else:
                eavesdropper.ended()
            return data

        def noted_write(data: bytes, patience: float) -> None:
            eavesdropper.said(data)
            write(data, patience)

        channel.read, channel.write = checked_read, noted_write
        return channel
