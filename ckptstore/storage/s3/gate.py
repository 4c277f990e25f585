"""How many requests may be on their way at a time: what the server bears, found out by trying."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Gate:
    """Lets at most ``limit`` pass at a time: half of those on their way after a "slow down", slowly more while all
    goes well.

    Used in one event loop only. A signal handler may save in the midst of a save of its own thread: what that one has
    on its way ends in the loop, so that the handler gets its turn.

    Attributes:
        limit: from 1 to ``most``.
    """

    def __init__(self, most: int, is_too_much: Callable[[BaseException], bool]) -> None:
        self.limit = float(most)
        self._most, self._is_too_much = most, is_too_much
        self._inside = self._cuts = 0
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def is_wide(self) -> bool:
        """Whether the server bears all that can be sent. From any thread."""
        return self.limit >= self._most

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """Wait for a turn; an error that leaves the block may lower the limit."""
        await self._enter()
        cuts = self._cuts
        try:
            yield
        except Exception as error:
            # Of those that were sent under the same limit, only the first one's refusal tells something new.
            if self._is_too_much(error) and cuts == self._cuts:
                self.limit = max(1.0, min(self.limit, self._inside) / 2)
                self._cuts += 1
            raise
        else:
            # One more as soon as all that fit have come through.
            self.limit = min(self._most, self.limit + 1 / self.limit)
        finally:
            self._inside -= 1
            self._wake()

    async def _enter(self) -> None:
        while self._inside >= int(self.limit):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        self._inside += 1

    def _wake(self) -> None:
        # All of them, a few: each looks for itself, so that none waits for a turn that a cancelled one was given.
        waiting, self._waiting = self._waiting, []
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)
