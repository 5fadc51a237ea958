"""Processes of a run meet at an address before JAX connects them: here threads, in one process."""

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from jbn.cli import meeting
from jbn.cli.bad_input import BadInput
from jbn.cli.commands import parse


@pytest.fixture
def port():
    with socket.create_server(("localhost", 0)) as free:
        return free.getsockname()[1]


def options(port, process, *arguments, of=3, timeout=5):
    address = f"--coordinator localhost:{port} --num-processes {of} --process-id {process} --timeout {timeout}"
    return parse(["train", "--batch-size", "12", *address.split(), *arguments]).args[0]


def outcomes(*all_options):
    """What each of them is told: None where all is well."""

    def outcome(given):
        try:
            return meeting.meet(given)
        except BadInput as error:
            return str(error)

    with ThreadPoolExecutor(len(all_options)) as threads:
        return list(threads.map(outcome, all_options))


def test_all_go_on_when_all_have_come(port):
    assert outcomes(*(options(port, process) for process in range(3))) == [None] * 3


def test_what_need_not_be_alike_may_differ(port):
    assert (
        outcomes(options(port, 0, of=2), options(port, 1, "--out", "x", "--data", "y", of=2, timeout=6)) == [None] * 2
    )


def test_a_stranger_at_the_port_is_not_counted(port):
    def stranger():
        for said in (b"GET / HTTP/1.1\r\n\r\n", b'{"process": 7}\n', b"[]\n", b""):
            while True:
                try:
                    connection = socket.create_connection(("localhost", port))
                    break
                except ConnectionRefusedError:
                    pass
            with connection:
                connection.sendall(said)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(outcomes, options(port, 0, of=2))
        threads.submit(stranger).result()
        assert outcomes(options(port, 1, of=2)) == first.result() == [None]


def test_all_that_came_hear_who_did_not(port):
    message = (
        "--num-processes: got 2 of 3 processes within 1 s, none with --process-id 2; expected all of them; "
        "start all within --timeout."
    )
    assert outcomes(*(options(port, process, timeout=1) for process in range(2))) == [message] * 2


def test_all_hear_what_differs(port):
    message = "--lr: got 0.5 in process 1; expected 1.0, as in process 0; start all processes alike."
    assert outcomes(options(port, 0, of=2), options(port, 1, "--lr", "0.5", of=2)) == [message] * 2


def test_versions_that_differ_are_refused(port, monkeypatch):
    monkeypatch.setattr(meeting, "_hello", lambda given, hello=meeting._hello: hello(given) | of_process(given))

    def of_process(given):
        return {"versions": {"jbn": "0.1", "jax": f"0.1{given.process_id}"}}

    message = "jax: got 0.11 in process 1; expected 0.10, as in process 0; start all processes alike."
    assert outcomes(options(port, 0, of=2), options(port, 1, of=2)) == [message] * 2


def test_two_of_one_number_are_refused(port):
    message = "--process-id: got 1 twice; expected it once; give each process a number of its own."
    assert outcomes(*(options(port, process) for process in (0, 1, 1))) == [message] * 3


def test_nobody_there_is_said_in_time(port):
    assert outcomes(options(port, 1, timeout=1)) == [
        f"--coordinator: got localhost:{port}, where no process 0 answered within 1 s (Connection refused); "
        f"expected the address that process 0 listens at; start it, or check the address."
    ]


def test_a_name_of_no_host_is_said_at_once(port):
    (said,) = outcomes(replace(options(port, 1, timeout=60), coordinator="no-host.invalid:1"))
    assert said.startswith("--coordinator: got no-host.invalid:1, where no process 0 answered within 60 s (")


def test_process_0_needs_a_free_port_of_its_own_machine(port):
    with socket.create_server(("", port)):
        assert outcomes(options(port, 0)) == [
            f"--coordinator: got localhost:{port}, where process 0 cannot listen (Address already in use); "
            f"expected a free port of this machine; choose another."
        ]
    (said,) = outcomes(replace(options(port, 0, timeout=1), coordinator=f"no-host.invalid:{port}"))
    assert said.startswith(f"--coordinator: got no-host.invalid:{port}, which does not lead to process 0 (")
