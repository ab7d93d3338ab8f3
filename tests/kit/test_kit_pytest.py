"""The pytest plugin, as an installed package registers it, and the mixin for unittest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import unittest
from pathlib import Path

import dramatiq
import dramatiq.broker
import pytest
from dramatiq.brokers.stub import StubBroker

from dramatiq_policies import install
from dramatiq_policies.testing import StubBrokerMixin

ROOT = Path(__file__).parents[2]
APP = """
import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq_policies import RetryPolicy, constant, install

class Flaky(Exception): pass

broker = RedisBroker(url="redis://127.0.0.1:1/0")
install(broker)
dramatiq.set_broker(broker)

@dramatiq.actor(retry_on={Flaky: RetryPolicy(attempts=2, wait=constant(3_600_000))})
def job(): pass
"""


@pytest.fixture
def run_pytest(tmp_path):
    """Run pytest on a test module beside an app, with our entry point installed."""
    (entry,) = re.findall(r'"pytest11"\]\n(.+)\n', (ROOT / "pyproject.toml").read_text())
    info = tmp_path / "site" / "kit_entry_point-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kit-entry-point\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[pytest11]\n" + entry.replace('"', ""))
    (tmp_path / "app.py").write_text(APP)

    def run(module, *args):
        (tmp_path / "test_app.py").write_text(textwrap.dedent(module))
        path = os.pathsep.join(
            [str(info.parent), str(Path(dramatiq_policies_root())), str(tmp_path), os.environ.get("PYTHONPATH", "")]
        )
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:hypothesispytest",
                "-c",
                os.devnull,
                *args,
                str(tmp_path),
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return run


def dramatiq_policies_root():
    import dramatiq_policies

    return Path(dramatiq_policies.__file__).parents[1]


def test_the_fixtures_are_there_once_the_package_is_installed(run_pytest):
    done = run_pytest(
        """
        import dramatiq
        from app import Flaky, broker, job
        from dramatiq_policies.testing import fail

        def test_a_retry(stub_broker, drain):
            job.send()
            with fail(job, Flaky):
                run = drain(until=3_600_000)
            run.assert_outcomes(job, "retried", "succeeded")
            assert job.broker is stub_broker is dramatiq.get_broker()

        def test_all_is_restored():
            assert job.broker is broker is dramatiq.get_broker()
        """
    )
    assert "2 passed" in done.stdout, done.stdout


def test_a_fixture_of_the_users_with_the_same_name_is_the_one_that_is_drained(run_pytest):
    done = run_pytest(
        """
        import dramatiq, pytest
        from dramatiq.brokers.stub import StubBroker
        from dramatiq_policies import install

        @pytest.fixture
        def stub_broker():
            return install(StubBroker())

        def test_mine(stub_broker, drain):
            @dramatiq.actor(broker=stub_broker)
            def job(): pass
            job.send()
            assert drain().outcomes(job) == ["succeeded"]
        """
    )
    assert "1 passed" in done.stdout, done.stdout


def test_the_plugin_does_nothing_unless_used_and_can_be_turned_off(run_pytest):
    module = """
        import threading, time
        import dramatiq.broker, dramatiq.common

        def test_nothing_has_changed():
            assert dramatiq.broker.global_broker is None
            assert dramatiq.common.time is time.time
            assert threading.active_count() == 1

        def test_fixture(drain):
            pass
        """
    assert "2 passed" in run_pytest(module).stdout
    done = run_pytest(module, "-p", "no:dramatiq_policies")
    assert "1 passed, 1 error" in done.stdout, done.stdout
    assert "fixture 'drain' not found" in done.stdout


def test_a_failed_assertion_shows_the_transcript_and_not_the_kits_own_lines(run_pytest):
    done = run_pytest(
        """
        from app import Flaky, job
        from dramatiq_policies.testing import fail

        def test_a_retry(drain):
            job.send()
            with fail(job, Flaky("no answer")):
                run = drain()
            run.assert_outcomes(job, "succeeded")
        """
    )
    assert "job: expected succeeded, got retried, succeeded." in done.stdout
    assert "attempt 1  retried: Flaky: no answer, again in 1 h" in done.stdout
    assert "testing/run.py" not in done.stdout


def test_unittest_has_a_mixin(monkeypatch):
    monkeypatch.setattr(dramatiq.broker, "global_broker", install(StubBroker()))

    @dramatiq.actor
    def job():
        pass

    class Case(StubBrokerMixin, unittest.TestCase):
        def test_job(self):
            assert job.broker is self.stub_broker
            job.send()
            self.drain().assert_outcomes(job, "succeeded")

        def test_failing(self):
            raise ZeroDivisionError

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    assert (result.testsRun, len(result.errors)) == (2, 1)
    assert job.broker is dramatiq.get_broker()


def test_the_plugin_works_in_the_processes_of_xdist(run_pytest):
    done = run_pytest(
        """
        import os
        import dramatiq, pytest
        from app import Flaky, broker, job
        from dramatiq_policies.testing import fail, stub

        @pytest.fixture(autouse=True)
        def all_is_put_back():
            fn = job.fn
            yield
            assert os.environ["PYTEST_XDIST_WORKER"] in ("gw0", "gw1")
            assert dramatiq.get_broker() is job.broker is broker
            assert job.fn is fn

        def run_job(drain):
            job.send()
            with fail(job, Flaky):
                drain().assert_outcomes(job, "retried", "succeeded")

        @pytest.mark.parametrize("number", range(6))
        def test_the_fixtures(stub_broker, drain, number):
            run_job(drain)

        @pytest.mark.parametrize("number", range(6))
        def test_stub(number):
            from dramatiq_policies.testing import drain
            with stub() as stub_broker:
                run_job(lambda: drain(stub_broker))

        @pytest.mark.xfail(strict=True, raises=ZeroDivisionError)
        @pytest.mark.parametrize("number", range(6))
        def test_that_raises(stub_broker, number):
            raise ZeroDivisionError
        """,
        "-n2",
    )
    assert "12 passed, 6 xfailed" in done.stdout, done.stdout


def test_async_tests_have_the_fixtures_and_drain_while_their_loop_runs(run_pytest):
    done = run_pytest(
        """
        import asyncio
        import dramatiq, pytest
        from dramatiq.asyncio import get_event_loop_thread
        from app import Flaky, broker, job
        from dramatiq_policies.testing import fail

        broker.add_middleware(dramatiq.middleware.AsyncIO())
        loops = []

        @dramatiq.actor
        async def job_of_a_loop():
            await asyncio.sleep(0)
            loops.append(asyncio.get_running_loop())

        @pytest.fixture
        async def sent(stub_broker):
            job.send()

        @pytest.mark.asyncio
        async def test_of_a_sync_actor(sent, drain):
            with fail(job, Flaky):
                drain().assert_outcomes(job, "retried", "succeeded")

        @pytest.mark.asyncio
        async def test_of_an_async_actor(stub_broker, drain):
            mine = asyncio.get_running_loop()
            other = asyncio.create_task(asyncio.sleep(0.01, "goes on"))
            job_of_a_loop.send()
            drain().assert_outcomes(job_of_a_loop, "succeeded")
            assert loops and mine not in loops
            assert asyncio.get_running_loop() is mine
            assert get_event_loop_thread() is None
            assert await other == "goes on"

        @pytest.mark.asyncio
        async def test_of_a_drain_beside_the_loop(stub_broker, drain):
            job_of_a_loop.send()
            run = await asyncio.to_thread(drain)
            run.assert_outcomes(job_of_a_loop, "succeeded")

        def test_all_is_restored():
            assert job.broker is job_of_a_loop.broker is dramatiq.get_broker() is broker
        """,
        "-o",
        "asyncio_mode=auto",
    )
    assert "4 passed" in done.stdout, done.stdout
