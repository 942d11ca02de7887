"""Deployed sites as the coordinator sees them: joining, leaving, quorum, late replies; no process, real messages."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedlora.exchange import ClientReport, Outcome
from fedlora.joining import PROTOCOL, JoinReport, JoinRequest
from fedlora.server import Federation, FederationError, FlowerStrategy
from fedlora.server.mail import Mail
from fedlora.server.sites import Sites
from fedlora.wire import Reply, from_named_arrays, read_instruction
from strategies import FFALora
from tests.support.loop import Arrays, Node, examples_of, node_of
from tests.support.post import OWN, PostGrid, site
from tests.support.small import failing, replies_of, silent
from tests.support.small import server_of as plain_server_of

NAMES = ("north", "south", "east")
NODES = {"north": 11, "south": 12, "east": 13}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look every hundredth of a second instead of every one."""
    monkeypatch.setattr("fedlora.server.sites._POLL_S", 0.01)
    monkeypatch.setattr("fedlora.server.mail._DEPLOYED_POLL_S", 0.01)


class Said(list[str]):
    """What whoever runs the coordinator is told; something may happen when it is."""

    def __init__(self) -> None:
        self.then: list[tuple[str, Callable[[], Any]]] = []

    def __call__(self, text: str) -> None:
        self.append(text)
        for words, action in list(self.then):
            if words in text:
                self.then.remove((words, action))
                action()

    def has(self, pattern: str) -> bool:
        return any(re.search(pattern, text) for text in self)


@pytest.fixture
def said() -> Said:
    return Said()


def sites_of(said: Said, *, needed: int = 0, wait: float = 5.0, timeout: float = 60.0) -> Sites:
    return Sites(
        NODES,
        lambda name, client: JoinRequest(name, client, len(NODES), {"seed": 0}),
        OWN,
        needed=needed,
        wait=wait,
        timeout=timeout,
        say=said,
    )


def grid_of(offline: tuple[str, ...] = (), **nodes: Any) -> PostGrid:
    return PostGrid({NODES[name]: nodes.get(name, site()) for name in NAMES}, offline=[NODES[name] for name in offline])


ALL = (0, 1, 2)
EVERYBODY = {11: (0,), 12: (1,), 13: (2,)}

# -- who is there -----------------------------------------------------------------------------------------


def test_the_first_round_waits_for_all_sites_and_a_later_one_for_one(said: Said) -> None:
    grid, sites = grid_of(offline=("east",)), sites_of(said)
    said.then.append(("waiting for sites. site east: its SuperNode is not connected", grid.offline.clear))
    assert sites.assign(grid, ALL, 1) == EVERYBODY
    assert not grid.offline, "it was waited for"
    assert [len(grid.asked(node)) for node in NODES.values()] == [1, 1, 1]
    assert said.has("site east has joined: 100 declared rows")
    grid.offline.update((12, 13))
    assert sites.assign(grid, ALL, 2) == {11: (0,)}
    assert said.has("round 2 goes without site south: its SuperNode is not connected; site east: its SuperNode is not")


def test_a_request_names_the_site_the_client_and_the_job(said: Said) -> None:
    asked: list[JoinRequest] = []

    def answer(request: JoinRequest) -> JoinReport:
        asked.append(request)
        return replace(OWN, site=request.site, rows=7)

    sites = sites_of(said)
    grid = grid_of((), **dict.fromkeys(NAMES, site(answer=answer)))
    sites.assign(grid, ALL, 1)
    assert [(one.site, one.client, one.clients) for one in asked] == [(name, k, 3) for k, name in enumerate(NAMES)]
    assert [sites.job([client]) for client in ALL] == [one.job for one in asked]
    assert len({one.job for one in asked}) == 3
    assert [sites.rows(client) for client in ALL] == [7, 7, 7]
    assert set(sites.reports) == set(NAMES)
    assert sites.name(1) == "site south"


def test_who_is_missing_is_named_with_the_reason(said: Said) -> None:
    refusing = site(answer=lambda request: JoinReport("south", "the site's own limits refuse the job"))
    grid, sites = grid_of(offline=("east",), south=refusing), sites_of(said, wait=0.1)
    with pytest.raises(
        FederationError,
        match=r"round 1: 1 of 3 sites are there after federation.wait = 0.1 s, and 3 are needed. site south: the "
        r"site's own limits refuse the job; site east: its SuperNode is not connected",
    ):
        sites.assign(grid, ALL, 1)
    quiet = sites_of(said, wait=0.1)
    with pytest.raises(FederationError, match="site south: it has been asked to join, and has not answered yet"):
        quiet.assign(grid_of(south=site(answer=lambda _: None)), ALL, 1)


def test_the_number_of_sites_that_is_needed_is_enough(said: Said) -> None:
    grid = grid_of(offline=("north",))
    assert sites_of(said, needed=2).assign(grid, ALL, 1) == {12: (1,), 13: (2,)}
    grid.offline.add(12)
    with pytest.raises(FederationError, match=r"1 of 3 sites are there .* and 2 are needed"):
        sites_of(said, needed=2, wait=0.1).assign(grid, ALL, 1)


def test_a_round_waits_for_a_site_that_it_has_sampled(said: Said) -> None:
    """Enough sites are there, but none of this round's."""
    grid, sites = grid_of(offline=("east",)), sites_of(said, needed=1)
    said.then.append(("waiting for sites", grid.offline.clear))
    assert sites.assign(grid, [2], 1) == {13: (2,)}


def test_a_site_that_joins_later_takes_part_from_then_on(said: Said) -> None:
    grid, sites = grid_of(offline=("east",)), sites_of(said, needed=2)
    assert sites.assign(grid, ALL, 1) == {11: (0,), 12: (1,)}
    grid.offline.clear()
    rounds = [sites.assign(grid, ALL, number) for number in (2, 3)]
    assert rounds[-1] == EVERYBODY
    assert len(grid.asked(13)) == 1


def test_a_node_that_goes_is_dropped_and_joins_anew_when_it_comes_back(said: Said) -> None:
    """What comes back may have another model: it is not taken for what it was."""
    answers = [replace(OWN, site="east", rows=5), replace(OWN, site="east", rows=5, digest="another")]
    grid, sites = grid_of(east=site(answer=lambda _: answers.pop(0))), sites_of(said)
    assert sites.assign(grid, ALL, 1) == EVERYBODY
    grid.offline.add(13)
    assert sites.assign(grid, ALL, 2) == {11: (0,), 12: (1,)}
    assert said.has("site east: its SuperNode is not connected any more")
    assert sites.rows(2) == 0
    grid.offline.clear()
    for number in (3, 4):
        assert sites.assign(grid, ALL, number) == {11: (0,), 12: (1,)}
    assert said.has("site east does not join: the base model, its quantisation or its tokenizer differs")


# -- who does not belong ----------------------------------------------------------------------------------


def unreadable(message: Message) -> RecordDict:
    return RecordDict({"joined": ConfigRecord({"site": 3})})


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (site(site="south"), "its SuperNode is registered as 'east', and its daemon calls itself 'south'"),
        (site(site=""), "its SuperNode is registered as 'east', and its daemon calls itself ''"),
        (site(digest="other"), "the base model, its quantisation or its tokenizer differs: 'other' at the site"),
        (site(initial_digest="other"), "the tensors drawn from the seed differs"),
        (site(constants_digest="other"), "the method's constants differs"),
        (site(protocol=PROTOCOL + 1), f"the version of the protocol differs: '{PROTOCOL + 1}' at the site"),
        (site(rows=0), "it declares no rows"),
        (site(rows=-5), "it declares no rows"),
        (site(reason="it must not"), "it must not"),
        (site(answer=lambda _: RuntimeError("no such socket")), "its node failed: no such socket"),
        (unreadable, "its answer cannot be read: joined.site is not str"),
    ],
)
def test_a_site_that_does_not_agree_is_refused_by_name(node: Node, reason: str, said: Said) -> None:
    sites, grid = sites_of(said, wait=0.1), grid_of(east=node)
    with pytest.raises(FederationError, match=f"2 of 3 sites are there .* site east: {re.escape(reason)}"):
        sites.assign(grid, ALL, 1)
    assert said.has(re.escape(f"site east does not join: {reason}"))
    assert len(grid.asked(13)) == 1, "it is not asked again and again"
    assert "east" not in sites.reports


def test_other_code_at_a_site_is_said_and_allowed(said: Said) -> None:
    sites = sites_of(said)
    sites.assign(grid_of(east=site(fingerprint="g", version="9.9")), ALL, 1)
    assert said.has(r"site east has joined.*note: its installed code \(fedlora 9.9\) is not the coordinator's")
    assert not said.has("site south has joined.*note")


def test_a_site_that_was_mended_is_asked_again(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.server.sites._ASK_AGAIN_S", 0.05)
    answers = [JoinReport("east", "the disk is full")] * 2
    good = replace(OWN, site="east", rows=5)
    grid = grid_of(east=site(answer=lambda _: answers.pop() if answers else good))
    assert sites_of(said).assign(grid, ALL, 1) == EVERYBODY
    assert len(grid.asked(13)) == 3
    assert said.has("site east does not join: the disk is full")


def test_a_site_that_never_answered_is_asked_again(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request may have been lost, such as by a SuperLink that was restarted."""
    monkeypatch.setattr("fedlora.server.sites._LOST_S", 0.05)
    calls: list[int] = []

    def answer(_: JoinRequest) -> JoinReport | None:
        calls.append(1)
        return replace(OWN, site="east", rows=5) if len(calls) > 1 else None

    grid = grid_of(east=site(answer=answer))
    assert sites_of(said).assign(grid, ALL, 1) == EVERYBODY
    assert [message.metadata.ttl for message in grid.asked(13)] == [60.0, 60.0]


# -- rounds -----------------------------------------------------------------------------------------------


def server_of(said: Said, *, timeout: float = 60.0, needed: int = 0, **changes: Any) -> FlowerStrategy:
    """A coordinator's strategy with three sites, before it has seen any of them."""
    plain = plain_server_of(FFALora, clients=3)
    federation = Federation(3, dtype="float64", deployed=True, **changes)
    return FlowerStrategy(plain.strategy, federation, plain.state, sites_of(said, timeout=timeout, needed=needed))


def honest(server: FlowerStrategy, **spoilt: Node) -> PostGrid:
    return grid_of((), **{name: site(spoilt.get(name, node_of(server))) for name in NAMES})


def run(server: FlowerStrategy, grid: PostGrid, rounds: int = 1, timeout: float = 60.0) -> Arrays:
    result = server.start(grid, server.arrays, num_rounds=rounds, timeout=timeout)
    assert result.arrays is not None
    return from_named_arrays(result.arrays)


@pytest.fixture
def clock() -> Callable[[], float]:
    start = time.monotonic()
    return lambda: time.monotonic() - start


def test_an_instruction_names_the_job_and_ends_with_its_round(said: Said) -> None:
    server = server_of(said)
    grid = honest(server)
    run(server, grid)
    for client, node in enumerate(NODES.values()):
        (message,) = grid.asked(node, "train")
        assert read_instruction(message.content).job == server.nodes.job([client]) != ""
        assert message.metadata.ttl == 60.0
    assert replies_of(server).used == {0, 1, 2}


def test_an_error_of_a_node_ends_the_wait_for_it_at_once(said: Said, clock: Callable[[], float]) -> None:
    """The planted bug: Flower's own errors come from the SuperLink, so that the client's number is not found."""
    server = server_of(said)
    grid = honest(server, south=failing)
    grid.superlink_fails.add(12)
    run(server, grid)
    assert clock() < 10.0
    assert replies_of(server).refused == {1: "its node failed: out of memory"}
    assert replies_of(server).used == {0, 2}


def test_a_join_that_flower_cannot_deliver_is_named(said: Said) -> None:
    grid = grid_of(east=site(answer=lambda _: RuntimeError("Node Unavailable")))
    grid.superlink_fails.add(13)
    with pytest.raises(FederationError, match="site east: its node failed: Node Unavailable"):
        sites_of(said, wait=0.1).assign(grid, ALL, 1)


def test_a_round_closes_on_its_quorum_after_the_grace_time(said: Said, clock: Callable[[], float]) -> None:
    server = server_of(said, needed=2, min_replies=2, grace=0.2)
    grid = honest(server, east=silent)
    run(server, grid)
    assert 0.2 <= clock() < 10.0
    assert replies_of(server).used == {0, 1}
    assert replies_of(server).refused == {2: "no reply arrived in time"}


def training(grid: PostGrid, name: str, then: Callable[[str], Any]) -> None:
    """Have something happen when a site is asked to train, given the round."""
    node, own = NODES[name], grid.nodes[NODES[name]]

    def wrapped(message: Message) -> Any:
        if message.metadata.message_type.startswith("train"):
            then(message.metadata.group_id)
        return own(message)

    grid.nodes[node] = wrapped


def test_a_reply_within_the_grace_time_is_used(said: Said, clock: Callable[[], float]) -> None:
    """And the round closes with it, not with the end of the grace time."""
    server = server_of(said, min_replies=2, grace=30.0)
    grid = honest(server)

    def later(_: str) -> None:
        grid.held.add(13)
        threading.Timer(0.2, grid.held.clear).start()

    training(grid, "east", later)
    run(server, grid)
    assert clock() < 10.0
    assert replies_of(server).used == {0, 1, 2}


def test_a_round_without_its_quorum_stops_and_names_who_failed(said: Said) -> None:
    server = server_of(said, needed=2, min_replies=2, grace=0.0)
    with pytest.raises(
        FederationError,
        match=r"round 1: 2 of 3 clients failed, fewer than federation.min-replies = 2 are left.*client 1: its node "
        r"failed: out of memory; client 2: no reply arrived in time",
    ):
        run(server, honest(server, south=failing, east=silent), timeout=0.3)


def test_a_late_reply_is_dropped_named_and_does_no_harm(said: Said, caplog: pytest.LogCaptureFixture) -> None:
    """East answers round 1 when round 2 has begun: neither round holds it, and round 2 has its own answer."""
    server = server_of(said, min_replies=2, grace=0.05)
    grid = honest(server)
    training(grid, "east", lambda number: grid.held.add(13) if number == "1" else grid.held.discard(13))

    def slowly(number: str) -> None:
        if number == "2":  # which goes on for a while
            grid.held.add(12)
            threading.Timer(0.3, grid.held.discard, (12,)).start()

    training(grid, "south", slowly)
    assert used_by_round(server, grid, 2) == [{0, 1}, {0, 2}]
    assert "a reply of site east to round 1 came late, and is dropped" in caplog.text


def used_by_round(server: FlowerStrategy, grid: PostGrid, rounds: int) -> list[set[int]]:
    used: list[set[int]] = []

    def note(number: int, _: Any) -> None:
        if number:
            used.append(replies_of(server).used)

    server.start(grid, server.arrays, num_rounds=rounds, timeout=60.0, on_round=note)
    return used


def test_late_replies_are_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    """Errors are none; a second reply to the same message is not another one."""
    grid = grid_of(north=site(lambda _: _reply()), south=site(failing), east=site(lambda _: _reply()))
    grid.held.update((12, 13))
    grid.twice.add(13)
    mail = Mail(grid, 0.05, deployed=True)
    assert [one.metadata.src_node_id for one in mail.exchange(_questions(grid, 1))] == [11]
    grid.held.clear()
    grid.nodes[11] = site(silent)
    grid.nodes[12] = grid.nodes[13] = site(lambda _: _reply())
    grid.twice.clear()
    assert sorted(one.metadata.src_node_id for one in mail.exchange(_questions(grid, 2))) == [12, 13]
    assert mail.late == 1
    assert caplog.text.count("came late") == 1
    list(mail.exchange(_questions(grid, 3)))
    assert mail.late == 1


def test_a_second_late_reply_of_a_node_stops_nothing() -> None:
    grid = grid_of(east=site(lambda _: _reply()))
    mail = Mail(grid, 0.05, deployed=True)
    grid.held.add(13)
    assert not list(mail.exchange(_questions(grid, 1)))
    grid.held.clear()
    grid.twice.add(13)
    grid.nodes[13] = site(silent)
    assert not list(mail.exchange(_questions(grid, 2)))
    assert mail.late == 2


def _reply() -> RecordDict:
    return Reply([ClientReport(0)]).to_content()


def _questions(grid: PostGrid, number: int) -> Iterator[Message]:
    for node in grid.get_node_ids():
        yield Message(RecordDict(), dst_node_id=node, message_type=MessageType.TRAIN, group_id=str(number))


@pytest.mark.parametrize("deployed", [True, False])
def test_replies_are_fetched_one_by_one(deployed: bool) -> None:
    """The planted bug: all replies of a round in memory at once, of a gigabyte each."""
    pulls: list[int] = []

    class Counting(PostGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            found = list(super().pull_messages(message_ids))
            pulls.append(len(found))
            return found

    grid = Counting({node: site(lambda _: _reply()) for node in NODES.values()})
    mail = Mail(grid, 5.0, deployed=deployed)
    assert len(list(mail.exchange(_questions(grid, 1)))) == 3
    assert pulls == [1, 1, 1]


# -- what a site may claim --------------------------------------------------------------------------------


def test_declared_rows_bound_what_a_site_may_claim(said: Said) -> None:
    """East claims a million times what it declared: its update is refused, and the mean is that of the others."""
    server, reference = server_of(said), server_of(said)
    calm = run(reference, honest(reference, east=failing))

    def claims(message: Message) -> Any:
        content = node_of(server)(message)
        assert isinstance(content, RecordDict)
        head = content["reply"]
        assert isinstance(head, ConfigRecord)
        claimed = examples_of(2) * 10**6
        numbers: Any = head["numbers"], head["values"]
        head["examples"] = [claimed]
        head["values"] = [claimed if name == "weight" else value for name, value in zip(*numbers, strict=True)]
        return content

    ended = run(server, honest(server, east=claims))
    assert replies_of(server).refused == {2: "it claims 24000000 rows, and declared 100 when it joined"}
    assert all(np.array_equal(value, calm[name]) for name, value in ended.items())


def test_a_claim_of_one_row_more_is_refused_and_of_all_rows_taken(said: Said) -> None:
    for rows, refused in ((examples_of(2) - 1, {2}), (examples_of(2), set())):
        server = server_of(said)
        grid = honest(server)
        grid.nodes[13] = site(node_of(server), rows=rows)
        run(server, grid)
        assert set(replies_of(server).refused) == refused


def test_an_update_that_is_scaled_is_refused(said: Said) -> None:
    """By 1e6: refused with its norm. The bound is on the change, and honest updates pass it."""
    server = server_of(said, max_change=100.0)
    scaled = node_of(server, lambda _, update: {name: value * 1e6 for name, value in update.items()})
    reference = server_of(said)
    calm = run(reference, honest(reference, south=failing))
    ended = run(server, honest(server, south=scaled))
    assert list(replies_of(server).refused) == [1]
    assert re.fullmatch(
        r"it changes the tensors by \d\.\d+e\+0[67] in L2 norm, more than federation.max-change = 100",
        replies_of(server).refused[1],
    )
    assert all(np.array_equal(value, calm[name]) for name, value in ended.items())


@pytest.mark.parametrize(("most", "refused"), [(0.999, True), (1.001, False)])
def test_the_change_is_measured_from_what_was_sent(most: float, refused: bool, said: Said) -> None:
    """Large tensors that hardly change pass; the norm is over all tensors together."""
    plain = plain_server_of(FFALora, clients=3)
    start = {name: value + 1e4 for name, value in plain.state.tensors.items()}
    server = server_of(said, max_change=most)
    server.state = replace(plain.state, tensors=start)
    names = list(plain.strategy.expected(1))
    step = {name: np.zeros_like(start[name]) for name in names}
    step[names[0]].flat[0], step[names[-1]].flat[0] = 0.6, -0.8  # a norm of 1
    moved = node_of(server, lambda _, __: {name: start[name] + step[name] for name in names})
    same = node_of(server, same=start)
    run(server, grid_of(north=site(moved), south=site(same), east=site(same)))
    assert (0 in replies_of(server).refused) == refused


def test_a_site_whose_daemon_has_forgotten_the_run_joins_anew(said: Said) -> None:
    """The planted bug: a site that is asked again only after the time that it has to answer, an hour later."""
    server = server_of(said, needed=2)
    forgotten = [True]

    def east(message: Message) -> Any:
        if forgotten:
            forgotten.clear()
            return Reply([ClientReport.failed(2, "it has not joined this run", Outcome.NOT_JOINED)]).to_content()
        return node_of(server)(message)

    grid = honest(server, east=east)
    used = used_by_round(server, grid, 3)
    assert used[0] == {0, 1}
    assert used[-1] == {0, 1, 2}
    assert said.has("site east has to join anew: it has not joined this run")
    assert len(grid.asked(13)) == 2
