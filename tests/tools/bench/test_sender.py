"""Sender: how many requests are in flight, when they begin, and what a conversation sends."""

from __future__ import annotations

from pathlib import Path

from tests.tools.bench.fake_server import refusal, serving
from tools.bench.load import Load
from tools.bench.sender import send

TOKENIZER = str(Path(__file__).parents[3] / "models/builtin/tiny-chat/tokenizer.json")


def test_a_closed_loop_keeps_its_requests_in_flight() -> None:
    with serving(pause_s=0.005) as fake:
        sent = send(Load(fake.url, "m", 32, 8, 4, 3, output_spread=0.5))
        assert fake.most_in_flight == 8
        assert fake.connections == 8
        assert len(fake.bodies) == 32
    assert sorted(answer.index for answer in sent.answers) == list(range(32))
    assert not any(answer.error for answer in sent.answers)
    # By the client's own clock: each request begins at an ending, and between them the house is full.
    begins = sorted(answer.began_s for answer in sent.answers)
    ends = sorted(answer.ended_s for answer in sent.answers)
    assert all(began >= ended for began, ended in zip(begins[8:], ends, strict=False))
    busy = sum(min(a.ended_s, ends[-9]) - min(a.began_s, ends[-9]) for a in sent.answers)
    assert 7.0 < busy / (ends[-9] - begins[0]) <= 8.0
    assert len(sent.client_shares) == 1


def test_several_clients_share_requests_and_concurrency() -> None:
    with serving(pause_s=0.005) as fake:
        load = Load(fake.url, "m", 20, 5, 4, 3, clients=2)
        sent = send(load)
        assert fake.most_in_flight == 5
        assert sorted(body["prompt"] for body in fake.bodies) == sorted(load.prompt(index) for index in range(20))
    assert sorted(answer.index for answer in sent.answers) == list(range(20))
    assert len(sent.client_shares) == 2


def test_a_fixed_rate_does_not_wait_for_answers() -> None:
    with serving(pause_s=0.1) as fake:
        load = Load(fake.url, "m", 40, 1, 4, 3, rate=200.0)
        sent = send(load)
        assert fake.most_in_flight > 20  # each takes 0.6 s, all arrive within some 0.2 s
    begins = sorted(answer.began_s for answer in sent.answers)
    assert len(set(begins)) == 40
    assert not any(answer.error for answer in sent.answers)


def test_a_conversation_sends_its_answers_back() -> None:
    with serving() as fake:
        sent = send(Load(fake.url, "m", 6, 1, 8, 2, chat=True, tokenizer=TOKENIZER, turns=3))
        lengths = [len(body["messages"]) for body in fake.bodies]
        assert lengths == [1, 3, 5, 1, 3, 5]
        last = fake.bodies[2]["messages"]
        assert [message["role"] for message in last] == ["user", "assistant", "user", "assistant", "user"]
        assert last[:3] == fake.bodies[1]["messages"]
        assert last[1]["content"].startswith('w0 "usage"')
        assert last[0] != last[2]
    assert [answer.index for answer in sent.answers] == list(range(6))


def test_a_failed_turn_ends_its_conversation_only() -> None:
    with serving(fail=lambda body: refusal(500, "worker_failed") if len(body["messages"]) == 3 else None) as fake:
        sent = send(Load(fake.url, "m", 6, 1, 8, 2, chat=True, tokenizer=TOKENIZER, turns=3))
    assert [(answer.index, answer.error) for answer in sent.answers] == [
        (0, ""),
        (1, "worker_failed"),
        (3, ""),
        (4, "worker_failed"),
    ]
