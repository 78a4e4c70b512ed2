"""`carousel serve`: worker and API in one process, put together and taken apart."""

from __future__ import annotations

import logging
import signal
import threading
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import FrameType

import torch

from model.bundle import ClassifierBundle, open_bundle
from model.errors import CarouselError
from service import interpreter
from service.api import create_app, create_classifier_app
from service.classify import Judge
from service.engine import Engine
from service.errors import ServiceError
from service.events import EventHub
from service.metrics import Metrics
from service.owners import Owners
from service.server import HttpServer
from service.settings import Settings
from service.transport import transport_of
from service.transport.group import KafkaPythonGroup
from service.worker import Worker

log = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; then finish the wave, deliver, commit, leave the group.

    Raises BundleError where the model cannot be loaded and ServiceError where the service cannot start or go on.
    """
    torch.set_num_threads(settings.threads)
    interpreter.prepare()
    bundle = open_bundle(settings.model)
    metrics = Metrics()
    metrics.build.info({"version": version_installed()})
    metrics.model.info({"model": bundle.model_id})
    if isinstance(bundle, ClassifierBundle):
        _serve_classifier(bundle, settings, metrics)
        return
    engine = Engine(bundle, settings, metrics)
    server = HttpServer(settings)
    url = settings.advertised_url or server.url
    log.info("serving %s: %s", bundle.model_id, server.url)
    owners: Owners | None = None
    try:
        hub = EventHub(settings.forecasts_topic, metrics)
        connect = partial(transport_of(settings), settings, url)  # by it the other workers find this one
        worker = Worker(engine, connect, settings, metrics, hub.publish)

        def stop(signum: int, _frame: FrameType | None) -> None:
            log.info("%s: finishing", signal.Signals(signum).name)
            worker.stop()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        owners = Owners(engine, worker, KafkaPythonGroup(settings), url, metrics)
        server.start(create_app(engine, worker, settings, metrics, hub, owners), on_stop=hub.close)
        engine.warm()
        interpreter.settle()
        _run(worker)
    finally:
        server.stop()
        if owners:
            owners.close()


def _serve_classifier(bundle: ClassifierBundle, settings: Settings, metrics: Metrics) -> None:
    """A classifier answers histories over HTTP. It says nothing step by step, so it follows no topic."""
    server, stopped = HttpServer(settings), threading.Event()
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
        server.start(create_classifier_app(Judge(bundle, settings), settings, metrics))
        log.info("serving %s: %s/v1/predict; a classifier: no Kafka topic is followed", bundle.model_id, server.url)
        stopped.wait()
    finally:
        server.stop()


def _run(worker: Worker) -> None:
    """Raises CarouselError, whatever it was: the last line that a service leaves shall say why it ended."""
    try:
        worker.run()
    except CarouselError:
        raise
    except Exception as error:
        log.critical("a fault of the worker itself", exc_info=True)
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ServiceError(f"a fault of the worker itself ended it: {told}; started again, it goes on") from error


def version_installed() -> str:
    """The version of the installed package; a bare checkout has none."""
    try:
        return version("carousel")
    except PackageNotFoundError:
        return "unknown"
