"""py-libp2p's pre-shared key, with the other side's key checked at once.

The library's `PskConn` takes whatever a wrong key makes of the first bytes for a length, and waits
for so much until the handshake's time is over; and it gives up if the nonce arrives in two parts.
Every connection begins with multistream's greeting, so the first twenty bytes tell.
"""

from Crypto.Cipher import Salsa20
from libp2p.abc import IRawConnection
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.utils import read_exactly
from libp2p.network import swarm as swarm_module
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.security.pnet.psk_conn import PskConn

NONCE_BYTES = 8
_GREETING = b"\x13/multistream/1.0.0\n"


class CheckedPskConn(PskConn):
    """See above."""

    def __init__(self, conn: RawConnection | IRawConnection, psk: str) -> None:
        super().__init__(conn, psk)
        self._expected = _GREETING

    def __repr__(self) -> str:
        return "<connection with a swarm key>"

    async def read(self, n: int | None = None) -> bytes:
        """See PskConn. Raises ConnectionClosedError if the other side has another key or none."""
        if self.read_cipher is None:
            nonce = await read_exactly(self._conn, NONCE_BYTES)
            self.read_cipher = Salsa20.new(key=self._psk, nonce=nonce)
        data = await self._conn.read(n)
        if not data:
            return b""
        plain: bytes = self.read_cipher.decrypt(data)
        if self._expected:
            self._check(plain)
        return plain

    def _check(self, plain: bytes) -> None:
        seen = plain[: len(self._expected)]
        if not self._expected.startswith(seen):
            raise ConnectionClosedError("it does not have this swarm's key", transport="pnet")
        self._expected = self._expected[len(seen) :]


def check_swarm_keys() -> None:
    """Make py-libp2p use `CheckedPskConn`. It calls a function of a module, so this holds for the
    process; it changes nothing for connections whose sides have the same key.
    """
    vars(swarm_module)["new_protected_conn"] = CheckedPskConn
