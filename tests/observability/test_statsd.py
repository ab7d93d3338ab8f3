"""Values reach a StatsD server in few datagrams, and nobody ever waits for one."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import statsd as statsd_package
from datadog.dogstatsd import DogStatsd

from dramatiq_policies import ConfigurationError
from dramatiq_policies.observability import _udp
from dramatiq_policies.observability.statsd import Statsd, metric_name, tag_list

from ..support import PlainClient, StatsdServer, TaggedClient


@pytest.fixture
def server(monkeypatch):
    server = StatsdServer()
    monkeypatch.setenv("STATSD_HOST", "127.0.0.1")
    monkeypatch.setenv("STATSD_PORT", str(server.port))
    yield server
    server.close()


VALUES = [("ms", "jobs.mail.duration", 12.5, ()), ("c", "jobs.mail.success", 1, ()), ("g", "queues.mail.ready", 3, ())]
LINES = ["jobs.mail.duration:12.5|ms", "jobs.mail.success:1|c", "queues.mail.ready:3|g"]


class TestOverUdp:
    def test_a_call_is_one_datagram(self, server):
        Statsd().send(VALUES)
        assert server.packet() == LINES
        assert server.has_no_more()

    def test_values_sent_at_about_the_same_time_share_a_datagram(self, server):
        statsd = Statsd()
        for _ in range(30):
            statsd.send(VALUES)
        packets = [server.packet(), server.packet()]
        assert server.has_no_more()
        assert packets[0] + packets[1] == LINES * 30
        assert len(packets[0]) % 3 == 0
        assert all(len("\n".join(lines)) <= 1_432 for lines in packets)

    def test_a_host_by_name_gets_the_metrics_sent_while_it_was_looked_up(self, server, monkeypatch):
        monkeypatch.setenv("STATSD_HOST", "localhost")
        statsd = Statsd()
        statsd.send(VALUES)
        statsd.flush()
        assert server.packet() == LINES

    def test_a_value_that_does_not_fit_goes_into_a_second_datagram(self, server):
        Statsd().send([("g", f"queues.{'x' * 60}_{number}.ready", number, ()) for number in range(40)])
        packets = [server.packet(), server.packet(), server.packet()]
        assert server.has_no_more()
        assert [line.rpartition(":")[2] for lines in packets for line in lines] == [f"{n}|g" for n in range(40)]
        assert all(len("\n".join(lines)) <= 1_432 for lines in packets)

    def test_a_server_that_is_not_there_is_logged_once_and_heard_when_it_comes(self, server, caplog):
        server.close()
        statsd = Statsd()
        for _ in range(5):
            statsd.send(VALUES)
            statsd.flush()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert f"127.0.0.1:{server.port}" in caplog.text
        back = StatsdServer(server.port)
        statsd.send(VALUES)
        assert back.packet() == LINES
        back.close()

    @pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 300, ".."])
    def test_a_host_that_does_not_exist_is_logged_once(self, host, server, monkeypatch, caplog):
        monkeypatch.setenv("STATSD_HOST", host)
        statsd = Statsd()
        for _ in range(5):
            statsd.send(VALUES)
            statsd.flush(10)
        assert len(caplog.records) == 1
        assert "are dropped" in caplog.text

    def test_an_address_that_a_socket_may_not_have_is_logged_once_and_leaves_no_socket_open(
        self, server, monkeypatch, caplog
    ):
        monkeypatch.setenv("STATSD_HOST", "255.255.255.255")
        statsd = Statsd()
        for _ in range(3):
            statsd.send(VALUES)
            statsd.flush(10)
        assert len(caplog.records) == 1
        assert statsd._client._sock is None

    def test_the_name_is_looked_up_again_after_a_while_and_the_socket_kept(self, server, monkeypatch):
        monkeypatch.setattr(_udp, "_RESOLVED_FOR", 0)
        statsd = Statsd()
        statsd.send(VALUES)
        statsd.flush(10)
        sock = statsd._client._sock
        moved = StatsdServer()
        statsd._client.port = moved.port
        statsd.send(VALUES)
        assert moved.packet() == LINES
        assert statsd._client._sock is sock
        moved.close()

    def test_a_slow_name_server_delays_no_job(self, server, monkeypatch):
        monkeypatch.setenv("STATSD_HOST", "statsd.example.com")
        answered = threading.Event()

        def slow(*args, **kwargs):
            answered.wait(20)
            return [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("127.0.0.1", server.port))]

        monkeypatch.setattr(socket, "getaddrinfo", slow)
        statsd = Statsd()
        started = time.monotonic()
        for _ in range(100):
            statsd.send(VALUES)
        assert time.monotonic() - started < 1
        answered.set()
        lines = []
        while len(lines) < 300:
            lines += server.packet()
        assert lines == LINES * 100

    def test_a_fork_sends_through_a_socket_of_its_own(self, server):
        statsd = Statsd()
        statsd.send(VALUES)
        assert server.packet() == LINES
        pid = os.fork()
        if pid == 0:
            mine = statsd._client._sock
            statsd.send([("c", "child", 1, ())])
            statsd.flush()
            os._exit(0 if statsd._client._sock is not mine else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert server.packet() == ["child:1|c"]
        statsd.send(VALUES)
        assert server.packet() == LINES

    def test_nothing_is_opened_before_the_first_value(self, monkeypatch):
        monkeypatch.setattr(socket, "socket", None)
        monkeypatch.setattr(socket, "getaddrinfo", None)
        monkeypatch.setattr(threading.Thread, "start", None)
        Statsd()

    def test_a_port_that_is_none_is_a_mistake(self, monkeypatch):
        monkeypatch.setenv("STATSD_PORT", "8125/udp")
        with pytest.raises(ConfigurationError, match=r"STATSD_PORT.*'8125/udp'"):
            Statsd()

    def test_the_error_without_the_statsd_package_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "statsd", None)
        with pytest.raises(ImportError, match=r'pip install "dramatiq-policies\[statsd\]"'):
            Statsd()


class TestOtherClients:
    def test_a_client_of_the_statsd_package_packs_them(self, server):
        client = statsd_package.StatsClient("127.0.0.1", server.port, prefix="shop")
        statsd = Statsd(client)
        statsd.send(VALUES)
        assert server.packet() == [
            "shop.jobs.mail.duration:12.500000|ms",
            "shop.jobs.mail.success:1|c",
            "shop.queues.mail.ready:3|g",
        ]
        assert server.has_no_more()
        client.close()

    def test_the_size_limit_of_a_client_does_not_part_the_values_of_a_call(self, server):
        client = statsd_package.StatsClient("127.0.0.1", server.port, maxudpsize=64)
        Statsd(client).send(VALUES)
        assert len(server.packet()) == 3
        client.close()

    def test_a_client_is_known_by_its_methods(self):
        plain, tagged = PlainClient(), TaggedClient()
        assert not Statsd(plain).tagged
        assert Statsd(tagged).tagged
        Statsd(plain).send(VALUES)
        Statsd(tagged).send([("c", "jobs.retry", 2, ["actor:mail"])])
        assert plain.calls == [(kind, name, value) for kind, name, value, _ in VALUES]
        assert tagged.calls == [("c", "jobs.retry", 2, ["actor:mail"])]

    def test_a_mock_in_place_of_a_client_is_called_itself(self):
        mock = MagicMock()
        Statsd(mock).send(VALUES)
        mock.timing.assert_called_once_with("jobs.mail.duration", 12.5)
        mock.incr.assert_called_once_with("jobs.mail.success")
        mock.gauge.assert_called_once_with("queues.mail.ready", 3)

    def test_a_client_without_any_of_them_is_a_mistake(self):
        with pytest.raises(ConfigurationError, match="a statsd or DogStatsD client"):
            Statsd(object())

    def test_datadogs_client_packs_them_on_another_thread(self, server, monkeypatch):
        client = DogStatsd("127.0.0.1", server.port, disable_telemetry=True)
        resolve, on = socket.getaddrinfo, []
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: on.append(threading.current_thread()) or resolve(*a))
        statsd = Statsd(client)
        statsd.send([("ms", "jobs.duration", 12.5, ["actor:mail"]), ("c", "jobs.success", 1, ["actor:mail"])])
        statsd.flush(5)
        assert [line.split("|c:")[0] for line in server.packet()] == [
            "jobs.duration:12.5|ms|#actor:mail",
            "jobs.success:1|c|#actor:mail",
        ]
        assert on
        assert threading.current_thread() not in on
        client.close_socket()

    @pytest.mark.parametrize("buffering", [False, True])
    def test_a_datadog_client_that_the_application_shares_keeps_the_applications_values(self, server, buffering):
        client = DogStatsd(
            "127.0.0.1", server.port, disable_telemetry=True, disable_buffering=not buffering, flush_interval=0
        )
        statsd = Statsd(client)
        with client if not buffering else nullcontext():
            client.increment("app.orders")
            # Longer than the thread that packs waits.
            for _ in range(3):
                statsd.send([("c", "jobs.success", 1, ["actor:mail"])])
                statsd.flush(5)
                client.increment("app.orders")
        client.flush()
        lines = []
        while sum(line.startswith("app.orders:") for line in lines) < 4:
            lines += [line.split("|c:")[0] for line in server.packet() if line]
        assert lines.count("app.orders:1|c") == 4
        assert lines.count("jobs.success:1|c|#actor:mail") == 3
        client.close_socket()

    def test_the_client_beside_one_of_datadogs_follows_its_settings(self, server):
        """As ``datadog.initialize`` makes them, after the import."""
        client = DogStatsd("127.0.0.1", 1, disable_telemetry=True)
        statsd = Statsd(client)
        statsd.send([("c", "jobs.success", 1, [])])
        statsd.flush(5)
        before = dict(vars(client))
        client.port, client.namespace, client.constant_tags = server.port, "shop", ["env:test"]
        statsd.send([("c", "jobs.success", 1, ["actor:mail"])])
        statsd.flush(5)
        assert server.packet()[0].split("|c:")[0] == "shop.jobs.success:1|c|#actor:mail,env:test"
        changed = {name for name, value in vars(client).items() if before.get(name) is not value}
        assert {name.lstrip("_") for name in changed} <= {"port", "namespace", "constant_tags", "constant_tags_str"}

    def test_a_client_with_a_buffer_that_is_none_of_datadogs_is_called_value_by_value(self):
        class Buffering(TaggedClient):
            def open_buffer(self):
                raise AssertionError("the application's buffer")

            close_buffer = open_buffer

        client = Buffering()
        Statsd(client).send([("c", "jobs.success", 1, []), ("g", "queues.ready", 3, [])])
        assert [call[1] for call in client.calls] == ["jobs.success", "queues.ready"]

    def test_a_server_that_does_not_read_its_tcp_connection_blocks_no_job(self):
        listening = socket.create_server(("127.0.0.1", 0))
        client = statsd_package.TCPStatsClient("127.0.0.1", listening.getsockname()[1])
        statsd = Statsd(client)
        started = time.monotonic()
        for _ in range(20_000):
            statsd.send(VALUES)
        assert time.monotonic() - started < 5
        accepted, _ = listening.accept()
        accepted.close()
        listening.close()
        statsd.flush(5)
        client.close()

    def test_a_tcp_connection_that_broke_is_opened_again(self, caplog):
        listening = socket.create_server(("127.0.0.1", 0))
        client = statsd_package.TCPStatsClient("127.0.0.1", listening.getsockname()[1])
        statsd = Statsd(client)
        statsd.send(VALUES)
        listening.accept()[0].close()
        listening.settimeout(0.05)
        for _ in range(100):
            statsd.send(VALUES)
            statsd.flush(5)
            try:
                accepted, _ = listening.accept()
            except TimeoutError:
                continue
            break
        accepted.settimeout(5)
        statsd.send(VALUES)
        assert accepted.recv(1_000).startswith(b"jobs.mail.duration")
        assert caplog.text.count("Metrics can't be sent") == 1
        statsd.flush(5)
        client.close()
        accepted.close()
        listening.close()

    def test_a_slow_client_is_waited_for_once(self, caplog):
        class Slow(PlainClient):
            def timing(self, name, value):
                time.sleep(0.1)
                super().timing(name, value)

        client = Slow()
        statsd = Statsd(client)
        statsd.send(VALUES)
        started = time.monotonic()
        for _ in range(10):
            statsd.send(VALUES)
        assert time.monotonic() - started < 0.1
        statsd.flush(10)
        assert len(client.calls) == 33
        assert [record.getMessage() for record in caplog.records] == [
            "The metrics client is slow; from now on a separate thread calls it. This warning is logged once."
        ]

    def test_a_client_that_can_not_reconnect_is_used_again(self, caplog):
        class Broken(PlainClient):
            def pipeline(self):
                self.calls.append("pipeline")
                raise OSError("gone")

        client = Broken()
        statsd = Statsd(client)
        statsd.send(VALUES)
        statsd.send(VALUES)
        assert client.calls == ["pipeline", "pipeline"]
        assert caplog.text.count("Metrics can't be sent (OSError: gone)") == 1

    def test_a_client_that_hangs_does_not_fill_the_memory(self, caplog):
        called, held = threading.Event(), threading.Event()

        class Stuck(PlainClient):
            def incr(self, name, count=1):
                called.set()
                held.wait(20)

        class DogStatsd(Stuck):
            __module__ = "datadog.own"

        statsd = Statsd(DogStatsd())
        statsd.send(VALUES)
        assert called.wait(20)
        for _ in range(12_000):
            statsd.send(VALUES)
        assert statsd._waiting.qsize() <= 10_000
        held.set()
        assert "faster than they can be sent" in caplog.text
        held.set()
        statsd.flush(5)

    def test_an_error_of_a_client_is_logged_once_and_goes_no_further(self, caplog):
        class Broken(PlainClient):
            def incr(self, name, count=1):
                raise RuntimeError("no metrics today")

        statsd = Statsd(Broken())
        statsd.send(VALUES)
        statsd.send(VALUES)
        assert len(caplog.records) == 1
        assert "RuntimeError: no metrics today" in caplog.text

    def test_after_a_fork_the_child_has_a_thread_of_its_own(self, server):
        client = DogStatsd("127.0.0.1", server.port, disable_telemetry=True)
        statsd = Statsd(client)
        statsd.send([("c", "parent", 1, [])])
        statsd.flush(5)
        assert server.packet()[0].startswith("parent:1|c")
        pid = os.fork()
        if pid == 0:
            statsd.send([("c", "child", 1, [])])
            statsd.flush(5)
            os._exit(0)
        os.waitpid(pid, 0)
        assert server.packet()[0].startswith("child:1|c")
        client.close_socket()


class FullSocket:
    """Sends what it is told to, until it raises what is in `errors`."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.sent = []

    def send(self, data):
        if self.errors:
            raise self.errors.pop(0)
        self.sent.append(data)

    def close(self):
        pass


@pytest.mark.parametrize(
    ("errors", "said"),
    [([BlockingIOError()], 0), ([ConnectionRefusedError()], 1), ([ConnectionRefusedError(), OSError("again")], 1)],
    ids=["no room", "nobody listened to the last", "nobody listens at all"],
)
def test_a_value_that_a_socket_refuses_is_left_out(server, errors, said):
    told = []
    client = _udp.udp_client(lambda what, text: told.append(what))
    client._look_up()
    client._sock.close()
    client._sock = FullSocket(*errors)
    client.deliver_all(["a:1|c"])
    client.deliver_all(["b:1|c"])
    assert told == ["unreachable"] * said
    assert client._sock.sent == ([b"a:1|c"] if len(errors) == said == 1 else []) + [b"b:1|c"]


def test_where_no_thread_can_be_started_values_are_left_out_and_that_is_logged_once(server, monkeypatch, caplog):
    def start(thread):
        raise RuntimeError("can't start new thread")

    statsd = Statsd()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        statsd.send_text("a:1|c")
    assert "RuntimeError: can't start new thread" in caplog.text


def test_names_hold_nothing_that_statsd_would_misread():
    assert metric_name("shop.mail:send|now\n é") == "shop.mail_send_now___"
    assert metric_name(None) == metric_name("") == "unknown"
    assert len(metric_name("x" * 1_000)) == 200


def test_tags_hold_nothing_that_dogstatsd_would_misread():
    assert tag_list({"actor": "mail", "team": "a,b|c\nd", "queue": None}) == ["actor:mail", "team:a_b_c_d"]
