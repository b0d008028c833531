"""The watchers are watched: each invariant notices what it is there for."""

import pytest

from ollamamax_p2p.content import RamStore
from ollamamax_p2p.content.core.digest import digest_of
from ollamamax_p2p.content.core.manifest import Layer, build_manifest
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.errors import NoSources
from ollamamax_p2p.testing import InvariantBroken, Invariants, PullRecord
from ollamamax_p2p.transfer import PullReport

NAME = parse_model_name("some:latest")


class Node:
    """A store that can be spoilt behind its back."""

    name = "node"

    def __init__(self, store: RamStore) -> None:
        self.store = store


class SpoiltStore(RamStore):
    """Gives other bytes than it was given."""

    spoilt = False

    async def open(self, digest):
        reader = await super().open(digest)
        if self.spoilt:
            reader._data = bytes(reader.size)
        return reader


class ForgetfulStore(RamStore):
    """Loses a blob that a model needs."""

    async def blobs(self):
        return (await super().blobs())[1:]


def ended(**facts: object) -> PullRecord:
    record = PullRecord("node", NAME, 0.0, 0, ended_at=1.0)
    for name, value in facts.items():
        setattr(record, name, value)
    return record


def report(refetched: int) -> PullReport:
    return PullReport(
        model="some:latest",
        manifest_digest="",
        bytes_total=100,
        bytes_fetched=100,
        bytes_refetched=refetched,
        seconds=1,
        sources=(),
    )


async def test_a_visible_blob_with_other_bytes_is_noticed():
    store = SpoiltStore()
    await store.put(b"the bytes of a blob")
    invariants = Invariants(in_flight_bytes_max=10)
    await invariants.check([Node(store)])
    store.spoilt = True
    await store.put(b"another")
    with pytest.raises(InvariantBroken, match=digest_of(b"another")):
        await invariants.check([Node(store)])


async def test_a_visible_model_without_a_blob_is_noticed():
    store = ForgetfulStore()
    layers = [Layer("x", await store.put(data), len(data)) for data in (b"one", b"two")]
    await store.put_manifest(NAME, build_manifest(layers[0], layers[1:]))
    with pytest.raises(InvariantBroken, match="without"):
        await Invariants(in_flight_bytes_max=10).check([Node(store)])


def test_a_pull_that_never_ended_is_noticed():
    invariants = Invariants(in_flight_bytes_max=10)
    invariants.pulls.append(ended(ended_at=None))
    with pytest.raises(InvariantBroken, match="still running"):
        invariants.check_all_ended()


def test_a_pull_that_ended_in_an_error_is_well():
    invariants = Invariants(in_flight_bytes_max=10)
    invariants.pulls.append(ended(error=NoSources("some", "nobody")))
    invariants.check_all_ended()
    invariants.check_pull(invariants.pulls[0])


@pytest.mark.parametrize(("troubles", "refetched"), [(0, 10), (3, 40)])
def test_what_is_fetched_again_is_bounded_by_what_went_wrong(troubles, refetched):
    invariants = Invariants(in_flight_bytes_max=10)
    invariants.check_pull(ended(troubles=troubles, report=report(refetched)))
    with pytest.raises(InvariantBroken, match="again"):
        invariants.check_pull(ended(troubles=troubles, report=report(refetched + 1)))
