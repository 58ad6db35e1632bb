"""FairQueue: what waits, in an order that gives tenants even shares of the tokens. Pure.

Three rules, in this order. Tenants (API keys) take turns. Of a tenant's requests those of the lowest priority number go
first: a key's priorities order its own requests, and take nothing from other keys. Among equals users take turns, and
a user's requests go first come, first served. Each operation costs O(log tenants + log priorities + log users).

Who is absent is forgotten (see Turns), so what is kept is bounded by what waits.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

from core.turns import Turns

T = TypeVar("T", bound=Hashable)


class Place(NamedTuple):
    """Where an item waits. `tokens`: how much of the queue's bound it takes."""

    tenant: str
    user: str
    priority: int
    tokens: int


class _Level(Generic[T]):
    """A tenant's items of one priority, by user."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.items: dict[str, OrderedDict[T, None]] = {}
        self._by_length: dict[int, dict[str, None]] = {}  # how many wait -> the users with so many
        self._most = 0

    def push(self, item: T, user: str) -> None:
        items = self.items.get(user)
        if items is None:
            items = self.items[user] = OrderedDict()
            self.turns.enter(user)
        items[item] = None
        self._moved(user, len(items) - 1, len(items))

    def first(self) -> T:
        return next(iter(self.items[self.turns.first()]))

    def remove(self, item: T, user: str, cost: float) -> None:
        items = self.items[user]
        del items[item]
        self._moved(user, len(items) + 1, len(items))
        if cost:
            self.turns.charge(user, cost)
        if not items:
            del self.items[user]
            self.turns.leave(user)

    def longest(self) -> OrderedDict[T, None]:
        """The items of the user with most of them."""
        return self.items[next(iter(self._by_length[self._most]))]

    def _moved(self, user: str, before: int, after: int) -> None:
        if before:
            del self._by_length[before][user]
            if not self._by_length[before]:
                del self._by_length[before]
        if after:
            self._by_length.setdefault(after, {})[user] = None
        # Lengths change by one, so the longest is found next door.
        if after > self._most or self._most not in self._by_length:
            self._most = after


class _Tenant(Generic[T]):
    """What waits of one tenant."""

    def __init__(self) -> None:
        self.count = 0
        self.tokens = 0
        self.levels: dict[int, _Level[T]] = {}
        self._priorities: list[int] = []  # heaps; a priority without a level is skipped when met
        self._least: list[int] = []

    def level(self, priority: int) -> _Level[T]:
        """The level of a priority, made where there is none."""
        level = self.levels.get(priority)
        if level is None:
            level = self.levels[priority] = _Level()
            if len(self._priorities) > 2 * len(self.levels) + 64:
                self._priorities, self._least = [], []
                for known in self.levels:
                    self._note(known)
            else:
                self._note(priority)
        return level

    def first(self) -> T:
        while self._priorities[0] not in self.levels:
            heapq.heappop(self._priorities)
        return self.levels[self._priorities[0]].first()

    def least_priority(self) -> int:
        """The highest number that waits."""
        while -self._least[0] not in self.levels:
            heapq.heappop(self._least)
        return -self._least[0]

    def _note(self, priority: int) -> None:
        heapq.heappush(self._priorities, priority)
        heapq.heappush(self._least, -priority)


class FairQueue(Generic[T]):
    """Items that wait. An item is in it at most once."""

    def __init__(self) -> None:
        self.tokens = 0  # of all that waits
        self._places: dict[T, Place] = {}
        self._turns = Turns()
        self._tenants: dict[str, _Tenant[T]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, item: T) -> bool:
        return item in self._places

    @property
    def num_tenants(self) -> int:
        """Tenants with something waiting."""
        return len(self._tenants)

    def push(self, item: T, place: Place) -> None:
        """Let an item wait, behind its equals."""
        self._places[item] = place
        self.tokens += place.tokens
        tenant = self._tenants.get(place.tenant)
        if tenant is None:
            tenant = self._tenants[place.tenant] = _Tenant()
            self._turns.enter(place.tenant)
        tenant.count += 1
        tenant.tokens += place.tokens
        tenant.level(place.priority).push(item, place.user)

    def first(self) -> T | None:
        """Whose turn it is; None when nothing waits."""
        return self._tenants[self._turns.first()].first() if self._places else None

    def remove(self, item: T, cost: float = 0.0) -> None:
        """Take an item out. `cost`: the tokens that its tenant and user are charged, 0 when it was not served."""
        place = self._places.pop(item)
        tenant = self._tenants[place.tenant]
        level = tenant.levels[place.priority]
        level.remove(item, place.user, cost)
        if not level.items:
            del tenant.levels[place.priority]
        self.tokens -= place.tokens
        tenant.count -= 1
        tenant.tokens -= place.tokens
        if cost:
            self._turns.charge(place.tenant, cost)
        if not tenant.count:
            del self._tenants[place.tenant]
            self._turns.leave(place.tenant)

    def settle(self, place: Place, tokens: float) -> None:
        """Correct an earlier charge by what was really used."""
        self._turns.settle(place.tenant, tokens)
        tenant = self._tenants.get(place.tenant)
        if tenant is not None and (level := tenant.levels.get(place.priority)) is not None:
            level.turns.settle(place.user, tokens)

    def surplus(self, newcomer: Place, excess_tokens: int = 0) -> T | None:
        """Who should give way to a newcomer in a full queue: the newest of whoever has more waiting than it would have.

        Looks for another tenant, then for less important requests of the same tenant, then for another of its users.
        None: the newcomer's own share is full. With `excess_tokens`, what the queue would have too many with it,
        tenants are compared by tokens, not by number, and only other tenants give way, if they can make room for all
        of it. Takes time with the number of tenants, and is asked only when the queue is full.
        """
        by_tokens = excess_tokens > 0
        own = self._tenants.get(newcomer.tenant)
        own_weight = 0 if own is None else own.tokens if by_tokens else own.count
        own_weight += newcomer.tokens if by_tokens else 1

        def weight(name: str) -> int:
            return self._tenants[name].tokens if by_tokens else self._tenants[name].count

        heaviest = max(self._tenants, key=weight, default=newcomer.tenant)
        if excess_tokens > sum(max(0, tenant.tokens - own_weight) for tenant in self._tenants.values()):
            return None
        if heaviest != newcomer.tenant and weight(heaviest) > own_weight:
            other = self._tenants[heaviest]
            return next(reversed(other.levels[other.least_priority()].longest()))
        if own is None or by_tokens:
            return None
        priority = own.least_priority()
        longest = own.levels[priority].longest()
        if priority > newcomer.priority:
            return next(reversed(longest))
        if priority == newcomer.priority:
            mine = own.levels[priority].items.get(newcomer.user, ())
            if len(longest) > len(mine) + 1:
                return next(reversed(longest))
        return None
