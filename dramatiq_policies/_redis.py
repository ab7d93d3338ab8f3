"""Round trips to Redis that threads share.

The thread that owns the connection sends the commands of all waiting threads in one write, as databases do with commits (Gray
and Reuter, *Transaction Processing*, 1993, "group commit"). No extra thread runs, and a single thread waits no longer than
without batching. After a lost connection the commands are sent once more, so each command must be safe to repeat.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from hashlib import sha1
from threading import Lock
from typing import Any

import redis
from redis.client import NEVER_DECODE
from redis.exceptions import NoScriptError

from .common.connections import close_when_interrupted, is_demoted, reconnect
from .common.forks import after_fork

__all__ = ["RAW", "CommandBatcher", "DeferredCommand", "Script", "scan"]

#: Of hiredis, if installed. The wrapper in redis-py doubles the cost.
_pack: Callable[[tuple[Any, ...]], bytes] | None = None
with suppress(ImportError, AttributeError):
    import hiredis

    _pack = hiredis.pack_command

#: For `execute_command`: return bytes, even from a client with ``decode_responses``.
RAW: dict[str, Any] = {NEVER_DECODE: []}
_UNANSWERED = redis.ConnectionError("the call was interrupted before Redis replied")


#: Connections of the parent processes.
_of_parents: list[Any] = []
#: The text of each script, by its digest.
_texts: dict[str, str] = {}


class Script:
    """A Lua script, called by its digest. The first call on a server loads the script."""

    def __init__(self, text: str) -> None:
        self.digest = sha1(text.encode(), usedforsecurity=False).hexdigest()
        _texts[self.digest] = text

    def command(self, keys: Sequence[Any], args: Sequence[Any]) -> tuple[Any, ...]:
        return ("EVALSHA", self.digest, len(keys), *keys, *args)

    def call(self, client: Any, keys: Sequence[Any], args: Sequence[Any]) -> Any:
        """Run the script on a connection of the client's pool."""
        command = self.command(keys, args)
        try:
            return client.execute_command(*command, **RAW)
        except NoScriptError:
            return client.execute_command(*Script.in_full(command), **RAW)

    @staticmethod
    def in_full(command: Sequence[Any]) -> tuple[Any, ...]:
        """Return the same call with the text in place of the digest. Redis then loads the script."""
        return ("EVAL", _texts[command[1]], *command[2:])


def scan(client: Any, begin: str, end: str = "") -> Iterator[Any]:
    """Yield the keys that begin and end with these texts, in batches that Redis searches without a long stop."""
    keys: Iterator[Any] = client.scan_iter(match=re.sub(r"([*?\[\]\\])", r"\\\1", begin) + f"*{end}", count=5_000)
    return keys


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
    """A fire-and-forget command, sent before the next blocking command.

    Parameters:
      callback: Called once with the reply or the error, by the thread that sent the command.
    """

    __slots__ = ("callback",)

    def __init__(self, command: Sequence[Any], callback: Callable[[Any], object]) -> None:
        super().__init__(command)
        self.callback = callback

    @property
    def is_answered(self) -> bool:
        return self.answer is not _UNANSWERED


#: Errors of the command itself. No other connection would help.
_ITS_OWN = (redis.ResponseError, redis.DataError, UnicodeError, TypeError)


def _packed(connection: Any, calls: list[_Call]) -> tuple[list[_Call], list[bytes]]:
    """Return the encodable calls, and their bytes. Each other call gets the encoding error as its reply."""
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
    """The calls of a thread. The thread sleeps until another thread has sent the calls, or until its turn to send."""

    __slots__ = ("calls", "posts", "sends", "woken")

    def __init__(self, commands: Sequence[Sequence[Any]]) -> None:
        self.posts: list[DeferredCommand] = []
        self.calls = [_Call(command) for command in commands]
        #: The batches to send by this thread, this batch included.
        self.sends: list[_Batch] = []
        self.woken = Lock()
        self.woken.acquire()


class CommandBatcher:
    """Sends commands of many threads to Redis over a shared connection. A cluster client uses its own connections.

    The connection has the settings of the client's pool but does not come from the pool: the pool may be exhausted. Replies are
    bytes, numbers, lists and None, even if the client decodes replies.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        close_when_interrupted(getattr(client, "connection_pool", None))
        self._connection: Any = None
        self._lock = Lock()
        self._waiting: list[_Batch] = []
        self._sender: _Batch | None = None
        #: Deferred commands that no batch has sent yet.
        self.posted: list[DeferredCommand] = []
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Forget the waiting threads and the connection, which belong to the parent."""
        # Kept alive: closing takes a lock, possibly held at the fork.
        _of_parents.append(self._connection)
        self._connection = None
        self._lock, self._waiting, self._sender, self.posted = Lock(), [], None, []

    def post(self, post: DeferredCommand) -> None:
        """Queue a command for the next `execute` with ``carries``. The caller must make such a call."""
        with self._lock:
            self.posted.append(post)

    def call(self, *command: Any, carries: bool = False) -> Any:
        """Send a command and return the reply.

        Raises:
          redis.RedisError, OSError: As the client.
        """
        return self._ask([command], carries=carries)[0].result()

    def execute(self, commands: Sequence[Sequence[Any]], *, carries: bool = False) -> list[Any]:
        """Send many commands in one round trip. With ``carries``, send the deferred commands first.

        On return, all commands deferred before this call have replies, even if another thread has sent them.
        """
        return [call.result() for call in self._ask(commands, carries=carries)]

    def _ask(self, commands: Sequence[Sequence[Any]], *, carries: bool) -> list[_Call]:
        batch = _Batch(commands)
        try:
            with self._lock:
                if carries and self.posted:
                    # Enter the line before later callers, so that no later command is answered first.
                    batch.posts, self.posted = self.posted, []
                if self._sender is None:
                    self._sender = batch
                else:
                    self._waiting.append(batch)
            if self._sender is not batch:
                batch.woken.acquire()
            if self._sender is batch:
                with self._lock:
                    batch.sends, self._waiting = [batch, *self._waiting], []
                self._send([call for one in batch.sends for call in (*one.posts, *one.calls)])
        finally:
            self._finish_batch(batch)
            for post in batch.posts:
                post.callback(post.answer)
        return batch.calls

    def answers(self, commands: Sequence[Sequence[Any]], *, carries: bool = False) -> list[Any]:
        """Like `execute`, but return the error of a refused command as its reply.

        Raises:
          redis.RedisError, OSError: The first error, if all commands were refused.
        """
        calls = self._ask(commands, carries=carries)
        if calls and all(_error_in(call) is not None for call in calls):
            calls[0].result()
        return [call.answer for call in calls]

    def call_alone(self, *command: Any) -> Any:
        """Send a command on a connection of the pool. Use this in interruptible code.

        An interrupt during a shared round trip would fail the commands of all other threads too.
        """
        try:
            return self.client.execute_command(*command, **RAW)
        except NoScriptError:
            return self.client.execute_command(*Script.in_full(command), **RAW)

    def _finish_batch(self, batch: _Batch) -> None:
        """Wake the threads with replies, and a waiting thread, to send the next batch."""
        with self._lock:
            if self._sender is batch:
                self._sender = next_sender = self._waiting.pop(0) if self._waiting else None
                if next_sender is not None:
                    next_sender.woken.release()
            elif batch in self._waiting:
                self._waiting.remove(batch)  # Interrupted.
        for one in batch.sends:
            if one is not batch:
                one.woken.release()

    def _send(self, calls: list[_Call]) -> None:
        try:
            self._exchange(calls)
            if refused := [call for call in calls if isinstance(call.answer, Exception)]:
                self._repeat(refused)
        except Exception as error:
            for call in calls:
                if _error_in(call) is not None:  # Not answered, or not repeated.
                    call.answer = error

    def _repeat(self, refused: list[_Call]) -> None:
        """Repeat the calls that may succeed now."""
        if demoted := [call for call in refused if is_demoted(_error_in(call))]:
            self._exchange(demoted)
        for call in refused:
            if isinstance(call.answer, NoScriptError):
                # The server was restarted or flushed, or a failover made a new master.
                call.command = Script.in_full(call.command)
                self._exchange([call])

    def _exchange(self, calls: list[_Call]) -> None:
        if isinstance(self.client, redis.Redis):
            try:
                self._send_and_read(calls)
            except (redis.ConnectionError, redis.TimeoutError, OSError):
                # An idle connection is often closed by the server.
                self._send_and_read(calls)
            return
        for call in calls:  # A cluster client: keys are on several servers.
            try:
                call.answer = self.client.execute_command(*call.command, **RAW)
            except _ITS_OWN as error:
                call.answer = error

    def _send_and_read(self, calls: list[_Call]) -> None:
        pool = self.client.connection_pool
        if self._connection is None:
            self._connection = pool.connection_class(**pool.connection_kwargs)
        connection = self._connection
        calls, packed = _packed(connection, calls)
        if not calls:
            return
        demoted = False
        try:
            if not getattr(connection, "is_connected", False):
                # A no-op while connected, but not a cheap one. A Sentinel connection looks up the master only here.
                connection.connect()
            # A pipeline of redis-py would cost several times the commands themselves.
            connection.send_packed_command(packed)
            for call in calls:
                try:
                    call.answer = connection.read_response(disable_decoding=True)
                except redis.ResponseError as error:
                    call.answer = error
                    demoted = demoted or is_demoted(error)
            if demoted:
                # The name may resolve to a new master by now.
                connection.disconnect()
                reconnect(pool)
        except BaseException:
            # The next bytes on this connection would answer an older command.
            connection.disconnect()
            raise
