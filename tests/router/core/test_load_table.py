"""One node's table: whose word counts, what is kept, and what is told."""

import random

import msgspec
import pytest

from ollamamax_p2p.errors import MalformedMessage
from ollamamax_p2p.inference.core.models import LoadedModel, ServableModel
from ollamamax_p2p.router.core import load_table
from ollamamax_p2p.router.core.load_table import (
    GOSSIP,
    GOSSIP_BYTES_MAX,
    REPORT_BYTES_MAX,
    AgedReport,
    BackendLoad,
    BackendModels,
    DigestEntry,
    LoadDigest,
    LoadNews,
    LoadReport,
    LoadTable,
    LoadWanted,
    ModelSpeed,
    ModelsReport,
    model_key,
)
from ollamamax_p2p.router.settings import RouterSettings

RNG = random.Random(1)


def a_table(**settings) -> LoadTable:
    return LoadTable(peer="me", epoch=5, settings=RouterSettings(**settings))


def a_report(peer="p", *, epoch=1, sequence=1, **facts) -> LoadReport:
    return LoadReport(peer=peer, epoch=epoch, sequence=sequence, **facts)


def news(*reports, age_s=0.0) -> LoadNews:
    return LoadNews(reports=tuple(AgedReport(report=each, age_s=age_s) for each in reports))


def page(peer="p", *, names=("m:1b",), version=1, epoch=1, number=0, pages=1) -> ModelsReport:
    models = tuple(ServableModel(name=name) for name in names)
    return ModelsReport(
        peer=peer,
        epoch=epoch,
        version=version,
        page=number,
        pages=pages,
        backends=(BackendModels(name="ollama", models=models),),
    )


def tell(table, *, models=("m:1b",), loaded=(), now=0.0, **facts):
    told = {
        "node": "my node",
        "draining": False,
        "memory_free": 2**33,
        "memory_total": 2**34,
        "accelerator": "",
        "backends": [BackendLoad(name="ollama", loaded=tuple(loaded))],
        "models": [
            BackendModels(name="ollama", models=tuple(ServableModel(name=n) for n in models))
        ],
    }
    table.tell(**(told | facts), now=now)


def sequence_of(table, peer="p") -> int:
    return table.node(peer).report.sequence


# -- whose word counts -------------------------------------------------------------------------


def test_the_newest_report_counts_in_whatever_order_they_come():
    table = a_table()
    table.hear("q", news(a_report(sequence=3)), now=0.0)
    table.hear("q", news(a_report(sequence=2)), now=1.0)
    assert sequence_of(table) == 3
    table.hear("q", news(a_report(epoch=2, sequence=1)), now=2.0)  # Started again.
    assert sequence_of(table) == 1


def test_what_a_node_says_itself_beats_what_others_say_in_its_name():
    table = a_table()
    table.hear("liar", news(a_report(sequence=10**6, node="forged")), now=0.0)
    table.hear("p", news(a_report(sequence=4, node="true")), now=1.0)
    assert table.node("p").report.node == "true"
    table.hear("p", news(a_report(sequence=4, node="true")), now=2.0)
    assert table.node("p").made_at == 1.0


def test_only_members_are_believed():
    table = LoadTable(
        peer="me", epoch=1, settings=RouterSettings(), is_member=lambda peer: peer == "p"
    )
    table.hear("q", news(a_report("p"), a_report("stranger")), now=0.0)
    assert table.node("p") is not None
    assert table.node("stranger") is None


def test_numbers_that_cannot_be_are_refused():
    for bad in (float("nan"), float("inf"), -1.0, 1e300):
        data = msgspec.msgpack.encode(
            {
                "is": "news",
                "reports": [
                    {
                        "report": {
                            "peer": "p",
                            "epoch": 1,
                            "sequence": 1,
                            "backends": [
                                {"name": "x", "speeds": [{"model": "m", "decode_tps": bad}]}
                            ],
                        }
                    }
                ],
            }
        )
        with pytest.raises(MalformedMessage):
            GOSSIP.decode(data)


def test_a_report_that_is_too_long_is_not_kept():
    table = a_table()
    many = tuple(
        BackendLoad(
            name="x", speeds=tuple(ModelSpeed(model="m" * 350) for _ in range(REPORT_BYTES_MAX))
        )
        for _ in range(1)
    )
    table.hear("p", news(a_report(backends=many)), now=0.0)
    assert table.node("p") is None


def test_a_forged_report_of_this_node_itself_is_outdone():
    table = a_table()
    tell(table)
    table.hear("liar", news(a_report("me", epoch=99, sequence=7)), now=1.0)
    own = table.node("me")
    assert own.report.epoch == 100
    assert own.models_at == own.wanted
    assert all(each.epoch == 100 for each in own.pages.values())
    table.hear("honest", news(own.report), now=1.0)
    assert table.node("me").report.epoch == 100
    table.hear("liar", news(a_report("me", epoch=2**53 - 1)), now=1.0)  # There is none above.
    assert table.node("me").report.epoch == 100


# -- how old, and how long it is kept ----------------------------------------------------------


def test_a_report_is_as_old_as_its_tellers_say_together():
    table = a_table(stale_s=15.0, dead_s=60.0)
    table.hear("q", news(a_report(), age_s=14.0), now=100.0)
    assert table.node("p").made_at == 86.0
    assert table.suspect_after_s() == 15.0
    told = table.round(["x"], now=101.0, rng=RNG)
    (aged,) = told[0][1].reports
    assert aged.age_s == 15.0
    assert [node.report.peer for node in table.nodes(now=146.0)] == ["me", "p"]
    assert [node.report.peer for node in table.nodes(now=147.0)] == ["me"]
    table.hear("q", news(a_report(sequence=9), age_s=61.0), now=200.0)
    assert table.node("p") is None


def test_who_is_forgotten_comes_back_only_with_newer_news():
    table = a_table()
    table.hear("p", news(a_report(sequence=5)), now=0.0)
    table.forget("p", now=1.0)
    table.forget("p", now=1.0)
    assert table.node("p") is None
    table.hear("q", news(a_report(sequence=5)), now=2.0)
    assert table.node("p") is None
    table.hear("q", news(a_report(sequence=6)), now=3.0)
    assert sequence_of(table) == 6
    table.forget("me", now=4.0)
    assert table.node("me") is not None


def test_the_memory_of_who_was_forgotten_ends_and_is_bounded():
    table = a_table(nodes_max=2, dead_s=60.0)
    for peer in ("a", "b", "c"):
        table.hear(peer, news(a_report(peer)), now=0.0)
        table.forget(peer, now=0.0)
    assert list(table._forgotten) == ["b", "c"]
    table.nodes(now=61.0)
    assert not table._forgotten


def test_a_full_table_takes_nobody_until_somebody_is_dead():
    table = a_table(nodes_max=3, dead_s=60.0)
    for peer in ("a", "b", "c"):
        table.hear(peer, news(a_report(peer)), now=0.0)
    assert table.node("c") is None
    table.hear("a", news(a_report("a", sequence=2)), now=50.0)
    assert sequence_of(table, "a") == 2
    table.hear("c", news(a_report("c")), now=70.0)
    assert table.node("c") is not None
    assert table.node("b") is None


def test_the_table_is_bounded_in_bytes():
    table = a_table(table_bytes_max=2_000)
    for number in range(100):
        table.hear("q", news(a_report(f"p{number}", node="n" * 100)), now=0.0)
    assert 5 < len(table.nodes(now=0.0)) < 20
    table.hear("q", news(a_report("p0", sequence=2, models_version=1)), now=0.0)
    table.hear("q", page("p0", names=tuple(f"model{each}" for each in range(200))), now=0.0)
    assert table.holders("model1") == []
    assert table._bytes <= 2_000 + 200


# -- what is told ------------------------------------------------------------------------------


def test_a_node_tells_nothing_before_it_knows_itself():
    table = a_table()
    assert table.round(["x"], now=0.0, rng=RNG) == []
    tell(table)
    assert table.round([], now=1.0, rng=RNG) == []
    assert table.round(["me"], now=1.0, rng=RNG) == []
    assert [peer for peer, _ in table.round(["x"], now=1.0, rng=RNG)] == ["x"]


def test_news_is_told_a_few_times_to_a_few_and_then_not_any_more():
    table = a_table(gossip_fanout=2, gossip_repeats=3, heartbeat_s=1e6)
    tell(table)
    peers = [f"x{number}" for number in range(5)]
    told = [len(table.round(peers, now=float(number), rng=RNG)) for number in range(6)]
    assert told == [2, 2, 2, 0, 0, 0]


def test_a_report_that_did_not_change_is_told_with_the_heartbeat():
    table = a_table(heartbeat_s=5.0, gossip_repeats=1)
    tell(table)
    table.round(["x"], now=1.0, rng=RNG)
    before = sequence_of(table, "me")
    tell(table, now=2.0)
    assert sequence_of(table, "me") == before
    assert table.round(["x"], now=2.0, rng=RNG) == []
    assert len(table.round(["x"], now=6.0, rng=RNG)) == 1
    assert sequence_of(table, "me") == before + 1


def test_small_changes_of_free_memory_are_not_news():
    table = a_table()
    tell(table, memory_free=2**30 + 5)
    before = sequence_of(table, "me")
    tell(table, memory_free=2**30 + 10**6)
    assert sequence_of(table, "me") == before
    tell(table, memory_free=2**29)
    assert sequence_of(table, "me") == before + 1


def test_what_is_new_is_told_before_what_was_told_already():
    table = a_table(gossip_repeats=2)
    tell(table)
    table.hear("q", news(a_report("old")), now=0.0)
    table.round(["x"], now=1.0, rng=RNG)
    table.hear("q", news(a_report("new")), now=1.5)
    (_, message), *_ = table.round(["x"], now=2.0, rng=RNG)
    assert [each.report.peer for each in message.reports] == ["me", "new", "old"]


def test_what_does_not_fit_into_one_message_is_told_with_the_next():
    table = a_table(gossip_repeats=1)
    tell(table)
    for number in range(400):
        table.hear("q", news(a_report(f"p{number}", node="n" * 120)), now=0.0)
    told = []
    for number in range(1, 5):
        for _, message in table.round(["x"], now=number / 10, rng=RNG):
            if isinstance(message, LoadNews):
                assert len(GOSSIP.encode(message)) <= GOSSIP_BYTES_MAX
                told += [each.report.peer for each in message.reports]
    assert sorted(told) == sorted(["me", *(f"p{number}" for number in range(400))])


def test_a_report_is_cut_until_it_is_short_enough():
    table = a_table()
    loaded = [LoadedModel(name=f"{number}{'m' * 390}") for number in range(64)]
    tell(table, backends=[BackendLoad(name="x", loaded=tuple(loaded))])
    own = table.node("me")
    assert own.bytes <= REPORT_BYTES_MAX
    assert 8 <= len(own.report.backends[0].loaded) < 64


# -- models ------------------------------------------------------------------------------------


def test_models_are_found_under_every_spelling_of_their_name():
    table = a_table()
    tell(table, models=("llama3.2:latest", "Org/Model_v1:q4", "with space"))
    assert [each.servable.name for each in table.holders("LLAMA3.2")] == ["llama3.2:latest"]
    assert len(table.holders("registry.ollama.ai/library/llama3.2:latest")) == 1
    assert len(table.holders("org/model_v1:Q4")) == 1
    assert len(table.holders("With Space")) == 1
    assert table.holders("other") == []
    assert model_key("with space") == "with space"


def test_models_are_asked_of_whoever_told_of_them_and_then_of_others():
    table = a_table()
    table.hear("q", news(a_report("p", models_version=1)), now=0.0)
    assert table.round(["q", "x"], now=0.0, rng=RNG)[-1] == ("q", LoadWanted(models=("p",)))
    wanted = [m for _, m in table.round(["q"], now=1.0, rng=RNG) if isinstance(m, LoadWanted)]
    assert wanted == []
    assert ("x", LoadWanted(models=("p",))) in table.round(["x"], now=4.0, rng=RNG)
    table.hear("x", page("p"), now=4.1)
    assert [each.peer for each in table.holders("m:1b")] == ["p"]
    assert all(isinstance(m, LoadNews) for _, m in table.round(["x"], now=9.0, rng=RNG))


def test_a_node_that_is_linked_is_asked_itself():
    table = a_table()
    table.hear("q", news(a_report("p", models_version=1)), now=0.0)
    assert table.round(["p", "q"], now=0.0, rng=RNG)[-1][0] == "p"


def test_not_everybodys_models_are_asked_for_at_once():
    table = a_table()
    for number in range(load_table.MODELS_ASKED_MAX + 5):
        table.hear("q", news(a_report(f"p{number}", models_version=1)), now=0.0)
    (wanted,) = [m for _, m in table.round(["q"], now=0.0, rng=RNG) if isinstance(m, LoadWanted)]
    assert len(wanted.models) == load_table.MODELS_ASKED_MAX


def test_models_that_nobody_asked_for_or_that_are_old_are_not_taken():
    table = a_table()
    table.hear("q", page("p"), now=0.0)
    table.hear("q", news(a_report("p", models_version=2)), now=0.0)
    table.hear("q", page("p", version=1), now=0.0)
    table.hear("q", page("p", version=2, number=3, pages=2), now=0.0)
    table.hear("q", page("me", version=0, epoch=5), now=0.0)
    assert table.holders("m:1b") == []
    table.hear("q", page("p", version=2), now=0.0)
    table.hear("q", page("p", version=2, names=("forged",)), now=0.0)
    assert len(table.holders("m:1b")) == 1
    assert table.holders("forged") == []


def test_the_pages_of_a_long_list_come_in_any_order_and_count_when_all_are_there():
    table = a_table()
    table.hear("q", news(a_report("p", models_version=1)), now=0.0)
    table.hear("q", page("p", names=("b",), number=1, pages=2), now=0.0)
    table.hear("q", page("p", names=("b",), number=1, pages=2), now=0.0)
    assert table.holders("b") == []
    table.hear("q", page("p", names=("x",), number=1, pages=3), now=0.0)  # Another's, in 3 pages.
    table.hear("q", page("p", names=("a",), number=0, pages=2), now=0.0)
    table.hear("q", page("p", names=("b",), number=1, pages=2), now=0.0)
    assert len(table.holders("a")) == len(table.holders("b")) == 1
    assert table.holders("x") == []


def test_newer_models_replace_the_older_ones_which_hold_until_then():
    table = a_table()
    table.hear("q", news(a_report("p", models_version=1)), now=0.0)
    table.hear("q", page("p"), now=0.0)
    table.hear("q", news(a_report("p", sequence=2, models_version=2)), now=1.0)
    assert len(table.holders("m:1b")) == 1
    table.hear("q", page("p", version=2, names=("n:1b",)), now=2.0)
    assert table.holders("m:1b") == []
    assert len(table.holders("n:1b")) == 1
    table.hear("q", news(a_report("p", epoch=2)), now=3.0)  # Started again, and knows of none yet.
    assert table.holders("n:1b") == []


def test_a_longer_list_is_told_in_pages_that_another_table_understands():
    table, other = a_table(), LoadTable(peer="other", epoch=1, settings=RouterSettings())
    names = tuple(f"{number}-{'m' * 300}" for number in range(400))
    tell(table, models=(*names, "short"))
    (_, report_news), *_ = table.round(["other"], now=0.0, rng=RNG)
    other.hear("me", report_news, now=0.0)
    ((whom, question),) = [
        each for each in other.round(["me"], now=0.0, rng=RNG) if isinstance(each[1], LoadWanted)
    ]
    assert whom == "me"
    answers = table.hear("other", question, now=0.0)
    assert len(answers) > 2
    for answer in answers:
        other.hear("me", GOSSIP.decode(GOSSIP.encode(answer)), now=0.0)
    assert len(other.holders("short")) == 1
    assert other.node("me").models == table.node("me").models
    tell(table, models=("short",))
    assert table.holders(names[0]) == []


def test_a_model_whose_description_is_too_long_is_not_told():
    table = a_table()
    long = ServableModel(name="long", capabilities=("c" * 9_000,))
    listed = BackendModels(name="x", models=(long, ServableModel(name="m")))
    table.tell(
        node="",
        draining=False,
        memory_free=0,
        memory_total=0,
        accelerator="",
        backends=[],
        models=[listed],
        now=0.0,
    )
    (first,) = table.node("me").pages.values()
    assert [each.name for each in first.backends[0].models] == ["m"]


# -- digests -----------------------------------------------------------------------------------


def test_a_digest_is_answered_with_what_is_newer_here_and_asked_for_what_is_newer_there():
    table = a_table()
    for peer, sequence in (("a", 5), ("b", 5), ("c", 5)):
        table.hear(peer, news(a_report(peer, sequence=sequence)), now=0.0)
    digest = LoadDigest(
        entries=tuple(
            DigestEntry(peer=peer, epoch=epoch, sequence=sequence, models_version=0)
            for peer, epoch, sequence in (("a", 1, 4), ("b", 1, 6), ("d", 1, 1), ("me", 9, 9))
        )
    )
    answers = table.hear("q", digest, now=0.0)
    told = [each.report.peer for each in answers[0].reports]
    assert sorted(told) == ["a", "c"]  # "me" they say they know better: see above for that.
    assert answers[1] == LoadWanted(reports=("b", "d"))
    asked = table.hear("q", LoadWanted(reports=("a", "a", "nobody")), now=0.0)
    assert [each.report.peer for each in asked[0].reports] == ["a"]


def test_a_page_of_a_digest_speaks_for_its_part_only():
    table = a_table()
    for peer in ("a", "b", "c"):
        table.hear(peer, news(a_report(peer)), now=0.0)
    digest = LoadDigest(entries=(), first="a", last="b")
    (answer,) = table.hear("q", digest, now=0.0)
    assert [each.report.peer for each in answer.reports] == ["b"]


def test_a_long_digest_comes_in_pages_that_cover_everybody():
    table = a_table(table_bytes_max=2**30)
    for number in range(900):
        peer = f"{number:04d}{'p' * 60}"
        table.hear("q", news(a_report(peer)), now=0.0)
    pages = table.greet(now=0.0)
    assert len(pages) == 2
    assert all(len(GOSSIP.encode(each)) <= GOSSIP_BYTES_MAX for each in pages)
    assert sum(len(each.entries) for each in pages) == 901
    assert (pages[0].first, pages[1].last) == ("", "")
    assert pages[0].last == pages[1].first
    empty = LoadTable(peer="other", epoch=1, settings=RouterSettings(table_bytes_max=2**30))
    answers = empty.hear("me", pages[0], now=0.0)
    (wanted,) = answers
    assert len(wanted.reports) == len(pages[0].entries)


def test_an_answer_is_bounded_however_much_is_asked_for(monkeypatch):
    monkeypatch.setattr(load_table, "ANSWER_BYTES_MAX", 100_000)
    table = a_table(table_bytes_max=2**30)
    for number in range(1_000):
        table.hear("q", news(a_report(f"p{number}", node="n" * 120, models_version=1)), now=0.0)
    names = tuple(f"{each}{'m' * 90}" for each in range(200))
    for number in range(10):
        table.hear("q", page(f"p{number}", names=names), now=0.0)
    everybody = tuple(f"p{number}" for number in range(1_000))
    answers = table.hear("q", LoadWanted(reports=everybody, models=everybody), now=0.0)
    assert sum(isinstance(each, LoadNews) for each in answers) == 2
    assert sum(isinstance(each, ModelsReport) for each in answers) == 4
