"""What this node holds, and how far each peer has been told.

Every change gets the next number; each connected peer has the number up to which it has been told.
So a new peer is told everything, page by page, an old one only what changed, and a renewal is no
more than giving everything that is held a new number.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ollamamax_p2p.content.core.digest import Digest
from ollamamax_p2p.discovery.core.provider_messages import PAGE_DIGESTS
from ollamamax_p2p.identity.core.peer_id import PeerId


@dataclass(frozen=True, slots=True)
class Page:
    """What to tell a peer next."""

    fresh: bool
    held: list[Digest]
    released: list[Digest]
    up_to: int
    """The number of the last change on it."""


@dataclass(frozen=True, slots=True)
class _Change:
    number: int
    held: bool


class Announcements:
    """The journal of what is held."""

    def __init__(self) -> None:
        self._changes: dict[Digest, _Change] = {}  # newest last
        self._number = 0
        self._told: dict[PeerId, int] = {}
        self._offered: dict[PeerId, Page] = {}

    def holds(self, digest: Digest) -> bool:
        """Whether it is announced now."""
        change = self._changes.get(digest)
        return change is not None and change.held

    def hold(self, digests: Iterable[Digest]) -> None:
        """Announce these; those that are announced already stay as they are."""
        for digest in digests:
            if not self.holds(digest):
                self._note(digest, held=True)

    def release(self, digests: Iterable[Digest]) -> None:
        """Withdraw these; those that are not announced are left alone."""
        for digest in digests:
            if self.holds(digest):
                self._note(digest, held=False)

    def renew(self) -> None:
        """Everything held is to be told again. Old withdrawals are dropped: peers that are
        connected know them, and others begin with a fresh page.
        """
        behind = min(self._told.values(), default=self._number)
        for digest, change in list(self._changes.items()):
            if change.held:
                self._note(digest, held=True)
            elif change.number <= behind:
                del self._changes[digest]

    def forget(self, peer: PeerId) -> None:
        """The peer is gone; should it come back, it is told everything afresh."""
        self._told.pop(peer, None)
        self._offered.pop(peer, None)

    def is_behind(self, peer: PeerId) -> bool:
        """Whether there is something to tell the peer."""
        return self._told.get(peer, -1) < self._number

    def next_page(self, peer: PeerId) -> Page | None:
        """What the peer has not been told yet, at most PAGE_DIGESTS; None if it knows all.

        Give the page back to `told` once the peer has noted it; until then it is offered again.
        """
        page = self._page_for(peer)
        if page is not None:
            self._offered[peer] = page
        return page

    def told(self, peer: PeerId, page: Page) -> None:
        """The peer has noted the page. Ignored if the peer was forgotten meanwhile: it may have
        come back as a new process that knows nothing.
        """
        if self._offered.get(peer) is page:
            self._told[peer] = page.up_to

    def _page_for(self, peer: PeerId) -> Page | None:
        told = self._told.get(peer)
        fresh = told is None
        news: list[Digest] = []
        for digest in reversed(self._changes):
            if told is not None and self._changes[digest].number <= told:
                break
            if not fresh or self._changes[digest].held:
                news.append(digest)
        page = news[::-1][:PAGE_DIGESTS]
        if not page:
            # An empty fresh page still matters: the peer may remember what we held before.
            return Page(True, [], [], self._number) if fresh else None
        held = [digest for digest in page if self._changes[digest].held]
        released = [digest for digest in page if not self._changes[digest].held]
        return Page(fresh, held, released, self._changes[page[-1]].number)

    def _note(self, digest: Digest, *, held: bool) -> None:
        self._number += 1
        self._changes.pop(digest, None)  # moves it to the end
        self._changes[digest] = _Change(self._number, held)
