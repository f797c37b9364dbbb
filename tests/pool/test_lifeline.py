"""Connections between nodes: only who knows the key of the job is let in."""

import contextlib
import signal
import socket
import subprocess
import sys
from multiprocessing import AuthenticationError

import pytest

from coaddflow.pool.lifeline import Listener, connect


def test_workers_that_know_the_key_are_let_in():
    with Listener(backlog=3) as listener:
        ours = {rank: connect(listener.address, rank) for rank in (3, 1, 2)}
        theirs = dict(listener.accept(5) for _ in ours)
        assert sorted(theirs) == [1, 2, 3]
        ours[2].sendall(b".")
        assert theirs[2].recv(1) == b"."
        for connection in (*ours.values(), *theirs.values()):
            connection.close()


def test_a_connection_ends_with_its_listener():
    with Listener() as listener:
        ours = connect(listener.address, 0)
    with ours:
        assert ours.recv(1) == b""


def test_strangers_are_turned_away_and_delay_nobody():
    with Listener() as listener, contextlib.ExitStack() as strangers:
        for _ in range(5):  # these say nothing
            one = socket.create_connection(("127.0.0.1", listener.address.port), 5)
            strangers.enter_context(one)
        with pytest.raises(AuthenticationError):
            connect(listener.address._replace(key="00" * 32), 7)
        with connect(listener.address, 1):
            rank, connection = listener.accept(5)
            connection.close()
            assert rank == 1
        with pytest.raises(TimeoutError, match="no worker connected"):
            listener.accept(0.1)


def test_who_listens_must_know_the_key_as_well():
    """Else a stranger who took the port could hold a worker for ever, or let it live on."""
    with Listener() as impostor, Listener() as master:
        address = master.address._replace(port=impostor.address.port)
        with pytest.raises(AuthenticationError):
            connect(address, 1)


def test_a_second_sigterm_does_not_disturb_what_the_first_began():
    code = (
        "import os, signal\n"
        "from coaddflow.pool.lifeline import Stopped, raise_on_sigterm\n"
        "raise_on_sigterm()\n"
        "try:\n"
        f"    os.kill(os.getpid(), {int(signal.SIGTERM)})\n"
        "except Stopped:\n"
        f"    os.kill(os.getpid(), {int(signal.SIGTERM)})\n"
        "    print('tidied up')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "tidied up\n", "")
