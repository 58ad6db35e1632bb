"""FairQueue: tenants, priorities and users in order; everything that goes in comes out once."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from core.fair_queue import FairQueue, Place


def take(queue: FairQueue[int], cost: float = 10) -> int:
    item = queue.first()
    assert item is not None
    queue.remove(item, cost)
    return item


def test_one_user_is_served_first_come_first_served() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(20):
        queue.push(number, Place("", "", 0, 5))
    assert (len(queue), queue.tokens, queue.num_tenants) == (20, 100, 1)
    assert [take(queue) for _ in range(20)] == list(range(20))
    assert (queue.first(), len(queue), queue.tokens, queue.num_tenants) == (None, 0, 0, 0)


def test_priority_orders_a_tenants_own_requests() -> None:
    queue: FairQueue[int] = FairQueue()
    for number, priority in enumerate([3, 0, -7, 3, 0]):
        queue.push(number, Place("a", "", priority, 1))
    assert [take(queue) for _ in range(5)] == [2, 1, 4, 0, 3]


def test_priority_takes_nothing_from_other_tenants() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(100):
        queue.push(number, Place("loud", "", -1000, 1))
        queue.push(1000 + number, Place("plain", "", 1000, 1))
    taken = [take(queue) for _ in range(40)]
    assert 19 <= sum(item >= 1000 for item in taken) <= 21


def test_a_tenant_with_ten_thousand_waiting_delays_another_by_nothing() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(10_000):
        queue.push(number, Place("noisy", f"u{number % 7}", 0, 100))
    for _ in range(50):
        take(queue, 800)
    queue.push(-1, Place("quiet", "", 0, 100))
    assert take(queue, 800) == -1


def test_users_share_what_their_tenant_has() -> None:
    """Tenant a has three users, b one: b's has half of the tokens, each of a's a sixth."""
    queue: FairQueue[int] = FairQueue()
    owner: dict[int, tuple[str, str]] = {}
    number = 0
    for tenant, user, count in (("a", "x", 500), ("a", "y", 500), ("a", "z", 500), ("b", "x", 500)):
        for _ in range(count):
            queue.push(number, Place(tenant, user, 0, 1))
            owner[number] = (tenant, user)
            number += 1
    served = Counter(owner[take(queue)] for _ in range(600))
    assert abs(served["b", "x"] - 300) <= 2
    assert all(abs(served["a", user] - 100) <= 2 for user in "xyz")


def test_shares_are_of_tokens_not_of_requests() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(3000):
        queue.push(number, Place("short", "", 0, 1))
        queue.push(10_000 + number, Place("long", "", 0, 1))
    tokens: Counter[str] = Counter()
    for _ in range(2000):
        item = queue.first()
        assert item is not None
        name, cost = ("long", 1000) if item >= 10_000 else ("short", 50)
        queue.remove(item, cost)
        tokens[name] += cost
    assert abs(tokens["long"] - tokens["short"]) <= 2000


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9))
def test_any_order_of_events_against_a_plain_model(seed: int) -> None:
    """Whatever is pushed, taken, aborted and settled: each item leaves once, counts agree, order in a lane holds."""
    rng = random.Random(seed)
    queue: FairQueue[int] = FairQueue()
    places: dict[int, Place] = {}
    number = 0
    for _ in range(rng.randint(5, 300)):
        event = rng.random()
        if event < 0.5:
            place = Place(rng.choice("abc"), rng.choice(["", "u", "v"]), rng.randint(-1, 1), rng.randint(0, 99))
            queue.push(number, place)
            places[number] = place
            number += 1
        elif event < 0.6 and places:
            gone = rng.choice(list(places))
            queue.remove(gone)
            del places[gone]
        elif event < 0.65:
            queue.settle(Place(rng.choice("abcd"), "u", 0, 0), rng.randint(-100, 100))
        elif places:
            item = queue.first()
            assert item is not None
            mine = places[item]
            rivals = [n for n, p in places.items() if p.tenant == mine.tenant]
            assert mine.priority == min(places[n].priority for n in rivals)
            same = [n for n in rivals if (places[n].user, places[n].priority) == (mine.user, mine.priority)]
            assert item == min(same)
            queue.remove(item, rng.randint(1, 500))
            del places[item]
        assert len(queue) == len(places)
        assert queue.tokens == sum(place.tokens for place in places.values())
        assert queue.num_tenants == len({place.tenant for place in places.values()})
        assert all(item in queue for item in places)
    while places:
        del places[take(queue)]
    assert queue.first() is None


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9), st.integers(2, 8))
def test_shares_of_tenants_that_always_wait_are_even(seed: int, num_tenants: int) -> None:
    rng = random.Random(seed)
    queue: FairQueue[int] = FairQueue()
    sizes = [rng.randint(1, 2000) for _ in range(num_tenants)]
    owner: dict[int, int] = {}
    number = 0

    def push(tenant: int) -> None:
        nonlocal number
        queue.push(number, Place(f"t{tenant}", "", 0, 1))
        owner[number] = tenant
        number += 1

    for tenant in range(num_tenants):
        for _ in range(rng.randint(1, 50)):
            push(tenant)
    served: dict[int, int] = defaultdict(int)
    for _ in range(300):
        item = queue.first()
        assert item is not None
        tenant = owner[item]
        push(tenant)
        queue.remove(item, sizes[tenant])
        served[tenant] += sizes[tenant]
    # Whoever had few turns is still within two of its own from anybody else.
    assert max(served.values()) - min(served[tenant] for tenant in range(num_tenants)) <= 2 * max(sizes)


def test_who_gives_way_in_a_full_queue() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(10):
        queue.push(number, Place("noisy", "x" if number < 7 else "y", 0, 1))
    queue.push(100, Place("quiet", "", 0, 500))
    newcomer = Place("new", "", 0, 1)
    assert queue.surplus(newcomer) == 6  # the newest of the noisy tenant's noisier user
    assert queue.surplus(newcomer, 1) == 100
    assert queue.surplus(Place("noisy", "x", 0, 1)) is None  # its own share is full
    assert queue.surplus(Place("noisy", "y", 0, 1)) == 6
    assert queue.surplus(Place("noisy", "x", -1, 1)) == 6  # less urgent
    assert queue.surplus(Place("noisy", "x", 1, 1)) is None
    assert FairQueue[int]().surplus(newcomer) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 30))
def test_a_full_queue_is_divided_evenly(seed: int, capacity: int) -> None:
    """Tenants that ask for more than there is end up with places that differ by one at most."""
    rng = random.Random(seed)
    queue: FairQueue[int] = FairQueue()
    places: dict[int, Place] = {}
    weights = {name: rng.randint(1, 20) for name in "abc"}
    for number in range(600):
        place = Place(rng.choices(list(weights), list(weights.values()))[0], "", 0, 1)
        if len(queue) >= capacity:
            loser = queue.surplus(place)
            if loser is None:
                continue
            queue.remove(loser)
            del places[loser]
        queue.push(number, place)
        places[number] = place
        assert len(queue) <= capacity
    counts = Counter(place.tenant for place in places.values())
    assert max(counts.values()) - min(counts[name] for name in weights) <= 1
