"""What interrupts a run from outside: disks that are full or cannot be written, files that are gone, processes that
die."""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.forked import call, finish, start
from tests.helpers.plants import At, Grow
from tests.helpers.tiny_runs import assert_same, command, during, write_data
from vlmr1.cli import main
from vlmr1.lifecycle.checkpoint import STAGING, last_complete

pytestmark = pytest.mark.slow  # seconds each
KILL_LOADERS = """
for pid, line in children().items():
    if "rewards.worker" not in line:
        os.system(f"(sleep 0.2; kill -KILL {pid}) &")
"""
TRY = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
MOUNTS = bool(shutil.which("unshare")) and subprocess.run(TRY, capture_output=True).returncode == 0
needs_mounts = pytest.mark.skipif(not MOUNTS, reason="mounting in a namespace of our own is not permitted here")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    status, output = finish(command(data, folder / "out", "--save_total_limit", "0"), folder / "log")
    assert status == 0, output
    return folder / "out"


# Disks


LIMITS = {
    "weights": (At("os.mkdir", f"{STAGING}checkpoint-3", Grow(5_000_000, kills=False)), "checkpoint-3"),
    "optimizer": (At("os.mkdir", f"{STAGING}checkpoint-3", Grow(15_000_000, kills=False)), "checkpoint-3"),
    "log line": (At("open", "metrics.jsonl", Grow(20, kills=False), count=3, mode="a"), "metrics.jsonl"),
    "settings": (At("open", "settings.json", Grow(3000, kills=False), mode="w"), "settings.json"),
}


@pytest.mark.parametrize(("limit", "what"), LIMITS.values(), ids=LIMITS.keys())
def test_a_file_that_cannot_grow(limit, what, data, tmp_path):
    """What the system says to a write that goes beyond a limit comes out as one message; nothing half-written stays."""
    output = tmp_path / "out"
    status, text = finish(command(data, output), tmp_path / "log", limit)
    assert status == 2, text
    assert f"vlmr1: {what} cannot be written to {output}: " in text and " GiB free" in text
    assert "Traceback" not in text
    assert [path.name for path in output.iterdir() if path.name.startswith(STAGING) or path.suffix == ".tmp"] == []
    if what == "settings.json":
        assert last_complete(output) is None and not (output / what).exists()
    else:
        assert last_complete(output) == output / "checkpoint-2"
        assert "checkpoint-2 is complete: fix the problem and run the same command to resume from it\n" in text


@needs_mounts
def test_a_full_disk_and_the_same_command_after_room_is_made(data, tmp_path):
    """A file system of 130 MB, of which two checkpoints of 31 MB leave the third half of what it needs."""
    run = call(on_a_small_disk, data, tmp_path / "disk", log=tmp_path / "log")
    assert run.status() == 0, run.output


def on_a_small_disk(data: Path, disk: Path) -> int:
    disk.mkdir()
    mount("tmpfs", disk, "tmpfs", "size=130m")
    output, filler = disk / "out", disk / "filler"
    words = command(data, output)
    filler.write_bytes(bytes(130 * 2**20 - 77_000_000))
    status, text = in_fork(words, disk.parent / "first")
    assert status == 2, text
    assert f"checkpoint-3 cannot be written to {output}: " in text and "; 0.01 GiB free without it. " in text
    assert not list(output.glob(f"{STAGING}*")) and last_complete(output) == output / "checkpoint-2"
    filler.unlink()
    status, text = in_fork(words, disk.parent / "second")
    assert status == 0 and "continuing from" in text, text
    undisturbed = disk.parent / "undisturbed"
    status, text = in_fork(command(data, undisturbed), disk.parent / "third")
    assert status == 0, text
    assert_same(output, undisturbed)
    return 0


def in_fork(words: list[str], log: Path) -> tuple[int, str]:
    """A run in a fork of this process, which sees the same mounts."""
    child = os.fork()
    if not child:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os._exit(main(words))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, log.read_text()


def mount(source: str, target: Path, kind: str, options: str, flags: int = 0) -> None:
    """In a mount namespace of this process's own, which is made first; as an ordinary user in one of users too."""
    libc = ctypes.CDLL(None, use_errno=True)
    users = 0 if os.geteuid() == 0 else 0x10000000
    user = os.getuid()
    if libc.unshare(0x20000 | users):
        raise OSError(ctypes.get_errno(), "unshare")
    if users:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    libc.mount(None, b"/", None, 0x4000 | 0x40000, None)  # nothing of it is seen elsewhere
    if libc.mount(source.encode(), str(target).encode(), kind.encode(), flags, options.encode()):
        raise OSError(ctypes.get_errno(), "mount")


NO_MODEL = ["train", "--model_name_or_path", "/no/such/model"]
UNWRITABLE = {
    "a file": lambda folder: folder / "file",
    "below a file": lambda folder: folder / "file" / "run",
    "not for files": lambda _folder: Path("/proc/vlmr1"),
}


@pytest.mark.parametrize("place", UNWRITABLE.values(), ids=UNWRITABLE.keys())
@pytest.mark.parametrize("words", [NO_MODEL, ["demo"]], ids=["train", "demo"])
def test_an_output_directory_that_cannot_be(words, place, tmp_path, capsys):
    """Found before the model is looked for."""
    (tmp_path / "file").write_text("")
    assert main([*words, "--output_dir", str(place(tmp_path)), "--use_cpu", "true"]) == 2
    assert f"vlmr1: output_dir {place(tmp_path)} cannot be written: " in capsys.readouterr().err


@needs_mounts
def test_a_read_only_file_system(tmp_path):
    run = call(on_a_read_only_disk, tmp_path / "disk", log=tmp_path / "log")
    assert run.status() == 2
    assert f"output_dir {tmp_path / 'disk' / 'out'} cannot be written: Read-only file system\n" in run.output


def on_a_read_only_disk(disk: Path) -> int:
    disk.mkdir()
    mount("tmpfs", disk, "tmpfs", "size=1m", flags=1)
    return main([*NO_MODEL, "--output_dir", str(disk / "out"), "--use_cpu", "true"])


# Files that are gone


def test_checkpoints_that_the_user_deletes_are_not_missed(data, undisturbed, tmp_path):
    """Both, in the midst of step 3: rotation and the next checkpoints go on."""
    output = tmp_path / "out"
    during(data, 2, f"[shutil.rmtree(p) for p in pathlib.Path({str(output)!r}).glob('checkpoint-*')]")
    status, text = finish(command(data, output), tmp_path / "log")
    assert status == 0, text
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    assert_same(output, undisturbed)


@pytest.fixture
def stopped(undisturbed, tmp_path) -> Path:
    """The output directory of a run that ended after step 2."""
    output = tmp_path / "out"
    shutil.copytree(undisturbed / "checkpoint-2", output / "checkpoint-2")
    shutil.copy(undisturbed / "settings.json", output)
    return output


GONE = {  # at which opening of a file, in a run that goes on
    "before it is read": ("tiny/checkpoint/config.json", 1),
    "when the weights are read": ("checkpoint-2/trainer_state.json", 4),
}


@pytest.mark.parametrize(("file", "opening"), GONE.values(), ids=GONE.keys())
def test_a_checkpoint_that_is_deleted_while_it_is_read(file, opening, data, stopped, tmp_path):
    """The library would go on with the weights and a new optimizer."""
    deletion = At("open", file, partial(delete, stopped / "checkpoint-2"), count=opening)
    status, text = finish(command(data, stopped), tmp_path / "log", deletion)
    assert status == 2 and "Traceback" not in text, text
    assert f"vlmr1: {stopped / 'checkpoint-2'} was deleted or changed while it was read (" in text


def delete(folder: Path, _path: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["optimizer.pt", "settings.json"])
def test_a_file_with_other_content(name, data, stopped, tmp_path):
    """An optimizer is too large for a digest in the manifest; the settings are not part of the checkpoint."""
    path = stopped / "checkpoint-2" / name if name == "optimizer.pt" else stopped / name
    path.write_bytes(bytes(path.stat().st_size))
    status, text = finish(command(data, stopped), tmp_path / "log")
    assert status == 2 and "Traceback" not in text, text
    assert f"vlmr1: {stopped / 'checkpoint-2' if name == 'optimizer.pt' else path} cannot be read (" in text


# Processes


DEATHS = {
    "a loader": (KILL_LOADERS, "mine", "DataLoader worker (pid "),
    "a reward": ("", "dies", "its process died with exit status -9 for the row "),
}


@pytest.mark.parametrize(("code", "reward", "says"), DEATHS.values(), ids=DEATHS.keys())
def test_a_process_that_dies_is_named(code, reward, says, data, tmp_path):
    during(data, 1, code)
    more = ["--reward_funcs", f"{data / 'mine.py'}:{reward}", "--dataloader_num_workers", "1"]
    status, text = finish(command(data, tmp_path / "out", *more), tmp_path / "log")
    assert status == 2 and "Traceback" not in text, text
    said = [line for line in text.splitlines() if line.startswith("vlmr1: ")]
    assert len(said) == 1 and says in said[0], text


def test_no_process_outlives_the_run(data, tmp_path):
    """One prepares prompts, one is in a reward that lets no other thread of its process run."""
    hanging = data / "hangs"
    more = ["--reward_funcs", f"{data / 'mine.py'}:hangs", "--dataloader_num_workers", "1", "--reward_timeout", "1000"]
    run = start(command(data, tmp_path / "out", *more), tmp_path / "log")
    wait_for(hanging.exists)
    children = children_of(run.pid)
    assert len(children) >= 2
    os.kill(run.pid, signal.SIGKILL)
    assert run.status() == -signal.SIGKILL
    wait_for(lambda: not any(is_running(child) for child in children))


def wait_for(condition: Callable[[], bool], limit: float = 120) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def children_of(parent: int) -> list[int]:
    return [
        int(pid) for task in Path(f"/proc/{parent}/task").iterdir() for pid in (task / "children").read_text().split()
    ]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
