"""Kafka's jars: from Maven Central through jgo, checked against the lock file, kept in the user's cache.

The lock names every jar with its checksum, so nothing is resolved at run time and nothing can be exchanged on
the way. jgo knows Maven Central's address; mirrors come from jgo's own settings file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from meterline.errors import UserError

__all__ = ["KAFKA_VERSION", "Jar", "cache_directory", "fetch_jars", "kafka_jars", "lock_digest", "read_lock"]

KAFKA_VERSION = "4.3.1"
LOCK_NAME = f"kafka-{KAFKA_VERSION}.lock"

DOWNLOADS_MAX = 8
"""At the same time: latency is the limit for 46 mostly small files, and a repository's patience."""

DOWNLOAD_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class Jar:
    """One line of the lock."""

    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """Its name in the cache."""
        return f"{self.artifact}-{self.version}.jar"


def cache_directory() -> Path:
    """Where downloads are kept: XDG cache home / meterline."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meterline"


def read_lock(text: str | None = None) -> list[Jar]:
    """The jars of a lock, Kafka's own by default, in its order, which is the class path's order."""
    jars = []
    for line in (_lock_text() if text is None else text).splitlines():
        coordinate, checksum = line.split()
        group, artifact, version = coordinate.split(":")
        jars.append(Jar(group, artifact, version, checksum.removeprefix("sha256:")))
    return jars


def lock_digest() -> str:
    """A short name for exactly this set of jars."""
    return hashlib.sha256(_lock_text().encode()).hexdigest()[:12]


def kafka_jars(progress: Callable[[str], None], cancelled: threading.Event) -> list[Path]:
    """The class path; downloads what is missing (46 files, 45 MB), all or nothing.

    Raises:
        UserError: a jar can't be downloaded, or isn't the one that the lock names.
    """
    return fetch_jars(
        read_lock(), cache_directory() / f"kafka-{KAFKA_VERSION}-{lock_digest()}", progress, cancelled
    )


def fetch_jars(
    jars: list[Jar], directory: Path, progress: Callable[[str], None], cancelled: threading.Event
) -> list[Path]:
    """Download locked jars into a directory of their own, all or nothing, unless it is there.

    Raises:
        UserError: a jar can't be downloaded, or isn't the one that the lock names.
    """
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix="downloading-") as work:
            complete = Path(work) / "jars"
            complete.mkdir()
            _download_all(jars, Path(work) / "maven", complete, progress, cancelled)
            try:
                complete.rename(directory)
            except OSError:  # another process was first; its jars passed the same checks
                if not directory.exists():
                    raise
    return [directory / jar.file_name for jar in jars]


def _download_all(
    jars: list[Jar], maven: Path, complete: Path, progress: Callable[[str], None], cancelled: threading.Event
) -> None:
    with ThreadPoolExecutor(DOWNLOADS_MAX) as pool:
        downloads = [pool.submit(_download, jar, maven, complete) for jar in jars]
        try:
            for done, download in enumerate(as_completed(downloads), start=1):
                if cancelled.is_set():
                    raise UserError("Stopped while Kafka was being downloaded")
                download.result()
                progress(f"downloading Kafka {KAFKA_VERSION}: {done} of {len(jars)} files")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _download(jar: Jar, maven: Path, complete: Path) -> None:
    from jgo.config import GlobalSettings  # noqa: PLC0415 - part of the `local` extra, checked before
    from jgo.constants import MAVEN_CENTRAL_URL  # noqa: PLC0415 - the same
    from jgo.maven import MavenContext  # noqa: PLC0415 - the same

    mirrors = GlobalSettings.load().repositories
    context = MavenContext(
        repo_cache=maven,
        remote_repos={**mirrors, "central": MAVEN_CENTRAL_URL},
        timeout=DOWNLOAD_TIMEOUT_S,
    )
    component = context.project(jar.group, jar.artifact).at_version(jar.version)
    try:
        downloaded = component.artifact(packaging="jar").resolve()
    except (RuntimeError, OSError) as error:  # requests' errors are OSErrors
        raise UserError(
            f"Can't download {jar.group}:{jar.artifact}:{jar.version} from Maven Central: {error}. Kafka is "
            "downloaded once; check the network, or name a mirror in jgo's settings (~/.config/jgo.conf, "
            "[repositories])."
        ) from None
    checksum = hashlib.sha256(downloaded.read_bytes()).hexdigest()
    if checksum != jar.sha256:
        raise UserError(
            f"{jar.file_name} is not the file Meterline was built with: sha256 {checksum}, expected "
            f"{jar.sha256}. Nothing was kept. Try again; if it stays, the repository or a proxy on "
            "the way changed it."
        )
    shutil.move(downloaded, complete / jar.file_name)


def _lock_text() -> str:
    return (resources.files("meterline.local") / LOCK_NAME).read_text()
