"""The rules and alerts of deploy/prometheus as the Prometheus Operator takes them; `make docs` writes them to
deploy/kubernetes/monitoring/rules.yaml.
"""

from __future__ import annotations

from pathlib import Path

import yaml

PROMETHEUS = Path(__file__).parent / "prometheus"


def prometheus_rule() -> str:
    """A PrometheusRule with all groups of the files that `prometheus.yml` names."""
    files = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["rule_files"]
    content = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "carousel", "labels": {"app.kubernetes.io/name": "carousel"}},
        "spec": {
            "groups": [group for file in files for group in yaml.safe_load((PROMETHEUS / file).read_text())["groups"]]
        },
    }
    told = "# Made by `make docs` from the files in deploy/prometheus, whose comments say why.\n\n"
    return told + yaml.safe_dump(content, sort_keys=False, width=120)
