"""Finished usage in the spool: durable, in order, whole; what changed since is told, what was torn is cut."""

from __future__ import annotations

import errno
import logging
import os
import threading
from itertools import takewhile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meterline import metrics
from meterline.task import admission as admission_module
from meterline.task import segments as segments_module
from meterline.task import spool as spool_module
from meterline.task.admission import CLAIM_BYTES
from meterline.task.errors import SpoolCorrupt, SpoolFailed, SpoolFull
from meterline.task.frames import build_frame, pack
from meterline.task.segments import has_segments, read_marker, segment_path
from meterline.task.spool import Spool

MIB = 1024 * 1024
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def slot(tmp_path):
    path = tmp_path / "slot-000"
    path.mkdir()
    return path


def admit_until(spool, is_over):
    """Tasks come and go."""
    while not is_over():
        spool.admit()
        spool.release()


@pytest.fixture
def small_segments(monkeypatch):
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES_MIN", 256)
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES_MAX", 256)


def started(slot, bytes_max=2 * MIB):
    spool = Spool(slot, bytes_max)
    spool.start(lambda: None)
    return spool


def keep(spool, *groups):
    """Each group in a frame of its own."""
    for group in groups:
        spool.append(group).result(5)


def left(spool):
    """All that can still be read, by frame."""
    frames = []
    while (frame := spool.read()) is not None:
        frames.append(frame)
    return frames


def records(spool):
    return [record for frame in left(spool) for record in frame.records]


def crash(spool):
    """The process is killed: nothing is sealed or marked any more."""
    os.close(spool._file)
    spool._file = -1


def test_what_was_kept_is_read_in_order_after_a_crash(slot):
    """Without any closing: durable is durable."""
    spool = started(slot)
    keep(spool, [b"a", b"b"], [b"c"], [b"d"])
    assert records(spool) == [b"a", b"b", b"c", b"d"]
    crash(spool)

    again = Spool(slot, MIB)
    assert records(again) == [b"a", b"b", b"c", b"d"]
    assert again.waiting_bytes > 0


def test_what_is_marked_as_drained_is_not_read_again(slot):
    """And the rest is; draining all of it leaves no segment."""
    spool = started(slot)
    keep(spool, [b"a"], [b"b"], [b"c"])
    spool.drained(left(spool)[1].end)
    spool.mark()
    crash(spool)
    again = Spool(slot, MIB)
    frames = left(again)
    assert [frame.records for frame in frames] == [[b"c"]]

    again.drained(frames[0].end)
    assert again.waiting_bytes == 0
    again.close()
    assert not has_segments(slot)
    assert records(Spool(slot, MIB)) == []


def test_what_is_drained_but_not_marked_is_read_again(slot):
    """The mark is never ahead of the truth; behind it, ids make a second publishing harmless."""
    spool = started(slot)
    keep(spool, [b"a"], [b"b"])
    spool.drained(left(spool)[0].end)
    crash(spool)

    assert records(Spool(slot, MIB)) == [b"a", b"b"]


def test_many_tasks_share_one_fsync(slot, monkeypatch):
    """Those that finish while the disk is busy are made durable together."""
    spool = started(slot)
    busy, go_on, calls = threading.Event(), threading.Event(), []
    sync = os.fdatasync

    def slow(file):
        calls.append(file)
        busy.set()
        assert go_on.wait(5)
        sync(file)

    monkeypatch.setattr(os, "fdatasync", slow)
    first = spool.append([b"first"])
    assert busy.wait(5)
    others = [spool.append([b"%d" % number]) for number in range(200)]
    assert not first.done()
    go_on.set()
    for future in [first, *others]:
        future.result(5)

    assert len(calls) == 2
    assert len(records(spool)) == 201


def test_nobody_is_told_before_the_fsync(slot, monkeypatch):
    """Not even when the bytes are written: a power failure takes them back."""
    spool = started(slot)
    go_on = threading.Event()
    monkeypatch.setattr(os, "fdatasync", lambda _: go_on.wait(5))
    kept = spool.append([b"a"])
    with pytest.raises(TimeoutError):
        kept.result(0.1)
    assert spool.read() is None
    go_on.set()
    kept.result(5)
    assert records(spool) == [b"a"]


@pytest.mark.usefixtures("small_segments")
def test_a_new_segment_is_made_durable_with_its_name(slot, monkeypatch):
    """The directory is synced after every creation and before anything in it is promised."""
    synced = []
    sync = segments_module.sync_directory

    def note(directory):
        synced.append((directory, len(list(directory.glob("*.segment")))))
        sync(directory)

    monkeypatch.setattr(segments_module, "sync_directory", note)
    spool = started(slot)
    keep(spool, *[[b"x" * 200]] * 4)

    assert len(list(slot.glob("*.segment"))) > 3
    assert synced == [(slot, number + 1) for number in range(len(list(slot.glob("*.segment"))))]


@pytest.mark.usefixtures("small_segments")
def test_segments_follow_one_another_and_drained_ones_go(slot):
    """Order and completeness hold over many files."""
    spool = started(slot)
    wanted = [b"%03d" % number * 30 for number in range(40)]
    keep(spool, *([record] for record in wanted))
    frames = left(spool)
    files = len(list(slot.glob("*.segment")))
    spool.drained(frames[29].end)
    spool.mark()
    crash(spool)
    again = Spool(slot, MIB)

    assert [record for frame in frames for record in frame.records] == wanted
    assert files > 10
    assert len(list(slot.glob("*.segment"))) < files
    assert records(again) == wanted[30:]


@pytest.mark.usefixtures("small_segments")
def test_a_restart_goes_on_behind_what_was_left(slot):
    """Three processes one after the other; all they kept stays in order."""
    wanted = []
    for life in range(3):
        spool = started(slot)
        for number in range(5):
            wanted.append(b"%d-%d" % (life, number) * 20)
            keep(spool, [wanted[-1]])
        crash(spool)

    assert records(Spool(slot, MIB)) == wanted


def written(slot, groups):
    """The path of a single segment with these frames, as a crash leaves it, and where each ends."""
    spool = started(slot)
    keep(spool, *groups)
    ends = [frame.end.offset for frame in left(spool)]
    crash(spool)
    return segment_path(slot, 1), ends


GROUPS = st.lists(st.lists(st.binary(max_size=40), min_size=1, max_size=4), min_size=1, max_size=6)


@PATIENT
@given(groups=GROUPS, data=st.data())
def test_any_cut_leaves_whole_frames_from_the_beginning(tmp_path_factory, groups, data):
    """Wherever the file ends, with any unfinished bytes behind: a prefix, never half a task."""
    slot = tmp_path_factory.mktemp("slot")
    path, ends = written(slot, groups)
    cut = data.draw(st.integers(0, ends[-1]))
    torn = data.draw(st.binary(max_size=20))
    content = path.read_bytes()
    changed = content[:cut] + torn
    path.write_bytes(changed)
    found = left(Spool(slot, MIB))

    # The unfinished bytes may happen to be the very ones that were cut off.
    intact = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(content, changed, strict=False))))
    whole = sum(end <= intact for end in ends)
    assert [frame.records for frame in found] == groups[:whole]
    assert [frame.records for frame in left(Spool(slot, MIB))] == groups[:whole]


@PATIENT
@given(groups=GROUPS, data=st.data())
def test_a_flipped_bit_is_never_read(tmp_path_factory, groups, data):
    """In the last frame it counts as torn, and is kept aside; before it, durable bytes have changed: told."""
    slot = tmp_path_factory.mktemp("slot")
    path, ends = written(slot, groups)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, ends[-1] - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    begin = ends[-2] if len(ends) > 1 else ends[-1]
    if place < begin and len(ends) > 1:
        with pytest.raises(SpoolCorrupt, match=path.name):
            Spool(slot, MIB)
        assert path.read_bytes() == content
        return
    if len(ends) == 1:
        head_end = ends[0] - (len(pack(groups[0])) + 16)
        if place < head_end:
            with pytest.raises(SpoolCorrupt):
                Spool(slot, MIB)
            return

    assert [frame.records for frame in left(Spool(slot, MIB))] == groups[:-1]
    (kept,) = slot.glob("*.torn")
    assert kept.read_bytes() in bytes(content)


def test_of_torn_writes_the_newest_are_kept(slot, caplog):
    """A process that is killed again and again fills no disk with them, and what is removed is said."""
    caplog.set_level(logging.WARNING, "meterline.task")  # whatever a command set for the process before
    lives = segments_module.TORN_MAX + 3
    torn = []
    for life in range(lives + 1):
        spool = started(slot)
        torn += set(slot.glob("*.torn")) - set(torn)
        keep(spool, [b"whole"], [b"torn %d" % life])
        end = left(spool)[-1].end
        crash(spool)
        with segment_path(slot, end.segment).open("r+b") as file:
            file.seek(end.offset - 1)
            file.write(b"?")

    assert len(torn) == lives
    assert sorted(slot.glob("*.torn")) == torn[3:]
    removed = [one.getMessage() for one in caplog.records if one.getMessage().startswith("removed")]
    assert [message.split(":")[0] for message in removed] == [f"removed {path}" for path in torn[:3]]
    assert [frame.records for frame in left(Spool(slot, MIB))] == [[b"whole"]] * (lives + 1)


def test_corruption_names_file_and_offset(slot):
    """So that a person finds the place."""
    path, ends = written(slot, [[b"a"], [b"b"], [b"c"]])
    content = bytearray(path.read_bytes())
    content[ends[0] + 17] ^= 1
    path.write_bytes(content)
    with pytest.raises(SpoolCorrupt, match=f"{path.name} is broken at byte {ends[0]}"):
        Spool(slot, MIB)

    assert path.read_bytes() == content


@pytest.mark.parametrize("harm", ["gone", "shortened", "empty"])
@pytest.mark.usefixtures("small_segments")
def test_a_segment_that_lost_its_end_is_missed(slot, harm):
    """The next one says where it ended: a file restored from yesterday does not pass for the whole."""
    spool = started(slot)
    keep(spool, *[[b"x" * 60]] * 12)
    ends = [frame.end for frame in left(spool)]
    crash(spool)
    path = segment_path(slot, 2)
    if harm == "gone":
        path.unlink()
    else:
        end = 0 if harm == "empty" else next(end.offset for end in ends if end.segment == 2)
        path.write_bytes(path.read_bytes()[:end])

    with pytest.raises(SpoolCorrupt, match=r"0000[12]\.segment"):
        Spool(slot, MIB)


def test_a_frame_is_believed_only_in_its_place(slot):
    """Bytes of another segment, whole as they are, are not what was written here."""
    path, ends = written(slot, [[b"a"], [b"b"]])
    content = bytearray(path.read_bytes())
    content[ends[0] : ends[1]] = build_frame(2, ends[0], pack([b"z"]))
    path.write_bytes(content)

    assert records(Spool(slot, MIB)) == [b"a"]


def test_a_change_while_running_stops_the_reader(slot):
    """It is told where, and nothing behind it is skipped to."""
    spool = started(slot)
    keep(spool, [b"a"], [b"b"])
    place = left(spool)[0].end.offset - 1
    spool.rewind()
    with segment_path(slot, 1).open("r+b") as file:
        file.seek(place)
        file.write(b"z")
    with pytest.raises(SpoolCorrupt, match="has changed at byte"):
        records(spool)


def test_an_unreadable_marker_counts_as_none(slot):
    """All is published again, under the same ids."""
    spool = started(slot)
    keep(spool, [b"a"], [b"b"])
    spool.drained(left(spool)[0].end)
    spool.mark()
    crash(spool)
    (slot / "drained").write_text("1 99999 00000000\n")

    assert read_marker(slot) == (0, 0)
    assert records(Spool(slot, MIB)) == [b"a", b"b"]


def test_at_its_limit_the_spool_refuses_work_and_not_usage(slot):
    """The text names the limit; what was admitted finds room; draining makes room for more."""
    spool = started(slot, MIB)
    spool.admit()
    keep(spool, [b"x" * (MIB - CLAIM_BYTES)])
    with pytest.raises(SpoolFull, match="METERLINE_QUOTA__SPOOL_BYTES_MAX"):
        spool.admit()
    keep(spool, [b"y" * CLAIM_BYTES])
    spool.release()
    with pytest.raises(SpoolFull):
        spool.admit()

    spool.drained(left(spool)[-1].end)
    spool.admit()


def test_running_tasks_count_before_they_leave_anything(slot):
    """Otherwise a thousand tasks would start for the last kilobyte."""
    spool = started(slot, MIB)
    for _ in range(MIB // CLAIM_BYTES):
        spool.admit()
    with pytest.raises(SpoolFull):
        spool.admit()
    spool.release()
    spool.admit()


def test_a_nearly_full_disk_refuses_new_work(slot, monkeypatch):
    """Before the work starts, with the number of bytes that are left."""
    spool = started(slot)
    real = os.statvfs(slot)

    class Full:
        f_bavail, f_frsize = 7, real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    with pytest.raises(SpoolFull, match=f"{7 * real.f_frsize} bytes are left"):
        spool.admit()
    keep(spool, [b"what runs already has its room"])
    monkeypatch.undo()
    spool.admit()


@pytest.mark.usefixtures("small_segments")
def test_on_a_full_disk_finished_work_waits_for_room(slot, monkeypatch):
    """New work is refused meanwhile; nothing is lost, and nothing is there twice."""
    spool = started(slot)
    keep(spool, [b"a" * 150])
    allocate, is_full = os.posix_fallocate, threading.Event()
    tried = threading.Event()

    def refuse(file, offset, length):
        if is_full.is_set():
            tried.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(file, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    is_full.set()
    waiting = spool.append([b"b" * 150])
    assert tried.wait(5)
    with pytest.raises(SpoolFull, match="No space left on device"):
        admit_until(spool, waiting.done)
    assert not waiting.done()
    is_full.clear()
    waiting.result(5)
    crash(spool)

    assert records(Spool(slot, MIB)) == [b"a" * 150, b"b" * 150]


@pytest.mark.usefixtures("small_segments")
def test_a_disk_that_stays_full_is_told_to_the_task(slot, monkeypatch):
    """After a while; when there is room again, the spool goes on by itself."""
    monkeypatch.setattr(spool_module, "NO_ROOM_S_MAX", 0.1)
    monkeypatch.setattr(admission_module, "NO_ROOM_AGAIN_S", 0.1)
    spool = started(slot)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(SpoolFailed, match=r"not durable: .*No space left"):
            keep(spool, [b"a" * 400])
    threading.Event().wait(0.15)
    spool.admit()
    keep(spool, [b"b" * 400])

    assert records(spool) == [b"b" * 400]


def test_a_failed_fsync_is_never_taken_for_a_good_one(slot, monkeypatch):
    """The kernel forgets what it could not write: asked again, it would say all is well. The spool ends."""
    spool = started(slot)
    keep(spool, [b"a"])

    def refuse(_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", refuse)
        with pytest.raises(SpoolFailed, match="Run the task again"):
            keep(spool, [b"b"])
    with pytest.raises(SpoolFailed):
        keep(spool, [b"c"])
    with pytest.raises(SpoolFailed, match="Input/output error"):
        spool.admit()

    assert records(Spool(slot, MIB)) == [b"a"]


def test_a_slot_that_was_drained_to_its_end_takes_more(slot):
    """The segment of the former process goes; the reader must not wait there."""
    spool = started(slot)
    keep(spool, [b"a"])
    spool.drained(left(spool)[0].end)
    spool.mark()
    crash(spool)
    again = started(slot)
    again.mark()
    keep(again, [b"b"])

    assert records(again) == [b"b"]


def test_metrics_tell_what_waits_of_all_spools_of_a_process(slot, tmp_path):
    """Two are drained by one process; one that is closed with a rest is no longer this process'."""
    before = metrics.SPOOL_WAITING_BYTES._value.get()

    def waiting():
        return metrics.SPOOL_WAITING_BYTES._value.get() - before

    other = tmp_path / "other"
    other.mkdir()
    own, found = started(slot), started(other)
    keep(own, [b"one"])
    keep(found, [b"two"])
    both = own.waiting_bytes + found.waiting_bytes
    seen = [waiting()]
    own.drained(own.read().end)
    seen.append(waiting())
    rest = found.waiting_bytes
    found.close()
    seen.append(waiting())
    again = Spool(other, MIB)
    seen.append(waiting())
    own.close()
    again.close()

    assert both > rest > 0
    assert seen == [both, rest, 0, rest]
    assert waiting() == 0
