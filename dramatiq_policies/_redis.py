"""Round trips to Redis that threads share.

Whoever gets hold of the connection sends what all are waiting for, in one write, as databases do with commits (Gray and
Reuter, *Transaction Processing*, 1993, "group commit"). No thread is added, and one thread alone waits no longer than it
would. A call whose connection is lost is sent once more, so it must not matter if it was carried out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha1
from threading import Lock
from typing import Any

import redis
from redis.client import NEVER_DECODE
from redis.exceptions import NoScriptError

from .common.connections import close_when_interrupted, is_demoted, reconnect
from .common.forks import after_fork

__all__ = ["RAW", "CommandBatcher", "DeferredCommand", "Script"]

#: hiredis' own, where that is installed: redis-py's around it costs as much again.
_pack: Callable[[tuple[Any, ...]], bytes] | None = None
with suppress(ImportError, AttributeError):
    import hiredis

    _pack = hiredis.pack_command

#: For `execute_command`: the answer is bytes, whatever the client is set to decode.
RAW: dict[str, Any] = {NEVER_DECODE: []}
_UNANSWERED = redis.ConnectionError("the call was interrupted before it was answered")


#: Connections of the processes that this one was forked from.
_of_parents: list[Any] = []
#: The text of each script, by its digest.
_texts: dict[str, str] = {}


class Script:
    """A Lua script, called by its digest and loaded where it is not known."""

    def __init__(self, text: str) -> None:
        self.digest = sha1(text.encode(), usedforsecurity=False).hexdigest()
        _texts[self.digest] = text

    def command(self, keys: Sequence[Any], args: Sequence[Any]) -> tuple[Any, ...]:
        return ("EVALSHA", self.digest, len(keys), *keys, *args)

    def call(self, client: Any, keys: Sequence[Any], args: Sequence[Any]) -> Any:
        """The answer, on a connection of the client's pool."""
        command = self.command(keys, args)
        try:
            return client.execute_command(*command, **RAW)
        except NoScriptError:
            return client.execute_command(*Script.in_full(command), **RAW)

    @staticmethod
    def in_full(command: Sequence[Any]) -> tuple[Any, ...]:
        """The same call with the text in place of its digest, which loads it."""
        return ("EVAL", _texts[command[1]], *command[2:])


class _Call:
    __slots__ = ("answer", "command")

    def __init__(self, command: Sequence[Any]) -> None:
        self.command = command
        self.answer: Any = _UNANSWERED

    def result(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def _error_in(call: _Call) -> Exception | None:
    return call.answer if isinstance(call.answer, Exception) else None


class DeferredCommand(_Call):
    """A call that nobody waits for: it goes ahead of one that somebody waits for, who tells of its answer.

    Parameters:
      callback: Called once with the answer, or the error, by the thread that sent it.
    """

    __slots__ = ("callback",)

    def __init__(self, command: Sequence[Any], callback: Callable[[Any], object]) -> None:
        super().__init__(command)
        self.callback = callback

    @property
    def is_answered(self) -> bool:
        return self.answer is not _UNANSWERED


#: The errors that say that a call can't be made as it is, whatever the connection.
_ITS_OWN = (redis.ResponseError, redis.DataError, UnicodeError, TypeError)


def _packed(connection: Any, calls: list[_Call]) -> tuple[list[_Call], list[bytes]]:
    """The calls that can be sent, and what is sent for them all; each of the others has its error for an answer."""
    pack = _pack or (lambda command: b"".join(connection.pack_command(*command)))
    try:
        return calls, [b"".join([pack(tuple(call.command)) for call in calls])]
    except _ITS_OWN:
        pass
    sent, parts = [], []
    for call in calls:
        try:
            parts.append(pack(tuple(call.command)))
        except _ITS_OWN as error:
            call.answer = error
        else:
            sent.append(call)
    return sent, [b"".join(parts)]


class _Batch:
    """One thread's calls; it sleeps until they are answered, or it is to send them and those that have come meanwhile."""

    __slots__ = ("calls", "posts", "sends", "woken")

    def __init__(self, commands: Sequence[Sequence[Any]]) -> None:
        self.posts: list[DeferredCommand] = []
        self.calls = [_Call(command) for command in commands]
        #: The turns that this one sends, itself included.
        self.sends: list[_Batch] = []
        self.woken = Lock()
        self.woken.acquire()


class CommandBatcher:
    """Calls a server on one connection, made as those of a client's pool are; of a cluster's client, on its connections.

    The connection is none of the pool's, which may have no other to give. Answers are bytes, numbers, lists of them and
    None, whatever the client is set to decode.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        close_when_interrupted(getattr(client, "connection_pool", None))
        self._connection: Any = None
        self._lock = Lock()
        self._waiting: list[_Batch] = []
        self._sender: _Batch | None = None
        #: Posts that no turn has taken along yet.
        self.posted: list[DeferredCommand] = []
        after_fork(self)

    def reset_after_fork(self) -> None:
        """In a new process no other thread waits, whatever the locks say, and the connection is the parent's."""
        # Kept, since giving it back to its pool takes that pool's lock.
        _of_parents.append(self._connection)
        self._connection = None
        self._lock, self._waiting, self._sender, self.posted = Lock(), [], None, []

    def post(self, post: DeferredCommand) -> None:
        """Leave a call for the next `execute` with ``carries``, which the caller sees to."""
        with self._lock:
            self.posted.append(post)

    def call(self, *command: Any, carries: bool = False) -> Any:
        """The answer to one command.

        Raises:
          redis.RedisError, OSError: As the client.
        """
        return self.execute([command], carries=carries)[0]

    def execute(self, commands: Sequence[Sequence[Any]], *, carries: bool = False) -> list[Any]:
        """The answers to many commands in one round trip; with ``carries`` what was posted goes ahead of them.

        All that was posted before is answered then, also what another thread has taken along.
        """
        return [call.result() for call in self._ask(commands, carries=carries)]

    def _ask(self, commands: Sequence[Sequence[Any]], *, carries: bool) -> list[_Call]:
        turn = _Batch(commands)
        try:
            with self._lock:
                if carries and self.posted:
                    # In line before anybody who asks later, so that none of them is answered before it.
                    turn.posts, self.posted = self.posted, []
                if self._sender is None:
                    self._sender = turn
                else:
                    self._waiting.append(turn)
            if self._sender is not turn:
                turn.woken.acquire()
            if self._sender is turn:
                with self._lock:
                    turn.sends, self._waiting = [turn, *self._waiting], []
                self._send([call for one in turn.sends for call in (*one.posts, *one.calls)])
        finally:
            self._leave(turn)
            for post in turn.posts:
                post.callback(post.answer)
        return turn.calls

    def answers(self, commands: Sequence[Sequence[Any]], *, carries: bool = False) -> list[Any]:
        """As `execute`, but a command that was refused has its error among the answers.

        Raises:
          redis.RedisError, OSError: The first one's, where all were refused.
        """
        found = self._ask(commands, carries=carries)
        if found and all(_error_in(call) is not None for call in found):
            found[0].result()
        return [call.answer for call in found]

    def alone(self, *command: Any) -> Any:
        """The answer to one command, on a connection of the pool's: for code that may be interrupted.

        An interrupt of whoever sends over the shared connection would reach all whose calls are on their way.
        """
        try:
            return self.client.execute_command(*command, **RAW)
        except NoScriptError:
            return self.client.execute_command(*Script.in_full(command), **RAW)

    def _leave(self, turn: _Batch) -> None:
        """Wake those who were answered, and one of those who came since, to send."""
        with self._lock:
            if self._sender is turn:
                self._sender = following = self._waiting.pop(0) if self._waiting else None
                if following is not None:
                    following.woken.release()
            elif turn in self._waiting:
                self._waiting.remove(turn)  # Interrupted.
        for one in turn.sends:
            if one is not turn:
                one.woken.release()

    def _send(self, calls: list[_Call]) -> None:
        try:
            self._exchange(calls)
            if refused := [call for call in calls if is_demoted(_error_in(call))]:
                self._exchange(refused)
            for call in calls:
                if isinstance(call.answer, NoScriptError):
                    # The server was restarted or flushed, or another is the master now.
                    call.command = Script.in_full(call.command)
                    self._exchange([call])
        except Exception as error:
            for call in calls:
                if _error_in(call) is not None:  # Not answered, or to be asked once more.
                    call.answer = error

    def _exchange(self, calls: list[_Call]) -> None:
        if isinstance(self.client, redis.Redis):
            try:
                self._converse(calls)
            except (redis.ConnectionError, redis.TimeoutError, OSError):
                # One that has idled is often gone.
                self._converse(calls)
            return
        for call in calls:  # A cluster's: each key has a server of its own.
            try:
                call.answer = self.client.execute_command(*call.command, **RAW)
            except _ITS_OWN as error:
                call.answer = error

    def _converse(self, calls: list[_Call]) -> None:
        pool = self.client.connection_pool
        if self._connection is None:
            self._connection = pool.connection_class(**pool.connection_kwargs)
        connection = self._connection
        calls, packed = _packed(connection, calls)
        if not calls:
            return
        demoted = False
        try:
            # If it is not: a Sentinel's asks who the master is here, and nowhere else.
            connection.connect()
            # A pipeline of the client's costs several times as much as what it sends.
            connection.send_packed_command(packed)
            for call in calls:
                try:
                    call.answer = connection.read_response(disable_decoding=True)
                except redis.ResponseError as error:
                    call.answer = error
                    demoted = demoted or is_demoted(error)
            if demoted:
                # The name of the server may lead to another by now.
                connection.disconnect()
                reconnect(pool)
        except BaseException:
            # Whatever comes over it now is the answer to something else.
            connection.disconnect()
            raise
