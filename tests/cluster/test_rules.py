"""What each command does to the agreed state, and when it is refused."""

import msgspec
import pytest

from ollamamax_p2p.cluster.core import rows, rules
from ollamamax_p2p.cluster.core.agreed_settings import SETTINGS, AgreedSettings, agreed_settings
from ollamamax_p2p.cluster.core.commands import (
    VOTES,
    AcquireLease,
    AdmitMember,
    Done,
    ExpireLeases,
    ForgetChunkMap,
    ForgetOldSwarmKey,
    FoundCluster,
    Holds,
    IssueTicket,
    Pin,
    RedeemTicket,
    Refused,
    ReleaseLease,
    RemoveMember,
    RemoveTag,
    RenewLease,
    RotateSwarmKey,
    SetChunkMap,
    SetClock,
    SetCopies,
    SetSetting,
    SetTag,
    Unpin,
    UpdateMember,
    WithdrawTickets,
    decode_result,
    encode_command,
    encode_result,
)
from ollamamax_p2p.cluster.core.exactly_once import RESULTS_PER_SESSION, once, open_session
from ollamamax_p2p.cluster.core.rows import (
    AgreedSetting,
    ChunkMapOf,
    Clock,
    Copies,
    Holding,
    HoldingCount,
    IssuedTicket,
    Lease,
    Member,
    Pinned,
    RememberedResult,
    Session,
    Swarm,
    Tag,
)
from ollamamax_p2p.consensus.core.messages import ConfState
from ollamamax_p2p.consensus.core.sessions import SESSIONS_MAX
from ollamamax_p2p.errors import (
    BadInput,
    MalformedMessage,
    TicketExpired,
    TicketUnknown,
    TicketUsedUp,
)
from tests.cluster.agreed import (
    FOUND,
    KEY,
    T0,
    Agreed,
    digest,
    founded,
    name,
    peer,
    secret_hash,
)

NOT_A_PEER = "12D3KooW" + "1" * 44
"""Shaped like a peer id; its bytes are not one."""


def admit(number: int) -> AdmitMember:
    return AdmitMember(peer=peer(number), name=f"node {number}", may_vote=True)


def issue(number: int = 1, *, uses: int = 1, at: int = T0, lifetime: int = 3600) -> IssueTicket:
    return IssueTicket(
        secret_hash=secret_hash(number), uses=uses, issued_at=at, expires_at=at + lifetime
    )


def redeem(who: int, number: int = 1, *, now: int = T0 + 1) -> RedeemTicket:
    return RedeemTicket(
        secret_hash=secret_hash(number), peer=peer(who), now=now, name=f"node {who}"
    )


@pytest.fixture
def agreed() -> Agreed:
    return founded()


def few(monkeypatch: pytest.MonkeyPatch, kind: type[rows.Row], limit: int) -> None:
    """The same rule with a smaller number."""
    monkeypatch.setitem(rows.LIMITS, kind, limit)


# -- members -----------------------------------------------------------------------------------


def test_the_founder_has_raft_id_one_and_nobody_founds_twice(agreed):
    assert agreed.tables.get(Member, peer(0)).raft_id == 1
    assert agreed.refused(FOUND).reason == "founded"


def test_nobody_is_admitted_before_the_founding():
    assert Agreed().refused(admit(1)).reason == "not_founded"


def test_a_founder_whose_id_is_none_founds_nothing():
    command = FoundCluster(swarm_id=bytes(16), swarm_key=None, peer=NOT_A_PEER, name="x")
    assert Agreed().refused(command).reason == "peer"


def test_a_member_has_the_index_of_its_entry_as_raft_id_and_a_new_one_when_it_comes_back(agreed):
    first = agreed.done(admit(1)).number
    assert first == agreed.index
    assert agreed.done(admit(1)).number == first
    agreed.done(RemoveMember(peer=peer(1)))
    assert agreed.tables.get(Member, peer(1)) is None
    again = agreed.done(admit(1)).number
    assert again == agreed.index > first


def test_removing_whoever_is_no_member_changes_nothing(agreed):
    assert agreed.done(RemoveMember(peer=peer(9))) == Done()


@pytest.mark.parametrize("outgoing", [False, True])
def test_a_voter_is_not_removed(agreed, outgoing):
    raft_id = agreed.done(admit(1)).number
    agreed.conf_state = ConfState(
        voters=(1,) if outgoing else (1, raft_id), voters_outgoing=(1, raft_id) if outgoing else ()
    )
    assert agreed.refused(RemoveMember(peer=peer(1))).reason == "votes"


def test_what_a_removed_member_held_and_was_pinned_to_goes_with_it(agreed):
    agreed.done(admit(1))
    for who in (0, 1):
        agreed.done(Holds(peer=peer(who), added=(digest(1), digest(2))))
        agreed.done(Pin(name=name(1), peer=peer(who)))
    agreed.done(RemoveMember(peer=peer(1)))
    assert [key[:52] for key, _ in agreed.tables.items(Holding)] == [peer(0)] * 2
    assert [key[:52] for key, _ in agreed.tables.items(Pinned)] == [peer(0)]
    assert agreed.tables.get(HoldingCount, peer(1)) is None


def test_an_update_changes_what_is_given_and_nothing_else(agreed):
    agreed.done(UpdateMember(peer=peer(0), region="b", may_vote=False, role="learner"))
    member = agreed.tables.get(Member, peer(0))
    assert (member.name, member.region, member.may_vote, member.role) == (
        "first", "b", False, "learner",
    )  # fmt: skip
    agreed.done(UpdateMember(peer=peer(0), name="new", addresses=("/ip4/192.0.2.1/tcp/1",)))
    member = agreed.tables.get(Member, peer(0))
    assert (member.name, member.region, member.addresses) == (
        "new", "b", ("/ip4/192.0.2.1/tcp/1",),
    )  # fmt: skip
    assert agreed.refused(UpdateMember(peer=peer(1), name="x")).reason == "no_member"


def test_there_is_an_end_to_members(agreed, monkeypatch):
    few(monkeypatch, Member, 1)
    assert agreed.refused(admit(1)).reason == "full"


def test_what_is_no_peer_id_becomes_no_member(agreed):
    command = AdmitMember(peer=NOT_A_PEER, name="x")
    assert agreed.refused(command).reason == "peer"


# -- tickets -----------------------------------------------------------------------------------


def test_a_ticket_admits_as_many_peers_as_it_has_uses(agreed):
    agreed.done(issue(uses=2))
    first = agreed.done(redeem(1)).number
    assert first == agreed.index
    assert agreed.done(redeem(2)).number == agreed.index
    refusal = agreed.refused(redeem(3))
    assert isinstance(refusal.error(), TicketUsedUp)
    assert "2 of 2" in str(refusal.error())


def test_redeeming_again_takes_no_use_even_when_the_ticket_is_over(agreed):
    agreed.done(issue(uses=1))
    first = agreed.done(redeem(1)).number
    again = agreed.done(redeem(1)).number
    late = agreed.done(redeem(1, now=T0 + 99_999)).number
    # Each time under a new Raft id, because its log may be lost.
    assert first < again < late == agreed.index
    assert agreed.refused(redeem(2)).code == "ticket_expired"


def test_a_voter_that_redeems_again_keeps_its_raft_id_and_is_told_that_it_votes(agreed):
    agreed.done(issue(uses=1))
    first = agreed.done(redeem(1)).number
    agreed.conf_state = ConfState(voters=(1, first))
    assert agreed.done(redeem(1)) == Done(first, VOTES)


def test_a_removed_peer_needs_a_new_use(agreed):
    agreed.done(issue(uses=2))
    first = agreed.done(redeem(1))
    agreed.done(RemoveMember(peer=peer(1)))
    assert agreed.done(redeem(1)).number > first.number
    agreed.done(RemoveMember(peer=peer(1)))
    assert agreed.refused(redeem(1)).code == "ticket_used_up"


def test_an_expired_ticket_stays_expired_when_a_clock_is_set_back(agreed):
    agreed.done(issue(uses=9, lifetime=100))
    agreed.done(redeem(1, now=T0 + 99))
    refusal = agreed.refused(redeem(2, now=T0 + 100))
    assert isinstance(refusal.error(), TicketExpired)
    assert "2027-01-15T08:01:40Z" in str(refusal.error())
    assert agreed.refused(redeem(2, now=T0)).code == "ticket_expired"


def test_a_secret_that_nobody_issued_is_unknown(agreed):
    assert isinstance(agreed.refused(redeem(1)).error(), TicketUnknown)


def test_a_ticket_for_what_is_no_peer_keeps_its_use(agreed):
    agreed.done(issue())
    command = RedeemTicket(secret_hash=secret_hash(1), peer=NOT_A_PEER, now=T0, name="x")
    assert agreed.refused(command).reason == "peer"
    assert agreed.done(redeem(1)).number == agreed.index


def test_issuing_the_same_ticket_twice_is_once_and_other_terms_are_refused(agreed):
    agreed.done(issue())
    agreed.done(issue())
    assert agreed.tables.count(IssuedTicket) == 1
    assert agreed.refused(issue(uses=2)).reason == "exists"


@pytest.mark.parametrize("lifetime", [0, 367 * 86_400])
def test_a_ticket_lives_a_second_to_a_year(agreed, lifetime):
    assert agreed.refused(issue(lifetime=lifetime)).reason == "lifetime"


def test_dead_tickets_make_room_oldest_first_and_living_ones_do_not(agreed, monkeypatch):
    few(monkeypatch, IssuedTicket, 2)
    agreed.done(issue(1))
    agreed.done(issue(2))
    assert agreed.refused(issue(3)).reason == "full"
    agreed.done(redeem(2, 2))
    agreed.done(redeem(1, 1))
    agreed.done(issue(3))
    assert agreed.refused(redeem(5, 1)).code == "ticket_unknown"
    assert agreed.refused(redeem(5, 2)).code == "ticket_used_up"


def test_withdrawing_forgets_one_ticket_or_all(agreed):
    for number in (1, 2, 3):
        agreed.done(issue(number))
    assert agreed.done(WithdrawTickets(secret_hash=secret_hash(2))).number == 1
    agreed.done(redeem(1, 1))
    assert agreed.done(WithdrawTickets()).number == 1
    assert agreed.tables.count(IssuedTicket) == 0


def test_a_clock_that_is_behind_issues_no_tickets_until_the_cluster_s_is_mended(agreed):
    agreed.done(issue(1))
    agreed.do(ExpireLeases(now=T0 + 10**8))
    agreed.done(AcquireLease(key="k", holder="h", ttl_s=60, now=T0))
    assert agreed.refused(issue(2)).reason == "clock_behind"
    assert agreed.done(SetClock(now=T0)).number == T0
    assert rules.clock(agreed.tables) == T0
    assert agreed.refused(redeem(1, 1)).code == "ticket_unknown"
    assert agreed.tables.get(Lease, "k").expires_at == T0 + 60
    agreed.done(issue(2))
    agreed.done(redeem(1, 2))


# -- the swarm key -----------------------------------------------------------------------------


def test_rotating_keeps_the_key_before_until_it_is_forgotten(agreed):
    new = b"n" * 32
    assert agreed.done(RotateSwarmKey(generation=1, key=new)).number == 2
    swarm = agreed.tables.get(Swarm, "")
    assert (swarm.swarm_key, swarm.swarm_key_before) == (new, KEY)
    assert agreed.refused(RotateSwarmKey(generation=1, key=b"x" * 32)).actual == "2"
    assert agreed.refused(ForgetOldSwarmKey(generation=1)).reason == "generation"
    agreed.done(ForgetOldSwarmKey(generation=2))
    assert agreed.tables.get(Swarm, "").swarm_key_before is None


def test_an_open_swarm_has_no_key_to_rotate():
    agreed = Agreed()
    assert agreed.refused(RotateSwarmKey(generation=1, key=KEY)).reason == "open"
    assert agreed.refused(ForgetOldSwarmKey(generation=1)).actual == "0"
    agreed.done(FoundCluster(swarm_id=bytes(16), swarm_key=None, peer=peer(0), name="x"))
    assert agreed.refused(RotateSwarmKey(generation=1, key=KEY)).reason == "open"


def test_no_key_is_in_any_repr(agreed):
    shown = [
        repr(FOUND),
        repr(RotateSwarmKey(generation=1, key=KEY)),
        repr(agreed.tables.get(Swarm, "")),
    ]
    assert not any("kkkk" in text for text in shown)


# -- the catalogue -----------------------------------------------------------------------------


def test_two_nodes_that_pull_a_name_at_once_agree_on_one_digest(agreed):
    first = agreed.done(SetTag(name="llama3", manifest=digest(1)))
    assert first == Done(agreed.index, digest(1))
    refusal = agreed.refused(SetTag(name="llama3:latest", manifest=digest(2)))
    assert (refusal.reason, refusal.actual) == ("tag_differs", digest(1))
    assert agreed.done(SetTag(name="LLAMA3", manifest=digest(1))) == first


def test_a_tag_moves_from_what_is_expected_or_from_anything(agreed):
    agreed.done(SetTag(name=name(1), manifest=digest(1)))
    agreed.done(SetTag(name=name(1), manifest=digest(2), expected=digest(1)))
    assert agreed.refused(SetTag(name=name(1), manifest=digest(3), expected=digest(1))).actual
    agreed.done(SetTag(name=name(1), manifest=digest(3), expected="*"))
    assert agreed.tables.get(Tag, name(1)).manifest == digest(3)
    assert agreed.refused(SetTag(name=name(2), manifest=digest(3), expected=digest(1))).actual == ""


def test_removing_a_tag_asks_what_it_means(agreed):
    agreed.done(SetTag(name=name(1), manifest=digest(1)))
    assert agreed.refused(RemoveTag(name=name(1), expected=digest(2))).reason == "tag_differs"
    assert agreed.done(RemoveTag(name=name(1), expected=digest(1))).text == digest(1)
    assert agreed.done(RemoveTag(name=name(1))).text == ""


def test_what_is_no_model_name_is_refused_everywhere(agreed):
    for command in (
        SetTag(name="../x", manifest=digest(1)),
        RemoveTag(name="a b"),
        SetCopies(name="-x", copies=1),
        Pin(name="x:", peer=peer(0)),
        Unpin(name="x:", peer=peer(0)),
    ):
        assert agreed.refused(command).reason == "name"


def test_there_is_an_end_to_what_is_catalogued(agreed, monkeypatch):
    for kind in (Tag, ChunkMapOf, Copies, Pinned, Lease):
        few(monkeypatch, kind, 1)
    for number, reason in ((1, ""), (2, "full")):
        for command in (
            SetTag(name=name(number), manifest=digest(1)),
            SetChunkMap(blob=digest(number), chunk_map=digest(9), size=1),
            SetCopies(name=name(number), copies=1),
            Pin(name=name(number), peer=peer(0)),
            AcquireLease(key=str(number), holder="h", ttl_s=1, now=1),
        ):
            result = agreed.do(command)
            assert (result.reason if isinstance(result, Refused) else "") == reason
    agreed.done(SetTag(name=name(1), manifest=digest(2), expected="*"))
    agreed.done(SetCopies(name=name(1), copies=2))


def test_the_first_chunk_map_wins_until_it_is_taken_back(agreed):
    first = SetChunkMap(blob=digest(1), chunk_map=digest(2), size=10)
    other = SetChunkMap(blob=digest(1), chunk_map=digest(3), size=10)
    agreed.done(first)
    agreed.done(first)
    assert agreed.refused(other).actual == digest(2)
    assert agreed.refused(SetChunkMap(blob=digest(1), chunk_map=digest(2), size=11)).reason
    assert agreed.refused(ForgetChunkMap(blob=digest(1), chunk_map=digest(3))).reason
    agreed.done(ForgetChunkMap(blob=digest(1), chunk_map=digest(2)))
    agreed.done(ForgetChunkMap(blob=digest(1), chunk_map=digest(2)))
    agreed.done(other)


def test_holdings_are_counted_once_however_often_they_are_announced(agreed):
    one, two, three = digest(1), digest(2), digest(3)
    assert agreed.done(Holds(peer=peer(0), added=(one, one, two))).number == 2
    assert agreed.done(Holds(peer=peer(0), added=(two, three), dropped=(three, one))).number == 1
    assert [key for key, _ in agreed.tables.items(Holding)] == [f"{peer(0)}/{two}"]
    assert agreed.done(Holds(peer=peer(0), dropped=(one, two))).number == 0
    assert agreed.tables.count(HoldingCount) == 0
    assert agreed.refused(Holds(peer=peer(1), added=(one,))).reason == "no_member"


def test_a_member_may_hold_so_many_and_all_together_so_many(agreed, monkeypatch):
    monkeypatch.setattr(rules, "HOLDINGS_PER_MEMBER", 2)
    agreed.done(Holds(peer=peer(0), added=(digest(1), digest(2))))
    assert agreed.refused(Holds(peer=peer(0), added=(digest(3),))).reason == "full"
    agreed.done(Holds(peer=peer(0), added=(digest(3),), dropped=(digest(1),)))
    few(monkeypatch, Holding, 3)
    agreed.done(admit(1))
    assert agreed.refused(Holds(peer=peer(1), added=(digest(1), digest(2)))).reason == "full"
    agreed.done(Holds(peer=peer(1), added=(digest(1),)))


# -- wishes, leases, settings ------------------------------------------------------------------


def test_wishes_are_kept_and_taken_back(agreed):
    assert agreed.done(SetCopies(name="llama3", copies=3)).number == 3
    agreed.done(SetCopies(name="Llama3", copies=None))
    assert agreed.tables.count(Copies) == 0
    agreed.done(Pin(name="llama3", peer=peer(0)))
    agreed.done(Pin(name="llama3", peer=peer(0)))
    assert agreed.refused(Pin(name="llama3", peer=peer(1))).reason == "no_member"
    assert agreed.tables.count(Pinned) == 1
    agreed.done(Unpin(name="llama3", peer=peer(0)))
    assert agreed.tables.count(Pinned) == 0


def test_a_lease_has_one_holder_and_every_token_is_greater_than_all_before(agreed):
    first = agreed.done(AcquireLease(key="k", holder="a", ttl_s=10, now=T0)).number
    refusal = agreed.refused(AcquireLease(key="k", holder="b", ttl_s=10, now=T0 + 9))
    assert (refusal.reason, refusal.actual) == ("lease_held", "a")
    again = agreed.done(AcquireLease(key="k", holder="a", ttl_s=10, now=T0 + 9)).number
    assert again > first
    assert agreed.refused(RenewLease(key="k", token=first, ttl_s=10, now=T0)).reason == "lease_lost"
    agreed.done(RenewLease(key="k", token=again, ttl_s=10, now=T0 + 15))
    other = agreed.done(AcquireLease(key="k", holder="b", ttl_s=10, now=T0 + 25)).number
    assert other > again
    assert agreed.refused(ReleaseLease(key="k", token=again)).actual == "b"
    agreed.done(ReleaseLease(key="k", token=other))
    assert agreed.refused(ReleaseLease(key="k", token=other)).reason == "lease_lost"


def test_a_lease_that_ran_out_is_not_renewed_though_nobody_took_it(agreed):
    token = agreed.done(AcquireLease(key="k", holder="a", ttl_s=10, now=T0)).number
    # A renewal for a shorter time takes nothing away.
    agreed.done(RenewLease(key="k", token=token, ttl_s=1, now=T0 + 2))
    assert agreed.tables.get(Lease, "k").expires_at == T0 + 10
    assert agreed.refused(RenewLease(key="k", token=token, ttl_s=9, now=T0 + 10)).reason
    # A clock that is set back renews nothing either.
    assert agreed.refused(RenewLease(key="k", token=token, ttl_s=9, now=T0)).reason


def test_expiry_ends_those_that_are_over(agreed):
    for number in range(4):
        agreed.done(AcquireLease(key=str(number), holder="a", ttl_s=10 + number, now=T0))
    assert agreed.done(ExpireLeases(now=T0 + 11)).number == 2
    assert [key for key, _ in agreed.tables.items(Lease)] == ["2", "3"]


def test_settings_are_a_closed_table_with_bounds(agreed):
    agreed.done(SetSetting(key="voters_max", value=3))
    agreed.done(SetSetting(key="autopilot", value=False))
    changed = {key: row.value for key, row in agreed.tables.items(AgreedSetting)}
    assert agreed_settings(changed) == AgreedSettings(voters_max=3, autopilot=False)
    for key, value, what in (
        ("voters_max", 2, "one of 1, 3, 5"),
        ("voters_max", True, "one of"),
        ("autopilot", 1, "true or false"),
        ("dead_after_s", 4, "5 to 86,400"),
        ("colour", 1, "no such setting"),
    ):
        assert what in agreed.refused(SetSetting(key=key, value=value)).message


def test_every_setting_s_default_is_within_its_bounds_and_in_the_dataclass():
    assert agreed_settings({}) == AgreedSettings()
    assert not any(setting.problem(setting.default) for setting in SETTINGS.values())


# -- encoding ----------------------------------------------------------------------------------


def test_a_command_that_breaks_a_bound_is_not_even_proposed():
    for command in (
        AdmitMember(peer=peer(1), name="a\nb"),
        AdmitMember(peer=peer(1), name="a\n"),
        AdmitMember(peer=peer(1), name=""),
        AdmitMember(peer=peer(1), name="x", region="a b"),
        AdmitMember(peer="12D3", name="x"),
        SetTag(name=name(1), manifest="sha256:" + "A" * 64),
        SetTag(name=name(1), manifest=digest(1) + "\n"),
        issue(uses=257),
        SetCopies(name=name(1), copies=65),
        SetCopies(name=name(1), copies=2**70),
        Holds(peer=peer(0), added=(digest(1),) * 1_025),
        AcquireLease(key="k" * 300_000, holder="a", ttl_s=1, now=1),
    ):
        with pytest.raises(BadInput, match=type(command).__name__):
            encode_command(command)


def test_the_longest_command_can_be_proposed():
    many = tuple(digest(number) for number in range(1_024))
    assert len(encode_command(Holds(peer=peer(0), added=many, dropped=many))) < 256 * 1024


def test_another_version_an_unknown_command_and_an_unknown_field_are_refused(agreed):
    data = encode_command(admit(1))
    assert agreed.refused(b"\x02" + data[1:]).reason == "version"
    assert agreed.refused(b"").reason == "version"
    assert agreed.refused(data.replace(b"admit", b"admat")).reason == "malformed"
    assert agreed.refused(data.replace(b"region", b"legion")).reason == "malformed"
    assert agreed.refused(data[:-1]).reason == "malformed"


def test_results_survive_encoding_and_garbage_is_named():
    for result in (Done(5, "x"), Done(), Refused("bad_input", "full", "no room", "a", 3)):
        assert decode_result(encode_result(result)) == result
    with pytest.raises(MalformedMessage):
        decode_result(b"\xc1")


def test_a_refusal_is_raised_as_the_error_it_names():
    error = Refused("bad_input", "full", "no room").error()
    assert type(error) is BadInput
    assert str(error) == "no room"


# -- sessions ----------------------------------------------------------------------------------


def test_a_command_that_comes_twice_is_carried_out_once(agreed):
    session = int.from_bytes(open_session(5, agreed.tables), "big")
    carried_out: list[int] = []

    def act() -> Done:
        carried_out.append(1)
        return Done(len(carried_out))

    first = once(session, 1, 6, agreed.tables, act)
    assert once(session, 1, 7, agreed.tables, act) == first
    # One that overtook another does not make the other a repetition.
    third = once(session, 3, 8, agreed.tables, act)
    second = once(session, 2, 9, agreed.tables, act)
    assert [decode_result(each) for each in (first, third, second)] == [Done(1), Done(2), Done(3)]


def test_a_session_remembers_so_many_results_and_refuses_what_is_older(agreed):
    open_session(5, agreed.tables)
    for sequence in range(1, RESULTS_PER_SESSION + 3):
        once(5, sequence, 5 + sequence, agreed.tables, Done)
    assert agreed.tables.count(RememberedResult) == RESULTS_PER_SESSION
    assert decode_result(once(5, 2, 999, agreed.tables, Done)).reason == "sequence"
    once(5, 10**9, 1_000, agreed.tables, Done)
    assert agreed.tables.count(RememberedResult) == 1
    for sequence in (0, 2**63):
        assert decode_result(once(5, sequence, 1_001, agreed.tables, Done)).reason == "sequence"


def test_the_longest_result_can_be_remembered(agreed):
    long = "\U0001f9ca" * 128
    agreed.done(AcquireLease(key="k", holder=long, ttl_s=10, now=T0))
    result = encode_result(agreed.refused(AcquireLease(key="k", holder="b", ttl_s=1, now=T0)))
    row = RememberedResult(result)
    assert msgspec.json.decode(msgspec.json.encode(row), type=RememberedResult) == row


def test_the_session_unused_for_longest_ends_and_its_results_with_it(agreed):
    for index in range(1, SESSIONS_MAX + 1):
        open_session(index, agreed.tables)
        once(index, 1, index, agreed.tables, Done)
    once(1, 1, 5_000, agreed.tables, Done)
    open_session(6_000, agreed.tables)
    assert agreed.tables.count(Session) == SESSIONS_MAX
    assert decode_result(once(2, 2, 6_001, agreed.tables, Done)).reason == "session_ended"
    assert not agreed.tables.items(RememberedResult, f"{2:020d}/")
    assert decode_result(once(1, 1, 6_002, agreed.tables, Done)) == Done()


def test_the_clock_begins_at_nothing():
    assert rules.clock(Agreed().tables) == 0
    agreed = founded()
    agreed.do(ExpireLeases(now=5))
    agreed.do(ExpireLeases(now=3))
    assert agreed.tables.get(Clock, "").now == 5
