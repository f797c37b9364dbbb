"""The survey's database is changed in place: whoever is killed, it is the old or the new one."""

import errno
import fcntl
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from survey_run import environment
from test_corners import content, exposure_rows, manifest

from coaddflow import fence
from coaddflow.corners import connections, survey
from coaddflow.corners.build import build_tract_database
from coaddflow.corners.database import CornerDatabase
from coaddflow.corners.survey import build_survey_database, update_survey_database
from coaddflow.errors import InputError, ReplacedError
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.maps import make_skymap

UPDATE = """
import os, signal, sys
from coaddflow.corners import connections, survey
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.maps import make_skymap

connections._CACHE_KB = int(sys.argv[1])
if sys.argv[2] == "killed":
    survey._compare_with_plan = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
manifests = sorted(name for name in os.listdir() if name.endswith(".ecsv"))
survey.update_survey_database("corners.sqlite", manifests, make_skymap(SkymapSettings()))
"""
"""A process that brings a database up to date, with a cache of a size in kB."""

SMALL_CACHE = "1"
"""With it pages are in the file before the transaction is at its end."""


@pytest.fixture(scope="module")
def skymap():
    return make_skymap(SkymapSettings())


class Survey:
    """The database of a survey in which one exposure is redone, one dropped and one added."""

    def __init__(self, folder, skymap):
        self.folder, self.skymap = folder, skymap
        self.path = folder / "corners.sqlite"
        first = [exposure_rows(f"e{i}", 150.1 + i, 2.2, n=4, half=0.05) for i in range(5)]
        self.before = [manifest(folder, rows) for rows in first]
        build_survey_database(self.path, self.names(), skymap)
        self.old = content(self.path)
        manifest(folder, exposure_rows("e1", 151.1, 2.25, n=4, half=0.05, seeing=1.5))
        manifest(folder, exposure_rows("new", 10.0, -40.0, n=4, half=0.05, failed=[3]))
        (folder / "e3.ecsv").unlink()
        build_survey_database(folder / "other.sqlite", self.names(), skymap)
        self.new = content(folder / "other.sqlite")
        (folder / "other.sqlite").unlink()

    def names(self):
        """Return the manifests, as the process that updates names them."""
        os.chdir(self.folder)
        return sorted(path.name for path in Path().glob("*.ecsv"))

    def update(self):
        return update_survey_database(self.path, self.names(), self.skymap)

    def read(self):
        """Return the rows that a reader gets."""
        with CornerDatabase(self.path) as database:
            return database.ccds()

    @property
    def journal(self):
        return Path(f"{self.path}-journal")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, skymap):
    """The folder of a survey before its update."""
    before = Path.cwd()
    yield Survey(tmp_path_factory.mktemp("prepared"), skymap)
    os.chdir(before)


@pytest.fixture
def changing(tmp_path, prepared, monkeypatch):
    """A survey of which the database is to be brought up to date."""
    for path in prepared.folder.iterdir():
        shutil.copy2(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    one = object.__new__(Survey)
    one.folder, one.skymap, one.path = tmp_path, prepared.skymap, tmp_path / "corners.sqlite"
    one.old, one.new = prepared.old, prepared.new
    return one


def run_update(one, cache=SMALL_CACHE, ends="killed", around=()):
    """Run the update in a process of its own; return its exit code."""
    return run_python(one, [UPDATE, cache, ends], around).returncode


def run_python(one, arguments, around=()):
    """Run a script in a process of its own."""
    return subprocess.run(
        [*around, sys.executable, "-c", *arguments],
        cwd=one.folder,
        env=environment(),
        check=False,
        timeout=100,
        capture_output=True,
        text=True,
    )


def assert_it_mends(one):
    """Check that what the killed process left is the old or the new, and can be updated."""
    with CornerDatabase(one.path) as database:
        n_rows = len(database.ccds())
    found = content(one.path)
    assert found in (one.old, one.new)
    assert n_rows == len(found["ccds"])
    one.update()
    assert content(one.path) == one.new
    assert not one.journal.exists()
    return found == one.new


def test_killed_in_the_transaction_with_pages_in_the_file(changing):
    before = changing.path.read_bytes()
    assert run_update(changing) == -signal.SIGKILL
    assert changing.journal.stat().st_size > 0
    assert changing.path.read_bytes() != before
    assert not assert_it_mends(changing)


def test_killed_in_the_transaction_with_pages_in_memory(changing):
    before = changing.path.read_bytes()
    assert run_update(changing, cache="64000") == -signal.SIGKILL
    assert changing.path.read_bytes() == before
    assert not assert_it_mends(changing)


def strace_works():
    """Return whether processes can be traced here."""
    command = ["strace", "-f", "-e", "trace=none", "true"]
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def injecting(call, what):
    """Return the command that lets a call of the system fail."""
    return ["strace", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{what}"]


KILLED_AT = [
    *(f"fdatasync:{n}" for n in range(1, 6)),
    *(f"pwrite64:{n}" for n in (1, 2, 3, 30, 100, 200)),
    "unlink:1",
]
"""Calls of the system at which the process is killed: the fifth sync and the removal of the journal
are behind the point at which the change is made."""


@pytest.mark.skipif(not strace_works(), reason="no strace")
@pytest.mark.parametrize("cache", [SMALL_CACHE, "64000"])
@pytest.mark.parametrize("call", KILLED_AT)
def test_killed_between_the_steps_of_a_commit(changing, call, cache):
    name, number = call.split(":")
    # no -f: the calls of this process alone
    code = run_update(changing, cache, "alive", injecting(name, f"signal=SIGKILL:when={number}"))
    assert code == -signal.SIGKILL or (code == 0 and call == "fdatasync:5")
    assert_it_mends(changing)


@pytest.mark.skipif(not strace_works(), reason="no strace")
def test_locks_that_nfs_does_not_have_are_not_taken_for_those_of_others(changing):
    """SQLite says of ENOLCK that the database is busy."""
    # Python has fcntl calls of its own
    around = [*injecting("fcntl", "error=ENOLCK"), "-P", str(changing.path)]
    file = changing.path.stat().st_ino
    read = (
        "from coaddflow.corners.database import CornerDatabase\n"
        "print(len(CornerDatabase('corners.sqlite').ccds()))"
    )
    started = time.monotonic()
    assert run_python(changing, [read], around).stdout.split() == ["80"]
    assert run_update(changing, ends="alive", around=around) == 0
    assert time.monotonic() - started < connections.READ_PATIENCE
    assert changing.path.stat().st_ino != file
    assert content(changing.path) == changing.new


@pytest.mark.skipif(not strace_works(), reason="no strace")
@pytest.mark.parametrize("first", [1, 2, 30])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_quota_that_is_used_up_is_said_and_makes_nothing_anew(changing, first, is_there):
    if not is_there:
        changing.path.unlink()
    around = injecting("pwrite64", f"error=EDQUOT:when={first}+")
    run = run_python(changing, [UPDATE, SMALL_CACHE, "alive"], around)
    *_, last = run.stderr.splitlines()
    assert "corners.sqlite: cannot be written: disk I/O error (or the quota is used up)." in last
    assert "is made anew" not in run.stderr
    assert sorted(path.suffix for path in changing.folder.iterdir() if "corners" in path.name) in (
        [[".sqlite"], [".sqlite", ".sqlite-journal"]] if is_there else [[]]
    )
    if is_there:
        assert not assert_it_mends(changing)


def test_where_nothing_kills_it_the_update_is_that_of_a_rebuilt_database(changing):
    assert run_update(changing, ends="alive") == 0
    assert content(changing.path) == changing.new
    assert not changing.journal.exists()


@pytest.mark.parametrize("what", ["removed", "no database", "of another schema", "cut off"])
def test_the_journal_of_a_killed_process_does_not_spoil_what_replaces_the_file(changing, what):
    assert run_update(changing) == -signal.SIGKILL
    if what == "removed":
        changing.path.unlink()
    elif what == "no database":
        changing.path.write_bytes(b"not a database" * 300)
    elif what == "cut off":
        changing.path.write_bytes(changing.path.read_bytes()[:5000])
    else:
        with sqlite3.connect(changing.path) as connection:
            connection.execute("PRAGMA user_version = 1")
        connection.close()
        assert not changing.journal.exists()
    changing.update()
    assert content(changing.path) == changing.new
    assert not changing.journal.exists()


def test_a_reader_that_may_not_mend_says_who_can(changing, monkeypatch):
    assert run_update(changing) == -signal.SIGKILL
    monkeypatch.setattr(connections, "_mend", lambda _: None)
    with pytest.raises(InputError, match="left half changed by a job that was killed"):
        CornerDatabase(changing.path)
    monkeypatch.undo()
    os.chdir(changing.folder)
    assert not assert_it_mends(changing)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_reader_without_permission_reads_what_is_whole_and_names_what_is_not(changing):
    changing.path.chmod(0o444)
    changing.folder.chmod(0o555)
    try:
        assert changing.read()
    finally:
        changing.folder.chmod(0o755)
        changing.path.chmod(0o644)


class TestReadersAndWriters:
    def test_readers_see_the_old_rows_until_the_change_is_made(self, changing):
        rows = changing.read()
        with connections.changed_database(changing.path) as connection:
            connection.execute("DELETE FROM exposures WHERE exposure = 'e2'")
            assert changing.read() == rows
        assert {row.exposure for row in rows} - {r.exposure for r in changing.read()} == {"e2"}

    def test_an_open_reader_sees_the_next_change(self, changing):
        with CornerDatabase(changing.path) as database:
            before = database.ccds()
            changing.update()
            assert len(before) == 80
            assert [row.exposure for row in database.ccds() if row.exposure == "new"]

    def test_a_second_writer_waits_and_says_so_when_it_has_no_patience(self, changing, monkeypatch):
        monkeypatch.setattr(connections, "CHANGE_PATIENCE", 0.1)
        with (
            connections.changed_database(changing.path),
            pytest.raises(InputError, match="another process has had it"),
        ):
            changing.update()
        assert content(changing.path) == changing.old

    def test_a_writer_that_waited_changes_the_file_that_has_the_name(self, changing):
        """Another process made the database anew meanwhile."""
        shutil.copy2(changing.path, changing.folder / "again")
        holding = connections._begin(changing.path)
        waiting = threading.Thread(target=changing.update)
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        (changing.folder / "again").replace(changing.path)
        holding.close()
        waiting.join(60)
        assert content(changing.path) == changing.new
        assert not changing.journal.exists()

    def test_it_is_not_replaced_while_somebody_changes_it(self, changing, monkeypatch):
        monkeypatch.setattr(connections, "CHANGE_PATIENCE", 0.1)
        with (
            connections.changed_database(changing.path),
            pytest.raises(InputError, match="another process has had it"),
        ):
            build_survey_database(changing.path, changing.names(), changing.skymap)
        assert content(changing.path) == changing.old

    def test_a_job_that_was_replaced_changes_nothing(self, changing):
        old, new = (fence.Fence("tokens/survey", f"Slurm job {n}") for n in (1, 2))
        fence.begin(old)
        fence.begin(new)
        with pytest.raises(ReplacedError), fence.fenced_by(old):
            changing.update()
        assert content(changing.path) == changing.old
        with fence.fenced_by(new):
            changing.update()
        assert content(changing.path) == changing.new

    def test_without_locks_a_changed_copy_replaces_the_file(self, changing, monkeypatch):
        def without_locks(_):
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_LOCK
            raise error

        file = changing.path.stat().st_ino
        monkeypatch.setattr(connections, "_begin", without_locks)
        monkeypatch.setattr(connections, "_read_something", without_locks)
        changing.update()
        assert changing.path.stat().st_ino != file
        assert len(changing.read()) == 80
        assert content(changing.path) == changing.new

    @pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
    def test_a_file_system_that_refuses_locks_has_none(self, changing, monkeypatch, code):
        def refuse(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(connections, "_devices_with_locks", set())
        monkeypatch.setattr(fcntl, "lockf", refuse)
        n_handles = len(list(Path("/proc/self/fd").iterdir()))
        file = changing.path.stat().st_ino
        assert len(changing.read()) == 80
        changing.update()
        assert changing.path.stat().st_ino != file
        assert content(changing.path) == changing.new
        assert len(list(Path("/proc/self/fd").iterdir())) == n_handles

    def test_looking_for_locks_ends_none_of_this_process(self, changing, monkeypatch):
        monkeypatch.setattr(connections, "_devices_with_locks", set())
        other = (
            "import sqlite3\n"
            "sqlite3.connect('corners.sqlite', timeout=0).execute('BEGIN EXCLUSIVE')"
        )
        with connections.changed_database(changing.path):
            connections._devices_with_locks.clear()
            assert changing.read()
            assert connections._devices_with_locks
            assert "database is locked" in run_python(changing, [other]).stderr

    def test_who_may_not_write_the_file_is_told_who_can_allow_it(self, changing, monkeypatch):
        original = survey.insert_exposures

        def forbid(connection, *arguments):
            connection.execute("PRAGMA query_only = 1")
            original(connection, *arguments)

        monkeypatch.setattr(survey, "insert_exposures", forbid)
        with pytest.raises(InputError, match=r"cannot be written: .*readonly.*chmod g\+w"):
            changing.update()
        monkeypatch.undo()
        os.chdir(changing.folder)
        assert content(changing.path) == changing.old

    @pytest.mark.parametrize(
        ("code", "raised"),
        [
            (sqlite3.SQLITE_IOERR_WRITE, connections.UnavailableError),
            (sqlite3.SQLITE_IOERR_READ, connections.UnavailableError),
            (sqlite3.SQLITE_INTERRUPT, sqlite3.OperationalError),
        ],
    )
    def test_only_damage_makes_it_anew(self, changing, monkeypatch, code, raised):
        def fail(*_):
            error = sqlite3.OperationalError("something")
            error.sqlite_errorcode = code
            raise error

        monkeypatch.setattr(survey, "insert_exposures", fail)
        monkeypatch.setattr(survey, "build_survey_database", None)
        with pytest.raises(raised, match="something"):
            changing.update()
        assert content(changing.path) == changing.old

    def test_a_schema_that_is_not_text_is_named_and_mended(self, changing):
        content_of_file = changing.path.read_bytes()
        assert b"CREATE TABLE ccds" in content_of_file
        spoilt = content_of_file.replace(b"CREATE TABLE ccds", b"CREATE\xccABLE \xccccds", 1)
        changing.path.write_bytes(spoilt[: len(content_of_file)])
        with pytest.raises(InputError, match=r"corners\.sqlite.*is not a readable corner database"):
            changing.read()
        changing.update()
        assert content(changing.path) == changing.new

    def test_a_full_disk_leaves_the_old_rows(self, changing, monkeypatch):
        original = survey.insert_exposures

        def fill(connection, *arguments):
            connection.execute("PRAGMA max_page_count = 1")
            original(connection, *arguments)

        monkeypatch.setattr(survey, "insert_exposures", fill)
        with pytest.raises(InputError, match="No space left on device"):
            changing.update()
        assert content(changing.path) == changing.old

    def test_the_database_of_a_tract_needs_no_locks(self, changing, monkeypatch):
        path = changing.folder / "tract.sqlite"
        build_tract_database(path, changing.names(), changing.skymap.tract(9813))
        monkeypatch.setattr(connections, "_open_with_locks", None)
        with CornerDatabase(path) as database:
            assert database.ccds()


class TestWhatIsLookedAt:
    def test_manifests_of_the_same_size_and_time_are_not_read(self, changing, monkeypatch):
        changing.update()
        read = []
        monkeypatch.setattr(survey, "content_of", read.append)
        assert len(changing.update().unchanged) == 5
        assert read == []

    def test_a_manifest_that_was_only_touched_is_looked_at_once(self, changing, monkeypatch):
        changing.update()
        os.utime(changing.folder / "e0.ecsv", (1e9, 1e9))
        looked = []
        original = survey.content_of

        def note(path):
            looked.append(path)
            return original(path)

        monkeypatch.setattr(survey, "content_of", note)
        for _ in range(2):
            update = changing.update()
            assert (update.redone, len(update.unchanged)) == ([], 5)
        assert looked == ["e0.ecsv"]

    def test_a_database_without_the_times_gets_them(self, changing):
        with sqlite3.connect(changing.path) as connection:
            connection.execute("DROP TABLE exposure_checks")
        connection.close()
        update = changing.update()
        assert (update.added, update.redone, update.dropped) == (["new"], ["e1"], ["e3"])
        with CornerDatabase(changing.path) as database:
            assert len(database.query("SELECT * FROM exposure_checks")) == 5

    def test_the_database_is_newer_than_its_manifests_also_if_nothing_changed(self, changing):
        changing.update()
        os.utime(changing.path, (1e9, 1e9))
        changing.update()
        assert changing.path.stat().st_mtime > (changing.folder / "e0.ecsv").stat().st_mtime

    def test_what_is_covered_is_compared_with_the_plan_where_either_changed(self, changing):
        with CornerDatabase(changing.path) as database:
            rows = database.query(
                "SELECT DISTINCT exposure, tract, patch FROM ccd_patches JOIN ccds USING (ccd_key)"
            )
        plan = {}
        for exposure, tract, patch in map(tuple, rows):
            plan.setdefault(exposure, {}).setdefault(tract, []).append(patch)

        def update(plan):
            survey.make_survey_database(changing.path, names, changing.skymap, plan)

        names = ["e0.ecsv", "e2.ecsv", "e4.ecsv"]
        update(plan)
        # of an exposure that has not changed, the plan is smaller now
        (tract, patches), *others = plan["e2"].items()
        smaller = plan | {"e2": {tract: patches[1:], **dict(others)}}
        before = content(changing.path)
        for _ in range(2):
            with pytest.raises(InputError, match=r"1 patches are covered .* by exposure e2"):
                update(smaller)
        assert content(changing.path) == before
        update(plan)
        # an exposure that is added covers what was not planned
        names.append("new.ecsv")
        with pytest.raises(InputError, match=r"patches are covered .* by exposure new"):
            update(plan)
        assert content(changing.path) == before
