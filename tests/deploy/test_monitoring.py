"""Rules and dashboard ask for metrics that exist: ours by the code's own names, others by their exporters' lists."""

from __future__ import annotations

import json
import re

import yaml

from curate.runtime import metrics
from tests.deploy.rendered import KUBERNETES, objects, one

# As exported by Ray 2.60's node agents, KubeRay 1.7's operator and kube-state-metrics.
OTHERS = {
    "ray_node_cpu_utilization",
    "ray_node_gpus_utilization",
    "ray_node_mem_used",
    "ray_node_mem_total",
    "ray_object_store_memory",
    "kuberay_job_deployment_status",
    "kube_job_status_failed",
    "kube_cronjob_status_last_successful_time",
}


def ours() -> set[str]:
    """What the code's metrics are called at the exporter: ray_<name>_total of a counter, ray_<name> of a gauge."""
    counters = {f"ray_{n}_total" for n in (*metrics.COUNTERS, metrics.ERRORS)}
    return counters | {f"ray_{n}" for n in metrics.GAUGES}


def asked(expression: str) -> set[str]:
    bare = re.sub(r"by \([^)]*\)|ray_io_cluster", "", expression)  # labels, not metrics
    return set(re.findall(r"\b(?:ray|kuberay|kube)_\w+", bare))


def expressions() -> list[str]:
    rules = one("monitoring", "PrometheusRule")["spec"]["groups"][0]["rules"]
    board = json.loads((KUBERNETES / "monitoring/dashboard.json").read_text())
    return [r["expr"] for r in rules] + [t["expr"] for p in board["panels"] for t in p["targets"]]


def test_every_metric_exists():
    names = set().union(*map(asked, expressions()))
    assert names <= ours() | OTHERS
    assert ours() <= names  # and all of ours are shown


def test_expressions_are_closed():
    for text in expressions():
        bare = re.sub(r'"[^"]*"', "", text)
        for left, right in ("()", "[]", "{}"):
            assert bare.count(left) == bare.count(right), text


def test_the_dashboard_fills_its_rows():
    board = json.loads(one("monitoring", "ConfigMap")["data"]["curate.json"])
    ids = [p["id"] for p in board["panels"]]
    assert len(set(ids)) == len(ids)
    rows: dict[int, int] = {}
    for panel in board["panels"]:
        rows[panel["gridPos"]["y"]] = rows.get(panel["gridPos"]["y"], 0) + panel["gridPos"]["w"]
    assert set(rows.values()) == {24}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"])))
    assert used == {v["name"] for v in board["templating"]["list"]}


def test_the_monitor_finds_rays_pods():
    monitor = one("monitoring", "PodMonitor")["spec"]
    for node in one("overlays/gpu", "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        labels = node["template"]["metadata"]["labels"]
        assert monitor["selector"]["matchLabels"].items() <= labels.items()
        ports = {p["name"] for p in node["template"]["spec"]["containers"][0]["ports"]}
        assert {e["port"] for e in monitor["podMetricsEndpoints"]} <= ports
    assert {o["metadata"]["labels"]["release"] for o in objects("monitoring")} == {"prometheus"}


def test_alerts_name_the_schedule_as_it_is():
    text = yaml.safe_dump(one("monitoring", "PrometheusRule"), width=10_000)
    assert f'cronjob="{one("overlays/cpu", "CronJob")["metadata"]["name"]}"' in text
