"""deploy/kubernetes and docs/deployment.md, held against what they speak of.

No cluster is needed: Kubernetes' own schemas judge the manifests, and a genuine worker is started as they start it, on
topics made as the page makes them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml
from kafka import KafkaAdminClient
from kafka.admin import NewTopic

from deploy.broker import EmbeddedBroker
from deploy.rules import prometheus_rule
from model.bundle import load_bundle
from service.server import STOP_S
from service.settings import Settings
from service.transport.session import UNSETTLED_S
from service.transport.topics import STATE_CONFIG
from service.worker import STALLED_S
from tests.deploy.prometheus import ROOT, RULES, selectors
from tests.deploy.test_deployment import exposed_port, image_environment, last_stage, parse_command
from tests.served import Served, random_bundle

KUBERNETES = ROOT / "deploy/kubernetes"
PAGE = ROOT / "docs/deployment.md"
SETTINGS = KUBERNETES / "settings.yaml"
OLDEST = "1.30"
"""The version that kustomization.yaml names: the first with `lifecycle.preStop.sleep`."""
CUSTOM = {"PodMonitor", "PrometheusRule", "ScaledObject"}
"""Of the Prometheus Operator and KEDA: Kubernetes has no schemas of these."""
STREAM_BYTES = 12_069
"""Resident, of the default model: docs/speed.md."""
WORKER_BYTES = 800 << 20
"""Resident, without streams."""
UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}

Manifest = dict[str, Any]


def kustomizations() -> list[Path]:
    return sorted(KUBERNETES.rglob("kustomization.yaml"))


def named(kustomization: Path) -> list[Path]:
    """The files that a kustomization is made of."""
    content = yaml.safe_load(kustomization.read_text())
    generated = [file for generator in content.get("configMapGenerator", ()) for file in generator["files"]]
    return [kustomization.parent / file for file in [*content["resources"], *generated]]


@cache
def manifests() -> list[Manifest]:
    files = [file for kustomization in kustomizations() for file in named(kustomization) if file != SETTINGS]
    return [manifest for file in files for manifest in yaml.safe_load_all(file.read_text())]


def only(kind: str, name: str = "carousel") -> Manifest:
    [found] = [each for each in manifests() if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def pod() -> Manifest:
    found: Manifest = only("StatefulSet")["spec"]["template"]
    return found


def worker() -> Manifest:
    [container] = pod()["spec"]["containers"]
    return container


def pod_environment(name: str) -> dict[str, str]:
    """The environment of the worker in the pod of this name: the image's, then the manifest's over it."""
    environment = image_environment()
    for entry in worker()["env"]:
        if "valueFrom" in entry:
            assert entry["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
        told = entry.get("value", name)
        environment[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda m: environment[m[1]], told)
    return environment


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Those of the pod carousel-0."""
    for name in [name for name in os.environ if name.startswith("CAROUSEL_")]:
        monkeypatch.delenv(name)
    for name, value in pod_environment("carousel-0").items():
        if name.startswith("CAROUSEL_"):
            monkeypatch.setenv(name, value)
    return Settings.load({}, SETTINGS)


def documented_topics() -> dict[str, tuple[int, int, dict[str, str]]]:
    """The topics that the page tells to make: name -> partitions, replicas, configuration."""
    text = re.sub(r"\\\n\s*", "", PAGE.read_text())
    topics = {}
    for command in re.findall(r"^    kafka-topics.sh (.+)$", text, re.MULTILINE):
        options = list(pairwise(shlex.split(command)))
        one = dict(options)
        config = dict(value.split("=", 1) for option, value in options if option == "--config")
        topics[one["--topic"]] = int(one["--partitions"]), int(one["--replication-factor"]), config
    return topics


def bytes_of(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


class TestManifests:
    def test_every_file_is_part_of_a_kustomization(self) -> None:
        files = {file for kustomization in kustomizations() for file in [kustomization, *named(kustomization)]}
        assert files == set(KUBERNETES.rglob("*.yaml"))

    @pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
    def test_kubernetes_schemas_accept_them(self, version: str) -> None:
        for manifest in manifests():
            if manifest["kind"] not in CUSTOM:
                kubernetes_validate.validate(manifest, version, strict=True)
        assert f"Kubernetes {OLDEST} or later" in (KUBERNETES / "kustomization.yaml").read_text()

    def test_variables_and_paths_in_comments_are_real(self) -> None:
        for file in [file for file in KUBERNETES.rglob("*") if file.is_file()]:
            text = file.read_text()
            assert {name.lower() for name in re.findall(r"\bCAROUSEL_(\w+)", text)} <= set(Settings.model_fields), file
            for path in re.findall(r"\b(?:deploy|docs)/[\w./-]*\w", text):
                assert (ROOT / path).exists(), f"{file.name}: {path}"

    def test_whoever_selects_selects_the_workers(self) -> None:
        labels = pod()["metadata"]["labels"]
        selected = {
            ("StatefulSet", "carousel"): only("StatefulSet")["spec"]["selector"]["matchLabels"],
            ("Service", "carousel"): only("Service")["spec"]["selector"],
            ("Service", "carousel-workers"): only("Service", "carousel-workers")["spec"]["selector"],
            ("PodDisruptionBudget", "carousel"): only("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
            ("NetworkPolicy", "carousel"): only("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
            ("PodMonitor", "carousel"): only("PodMonitor")["spec"]["selector"]["matchLabels"],
        }
        for constraint in pod()["spec"]["topologySpreadConstraints"]:
            assert constraint["labelSelector"]["matchLabels"] == labels
        for who, chosen in selected.items():
            assert chosen == labels, who

    def test_ports_are_the_one_that_the_image_listens_on(self) -> None:
        [port] = worker()["ports"]
        assert port["containerPort"] == int(last_stage("EXPOSE")[0]) == exposed_port("carousel")
        for name in ("carousel", "carousel-workers"):
            [served] = only("Service", name)["spec"]["ports"]
            assert (served["port"], served["targetPort"]) == (port["containerPort"], port["name"])
        [rule] = only("NetworkPolicy")["spec"]["ingress"]
        assert rule["ports"] == [{"port": port["name"]}]
        assert [probed["httpGet"]["port"] for probed in probes().values()] == [port["name"]] * 3
        [endpoint] = only("PodMonitor")["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] == port["name"]

    def test_what_is_mounted_is_declared_and_only_that(self) -> None:
        spec = pod()["spec"]
        mounted = {
            mount["name"] for one in spec["containers"] + spec["initContainers"] for mount in one["volumeMounts"]
        }
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        [config] = [volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume]
        [generator] = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["configMapGenerator"]
        assert (generator["name"], generator["files"]) == (config, [SETTINGS.name])

    def test_pods_keep_to_the_restricted_security_standard(self) -> None:
        spec = pod()["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        user, group = spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsGroup"]
        assert f"{user}:{group}" == last_stage("USER")[0]
        assert f"USER {user}:{group}" in (KUBERNETES / "model.Dockerfile").read_text()
        assert not spec["automountServiceAccountToken"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for container in spec["containers"] + spec["initContainers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"requests", "limits"} == set(container["resources"])

    def test_a_build_has_all_of_it_and_is_as_the_page_says(self, tmp_path: Path) -> None:
        build = next(
            (words for words in (["kustomize", "build"], ["kubectl", "kustomize"]) if shutil.which(words[0])), None
        )
        if build is None:
            pytest.skip("neither kustomize nor kubectl is installed")
        [own] = [
            block for block in re.findall(r"```yaml\n(.+?)```", PAGE.read_text(), re.DOTALL) if "components" in block
        ]
        (tmp_path / "kustomization.yaml").write_text(
            own.replace("carousel/deploy", f"{os.path.relpath(ROOT, tmp_path)}/deploy")
        )
        (tmp_path / "settings.yaml").write_text("bootstrap_servers: mine:9092\n")
        built = subprocess.run([*build, str(tmp_path)], capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
        by_kind = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(built.stdout)}
        [config] = [name for kind, name in by_kind if kind == "ConfigMap"]
        assert {kind for kind, _ in by_kind} == {each["kind"] for each in manifests()} | {"ConfigMap"}
        assert by_kind["ConfigMap", config]["data"] == {"settings.yaml": "bootstrap_servers: mine:9092\n"}
        workers = by_kind["StatefulSet", "carousel"]["spec"]
        assert "replicas" not in workers, "KEDA's to say"
        volumes = workers["template"]["spec"]["volumes"]
        assert [volume["configMap"]["name"] for volume in volumes if "configMap" in volume] == [config]
        images = [c["image"] for kind in ("containers", "initContainers") for c in workers["template"]["spec"][kind]]
        assert all(re.fullmatch(r"registry\.example/[\w-]+:[\w.-]+", image) for image in images), images


def probes() -> dict[str, Manifest]:
    return {name: worker()[name] for name in ("startupProbe", "livenessProbe", "readinessProbe")}


def patience_s(probe: Manifest) -> int:
    return int(probe["periodSeconds"] * probe["failureThreshold"])


class TestWorkers:
    def test_their_command_and_settings_are_real(self, settings: Settings) -> None:
        parse_command(worker()["args"])
        assert worker()["args"][:2] == ["serve", "--config"]
        [mount] = [mount for mount in worker()["volumeMounts"] if mount["name"] == "settings"]
        assert worker()["args"][2] == f"{mount['mountPath']}/{SETTINGS.name}"
        told = set(yaml.safe_load(SETTINGS.read_text()))
        assert told <= set(Settings.model_fields)
        hidden = {name for name in told if f"CAROUSEL_{name.upper()}" in pod_environment("carousel-0")}
        assert not hidden, "a variable wins over the file"
        set_by_variables = {
            n.removeprefix("CAROUSEL_").lower() for n in pod_environment("x") if n.startswith("CAROUSEL_")
        }
        assert set_by_variables <= set(Settings.model_fields)

    def test_each_has_a_place_and_a_url_of_its_own_by_the_name_of_its_pod(self, settings: Settings) -> None:
        headless = only("Service", "carousel-workers")
        assert settings.slot == "carousel-0"
        assert settings.advertised_url == f"http://carousel-0.{headless['metadata']['name']}:{settings.http_port}"
        assert only("StatefulSet")["spec"]["serviceName"] == headless["metadata"]["name"]
        assert headless["spec"]["clusterIP"] == "None"
        assert headless["spec"]["publishNotReadyAddresses"], "who restores one partition answers for the others"
        assert not pod()["spec"]["enableServiceLinks"], "else the Service carousel sets CAROUSEL_PORT and the like"

    def test_they_are_given_time_to_start_to_hang_and_to_end(self, settings: Settings) -> None:
        routes = {name: probe["httpGet"]["path"] for name, probe in probes().items()}
        assert routes == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
        assert patience_s(probes()["startupProbe"]) >= 60
        assert 60 <= patience_s(probes()["livenessProbe"]) < STALLED_S
        before_s = worker()["lifecycle"]["preStop"]["sleep"]["seconds"]
        end_s = settings.transaction_timeout_ms / 1000 + 2 * STOP_S
        assert pod()["spec"]["terminationGracePeriodSeconds"] >= before_s + end_s

    def test_their_group_waits_for_a_lost_one_less_long_than_they_wait_for_the_group(self, settings: Settings) -> None:
        assert settings.session_timeout_ms > Settings.model_fields["session_timeout_ms"].default
        assert settings.session_timeout_ms / 1000 < UNSETTLED_S

    def test_their_memory_holds_all_streams_while_one_is_away(self, settings: Settings) -> None:
        [partitions] = {partitions for partitions, _, _ in documented_topics().values()}
        left = only("StatefulSet")["spec"]["replicas"] - 1
        most = WORKER_BYTES + settings.max_streams * partitions / left * STREAM_BYTES
        assert most < bytes_of(worker()["resources"]["limits"]["memory"])

    def test_their_model_is_what_the_init_container_copies(self, settings: Settings, tmp_path: Path) -> None:
        [copying] = pod()["spec"]["initContainers"]
        [mount] = copying["volumeMounts"]
        [own] = [own for own in worker()["volumeMounts"] if own["name"] == mount["name"]]
        assert own["mountPath"] == str(settings.model)
        assert own["readOnly"]
        dockerfile = (KUBERNETES / "model.Dockerfile").read_text()
        [bundle] = re.findall(r"^COPY \S+ \. (\S+)$", dockerfile, re.MULTILINE)
        random_bundle(tmp_path / "bundle")
        (tmp_path / "model").mkdir()
        here = {bundle: str(tmp_path / "bundle"), mount["mountPath"]: str(tmp_path / "model")}
        words = [re.sub("^(" + "|".join(here) + ")", lambda m: here[m[1]], word) for word in copying["command"]]
        subprocess.run(words, check=True)
        assert load_bundle(tmp_path / "model").model_id == load_bundle(tmp_path / "bundle").model_id

    def test_no_more_are_taken_away_at_once_than_the_others_can_stand_in_for(self) -> None:
        assert only("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
        assert only("StatefulSet")["spec"]["replicas"] > 1


class TestScaling:
    def test_it_scales_the_workers_between_those_that_are_needed_and_their_partitions(self) -> None:
        spec, workers = only("ScaledObject")["spec"], only("StatefulSet")
        assert spec["scaleTargetRef"] == {
            "apiVersion": workers["apiVersion"],
            "kind": workers["kind"],
            "name": workers["metadata"]["name"],
        }
        [partitions] = {partitions for partitions, _, _ in documented_topics().values()}
        assert workers["spec"]["replicas"] == spec["minReplicaCount"] < spec["maxReplicaCount"] <= partitions

    def test_it_asks_for_what_is_recorded(self) -> None:
        recorded = {rule["record"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
        asked = []
        for trigger in only("ScaledObject")["spec"]["triggers"]:
            [selector] = selectors(trigger["metadata"]["query"])
            assert [(m.name, m.value) for m in selector.matchers.matchers] == [("job", job())]
            asked.append(selector.name)
            assert float(trigger["metadata"]["threshold"]) > 0
        assert asked
        assert set(asked) <= recorded

    def test_it_takes_away_more_slowly_than_it_adds(self) -> None:
        behaviour = only("ScaledObject")["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        up, down = behaviour["scaleUp"], behaviour["scaleDown"]
        assert 0 < up["stabilizationWindowSeconds"] < down["stabilizationWindowSeconds"]
        assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 600}]


def job() -> str:
    """The job under which the PodMonitor has the workers scraped."""
    label: str = pod()["metadata"]["labels"][only("PodMonitor")["spec"]["jobLabel"]]
    return label


class TestMonitoring:
    def test_the_job_is_the_one_that_alerts_ask_for(self) -> None:
        jobs = re.findall(r'job="(\w+)"', prometheus_rule())
        assert jobs
        assert set(jobs) == {job()}

    def test_the_rules_are_those_of_deploy_prometheus(self) -> None:
        assert (KUBERNETES / "monitoring/rules.yaml").read_text() == prometheus_rule(), "make docs"


class TestPage:
    def test_it_names_every_topic_and_each_is_replicated_alike(self, settings: Settings) -> None:
        roles = (
            settings.observations_topic,
            settings.forecasts_topic,
            settings.dead_letters_topic,
            settings.state_topic,
        )
        assert set(documented_topics()) == set(roles)
        for partitions, replicas, config in documented_topics().values():
            assert (partitions, replicas, config["min.insync.replicas"]) == (12, 3, "2")
        assert settings.partitions == 0, "nobody else makes them, unreplicated"
        _, _, state = documented_topics()[settings.state_topic]
        assert STATE_CONFIG.items() <= state.items()
        _, _, observations = documented_topics()[settings.observations_topic]
        assert int(observations["retention.ms"]) > 1000 * settings.snapshot_interval_s

    def test_settings_and_paths_that_it_names_exist(self) -> None:
        text = PAGE.read_text()
        named = {
            name for name in re.findall(r"`([a-z]+_[a-z_]+)(?::[^`]*)?`", text) if not name.startswith("carousel_")
        }
        assert named
        assert named <= set(Settings.model_fields)
        assert {flag.replace("-", "_") for flag in re.findall(r"`--([a-z-]+)", text)} <= set(Settings.model_fields)
        for path in re.findall(r"\b(?:deploy|docs)/[\w./-]*\w", text):
            assert (ROOT / path).exists(), path
        for link in re.findall(r"\]\(([\w./-]+)", text):
            assert (PAGE.parent / link).exists(), link


@pytest.fixture(scope="module")
def servers() -> Iterator[str]:
    """A Kafka of its own, as the topics have their usual names; they are made as the page makes them."""
    with EmbeddedBroker() as broker:
        with closing(KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)) as admin:
            one_broker = {"min.insync.replicas": "1"}
            topics = [
                NewTopic(name, partitions, 1, topic_configs=config | one_broker)
                for name, (partitions, _, config) in documented_topics().items()
            ]
            admin.create_topics(topics)
            admin.wait_for_topics([topic.name for topic in topics])
        yield broker.bootstrap_servers


def test_a_worker_starts_as_its_pod_starts_it_and_answers_its_probes(
    servers: str, settings: Settings, tmp_path: Path
) -> None:
    here = tmp_path / SETTINGS.name
    here.write_text(SETTINGS.read_text().replace(settings.bootstrap_servers, servers))
    changed = {"config": here, "model": random_bundle(tmp_path / "model"), "http_host": "127.0.0.1", "http_port": 0}
    served = Served(servers, changed, tmp_path / "log")
    served.start()
    try:
        for path in [probe["httpGet"]["path"] for probe in probes().values()]:
            assert httpx.get(served.url + path).status_code == 200
        [endpoint] = only("PodMonitor")["spec"]["podMetricsEndpoints"]
        assert "carousel_consumer_lag_records" in httpx.get(served.url + endpoint["path"]).text
        with closing(KafkaAdminClient(bootstrap_servers=servers)) as admin:
            [member] = admin.describe_groups([settings.group_id])[settings.group_id]["members"]
        assert (member["group_instance_id"], member["client_id"]) == (settings.slot, settings.advertised_url)
        assert served.stop() == 0
    finally:
        served.process.kill()
        served.process.wait()
