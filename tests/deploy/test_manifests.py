"""The Kubernetes objects: schemas, KubeRay's own rules, pins, secrets, and that each folder says what it should."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.specifiers import SpecifierSet
from referencing import Registry, Resource

from tests.deploy.rendered import APPLIED, JOBS, KUBERNETES, OVERLAYS, ROOT, objects, one, pods, ray_spec

SCHEMAS = {p.name: json.loads(p.read_text()) for p in (ROOT / "tests/deploy/schemas").glob("*.json")}
REGISTRY = Registry().with_resources((n, Resource.from_contents(s)) for n, s in SCHEMAS.items())
RAY_KINDS = ("RayCluster", "RayJob", "RayCronJob")


def faults(o: dict[str, Any]) -> list[str]:
    check = jsonschema.Draft202012Validator(SCHEMAS[f"{o['kind']}.json"], registry=REGISTRY)
    return [f"{'.'.join(map(str, e.path))}: {e.message}" for e in check.iter_errors(o)]


@pytest.mark.parametrize("path", sorted(KUBERNETES.rglob("*.yaml")), ids=lambda p: str(p.relative_to(KUBERNETES)))
def test_is_yaml_of_kubernetes(path):
    if path.name == "settings.yaml":
        return  # Hydra's
    for o in yaml.safe_load_all(path.read_text()):
        if path.parent.name == "spread" and path.name != "kustomization.yaml":
            assert all("source" in replacement for replacement in o)
        else:
            assert {"apiVersion", "kind"} <= set(o)


@pytest.mark.parametrize("folder", APPLIED)
def test_objects_follow_their_schemas(folder):
    found = objects(folder)
    assert found
    for o in found:
        if f"{o['kind']}.json" in SCHEMAS:
            assert faults(o) == []
        assert o["kind"] == "Namespace" or o["metadata"]["namespace"] == "curate"


@pytest.mark.parametrize("folder", APPLIED)
def test_core_objects_follow_kubernetes(folder):
    validator = pytest.importorskip("kubernetes_validate")
    for o in objects(folder):
        if o["apiVersion"] in ("v1", "batch/v1", "networking.k8s.io/v1", "rbac.authorization.k8s.io/v1"):
            validator.validate(o, "1.32", strict=True)


def test_a_misspelt_field_fails():
    good = one("overlays/gpu", "RayJob")
    for path, key in (
        (("spec",), "activeDeadlineSecond"),
        (("spec", "rayClusterSpec"), "workerGroups"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0), "imagePullPolice"),
        (("spec", "submitterPodTemplate", "spec", "securityContext"), "runAsRoot"),
    ):
        bad = copy.deepcopy(good)
        at = bad
        for step in path:
            at = at[step]
        at[key] = 1
        assert [key in f for f in faults(bad)] == [True]
    bad = copy.deepcopy(good)
    bad["spec"]["ttlSecondsAfterFinished"] = "600"
    assert faults(bad) == ["spec.ttlSecondsAfterFinished: '600' is not of type 'integer'"]


def kuberay_rules(o: dict[str, Any]) -> list[str]:
    """What KubeRay's operator refuses although its schema allows it (v1.7.0), as far as it can happen here."""
    out = []
    job = o["spec"]["jobTemplate"] if o["kind"] == "RayCronJob" else o["spec"] if o["kind"] == "RayJob" else None
    if job is not None:
        if job.get("suspend") and not job.get("shutdownAfterJobFinishes"):
            out.append("a suspended RayJob must shut its cluster down")
        if job.get("ttlSecondsAfterFinished", 0) > 0 and not job.get("shutdownAfterJobFinishes"):
            out.append("ttlSecondsAfterFinished without shutdownAfterJobFinishes")
    cluster = ray_spec(o)
    assert cluster is not None
    if "upgradeStrategy" in cluster and o["kind"] != "RayCluster":
        out.append("upgradeStrategy is for a RayCluster alone")
    names = [g["groupName"] for g in cluster["workerGroupSpecs"]]
    if len(set(names)) < len(names):
        out.append(f"two groups of one name: {names}")
    for group in cluster["workerGroupSpecs"]:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            out.append(f"{group['groupName']}: replicas outside of minReplicas … maxReplicas")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        if "labels" in group["rayStartParams"]:
            out.append("labels in rayStartParams")
    return out


@pytest.mark.parametrize("folder", APPLIED)
def test_kuberay_accepts(folder):
    for o in objects(folder):
        if o["kind"] in RAY_KINDS:
            assert kuberay_rules(o) == []


@pytest.mark.parametrize("folder", APPLIED)
def test_every_pod_may_run_in_a_restricted_namespace(folder):
    for o in objects(folder):
        for pod in pods(o):
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] == 1000  # the image's user
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
            for container in pod["containers"]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }
                assert {m["name"] for m in container["volumeMounts"]} <= {v["name"] for v in pod["volumes"]}
                assert container["resources"]["requests"]["memory"]
                assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("folder", APPLIED)
def test_images_are_pinned_and_secrets_are_references(folder):
    for o in objects(folder):
        assert o["kind"] != "Secret"
        for pod in pods(o):
            for container in pod["containers"]:
                assert re.fullmatch(
                    r"[a-z0-9.-]+(/[a-z0-9-]+)+:[0-9][\w.-]*(@sha256:[0-9a-f]{64})?", container["image"]
                )
                for variable in container.get("env", []):
                    secret = re.search("KEY|TOKEN|SECRET|PASSWORD", variable["name"])
                    assert not secret or set(variable["valueFrom"]) == {"secretKeyRef"}
        if o["kind"] == "ConfigMap":
            assert not re.search("(?i)(secret|token|password|access_key)", " ".join(o["data"]))


@pytest.mark.parametrize("folder", [*(f"overlays/{o}" for o in OVERLAYS), *(f"jobs/{j}" for j in JOBS)])
def test_clusters_have_rays_version_ask_for_a_token_and_leave_the_head_free(folder):
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pin = next(n for n in needs if n.startswith("ray["))
    found = [c for c in map(ray_spec, objects(folder)) if c is not None]
    assert found
    for cluster in found:
        assert cluster["rayVersion"] in SpecifierSet(pin.split("]")[1])
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_the_installed_version_is_the_sites():
    constraints = (ROOT / "deploy/constraints.txt").read_text()
    ray = re.search(r"^ray==(.+)$", constraints, re.M)
    assert ray is not None
    for site in ("cpu", "gpu"):
        values = yaml.safe_load((KUBERNETES / f"sites/{site}/values.yaml").read_text())["data"]
        assert values["rayVersion"] == ray[1]
        assert all(isinstance(v, str) for v in values.values())


@pytest.mark.parametrize("site", ["cpu", "gpu"])
def test_a_site_decides_sizes_times_and_the_scheduled_job(site):
    values = yaml.safe_load((KUBERNETES / f"sites/{site}/values.yaml").read_text())["data"]
    job = one(f"overlays/{site}", "RayJob")["spec"]
    assert job["entrypoint"].split()[:2] == ["curate", values["job"]]
    assert job["suspend"] is True
    assert job["activeDeadlineSeconds"] == int(values["deadlineSeconds"])
    assert job["preRunningDeadlineSeconds"] == int(values["startSeconds"])
    assert job["backoffLimit"] == int(values["retries"])
    assert job["ttlSecondsAfterFinished"] == int(values["keepSeconds"])
    assert job["submissionMode"] == "K8sJobMode"
    cron = one(f"overlays/{site}", "CronJob")["spec"]
    assert (cron["schedule"], cron["timeZone"]) == (values["schedule"], values["timeZone"])
    groups = {g["groupName"]: g for g in job["rayClusterSpec"]["workerGroupSpecs"]}
    assert set(groups) == {"cpu-workers", "gpu-workers"} if site == "gpu" else {"cpu-workers"}
    for name, group in groups.items():
        kind = name.removesuffix("-workers")
        # A job's pools are as large as its cluster is at the start, so it does not grow.
        assert {group[k] for k in ("replicas", "minReplicas", "maxReplicas")} == {int(values[f"{kind}Workers"])}
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits["memory"] == values[f"{kind}WorkerMemory"]
        assert limits["cpu"] == values[f"{kind}WorkerCpus"]
        assert limits.get("nvidia.com/gpu") == ("1" if kind == "gpu" else None)


@pytest.mark.parametrize("site", ["cpu", "gpu"])
def test_a_persistent_cluster_grows(site):
    values = yaml.safe_load((KUBERNETES / f"sites/{site}/values.yaml").read_text())["data"]
    spec = one(f"overlays/{site}-cluster", "RayCluster")["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    head = spec["headGroupSpec"]["template"]["spec"]
    assert (head["serviceAccountName"], head["automountServiceAccountToken"]) == ("curate-head", True)
    one(f"overlays/{site}-cluster", "ServiceAccount", "curate-head")
    for group in spec["workerGroupSpecs"]:
        kind = group["groupName"].removesuffix("-workers")
        assert group["minReplicas"] == int(values[f"{kind}Workers"])
        assert group["maxReplicas"] == int(values[f"{kind}WorkersMax"]) > group["minReplicas"]
        assert group["template"]["spec"]["automountServiceAccountToken"] is False


def test_the_schedule_does_not_overlap_and_its_launcher_may_do_little():
    cron = one("overlays/cpu", "CronJob")["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    assert cron["startingDeadlineSeconds"] > 0
    role = one("overlays/cpu", "Role")
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "list", "create"]}]
    binding = one("overlays/cpu", "RoleBinding")
    account = cron["jobTemplate"]["spec"]["template"]["spec"]["serviceAccountName"]
    assert [s["name"] for s in binding["subjects"]] == [account]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (container,) = cron["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert f"--pattern={one('overlays/cpu', 'RayJob')['metadata']['name']}" in container["command"]
    (volume,) = cron["jobTemplate"]["spec"]["template"]["spec"]["volumes"]
    script = one("overlays/cpu", "ConfigMap", volume["configMap"]["name"])["data"]["launch.py"]
    assert script == (KUBERNETES / "schedule/launch.py").read_text()


def test_every_reference_is_there():
    """Config maps and service accounts that pods name; the Secret's entries are optional."""
    for folder in (f"overlays/{o}" for o in OVERLAYS):
        found = objects(folder)
        there = {(o["kind"], o["metadata"]["name"]) for o in found}
        for pod in (p for o in found for p in pods(o)):
            assert ("ServiceAccount", pod["serviceAccountName"]) in there
            named = [v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v]
            for container in pod["containers"]:
                named += [e["configMapRef"]["name"] for e in container.get("envFrom", [])]
                for variable in container.get("env", []):
                    reference = variable["valueFrom"].get("secretKeyRef")
                    assert reference is None or (reference["name"] == "curate-secrets" and reference["optional"])
            assert {("ConfigMap", n) for n in named} <= there


def test_policies_close_what_they_do_not_open():
    policies = {o["metadata"]["name"]: o["spec"] for o in objects("overlays/gpu") if o["kind"] == "NetworkPolicy"}
    assert all(p["policyTypes"] == ["Ingress", "Egress"] for p in policies.values())
    parts = {p["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for p in policies.values()}
    assert parts == {"ray", "submitter", "launcher"}
    assert [n for n, p in policies.items() if "ingress" in p] == ["ray"]
    ports = {p["port"] for rule in policies["ray"]["ingress"] for p in rule.get("ports", [])}
    assert ports == {8265, 8080, 44217, 44227}
    out = {p["port"] for policy in policies.values() for rule in policy["egress"] for p in rule.get("ports", [])}
    assert out == {53, 443, 6443, 8265}
