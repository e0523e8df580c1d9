"""Makes one RayJob after a suspended one and waits for its end: what the pod of the schedule's CronJob does.

In: the name of the pattern (a RayJob with `suspend: true`), and from the environment JOB_NAME and JOB_UID, the
Kubernetes Job that this pod belongs to. Out: a RayJob named after that Job and owned by it, so that a pod that starts
again finds the RayJob of the pod before it, and the history limits of the CronJob remove it. Exit status: 0 succeeded,
or skipped because another RayJob of this pattern is at work; 2 the RayJob failed; 1 the API of Kubernetes refused or
stayed out of reach. It speaks to that API alone, needs Python's standard library alone, and knows nothing of what a
job does.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PATTERN = "curate/pattern"  # the label by which RayJobs of one pattern are found
ENDED = ("Complete", "Failed", "ValidationFailed")


class ApiError(Exception):
    """Kubernetes refused a request, or did not answer for longer than it may."""


@dataclass(frozen=True)
class Api:
    """The RayJobs of one namespace. An API server that does not answer is asked again for `patience` seconds."""

    server: str
    namespace: str
    token: Path
    authority: Path
    patience: float = 300.0
    pause: float = 5.0

    def _once(self, method: str, url: str, body: bytes | None) -> dict[str, Any]:
        headers = {
            # Read at each request: Kubernetes writes a new token into the file within the hour.
            "Authorization": f"Bearer {self.token.read_text().strip()}",
            "Content-Type": "application/json",
        }
        request = urllib.request.Request(url, data=body, method=method, headers=headers)
        context = ssl.create_default_context(cafile=str(self.authority))
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def call(self, method: str, name: str = "", body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """The answer as a dict; None for 404 on GET and for 409 (it is there already) on POST.

        Raises:
            ApiError: a refusal, or `patience` seconds without an answer.
        """
        url = f"{self.server}/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs{name}"
        data = None if body is None else json.dumps(body).encode()
        until = time.monotonic() + self.patience
        while True:
            try:
                return self._once(method, url, data)
            except urllib.error.HTTPError as e:
                if (method, e.code) in (("GET", 404), ("POST", 409)):
                    return None
                said = f"{e.code} {e.read(2000).decode(errors='replace')}"
                if e.code < 500 and e.code != 429:
                    raise ApiError(f"{method} {url}: {said}") from None
            except (OSError, ValueError) as e:
                said = str(e)
            if time.monotonic() >= until:
                raise ApiError(f"{method} {url}: no answer in {self.patience:.0f} s: {said}")
            time.sleep(self.pause)


def say(event: str, **facts: object) -> None:
    """One line of JSON, as the jobs themselves write with CURATE_LOG=json."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(json.dumps({"time": stamp, "event": event, **facts}), flush=True)


def made_after(pattern: dict[str, Any], name: str, owner: str, uid: str) -> dict[str, Any]:
    """The RayJob `name` with the pattern's spec, not suspended, owned by the Kubernetes Job `owner`."""
    spec = copy.deepcopy(pattern["spec"])
    spec.pop("suspend", None)
    spec.pop("jobId", None)  # KubeRay's own, of a pattern that once ran
    labels = {**pattern["metadata"].get("labels", {}), PATTERN: pattern["metadata"]["name"]}
    owned = {"apiVersion": "batch/v1", "kind": "Job", "name": owner, "uid": uid}
    metadata = {"name": name, "labels": labels, "ownerReferences": [owned]}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def at_work(api: Api, pattern: str, name: str) -> str | None:
    """The name of another RayJob of this pattern that has not ended."""
    jobs = api.call("GET", f"?labelSelector={PATTERN.replace('/', '%2F')}%3D{pattern}") or {}
    for job in jobs.get("items", []):
        other = str(job["metadata"]["name"])
        if other != name and job.get("status", {}).get("jobDeploymentStatus") not in ENDED:
            return other
    return None


def follow(api: Api, name: str, every: float) -> int:
    """Wait until the RayJob has ended; the exit status."""
    last = None
    while True:
        job = api.call("GET", f"/{name}")
        if job is None:
            say("removed by somebody before its end", rayjob=name)
            return 2
        status = job.get("status", {})
        state = (status.get("jobDeploymentStatus", ""), status.get("jobStatus", ""))
        if state != last:
            say("state", rayjob=name, deployment=state[0], job=state[1], cluster=status.get("rayClusterName", ""))
            last = state
        if state[0] in ENDED:
            good = state == ("Complete", "SUCCEEDED")
            if not good:
                say("failed", rayjob=name, reason=status.get("reason", ""), message=status.get("message", ""))
            return 0 if good else 2
        time.sleep(every)


def launch(api: Api, pattern: str, owner: str, uid: str, every: float) -> int:
    """Make the RayJob unless it is there or another one is at work; wait for it; the exit status."""
    # Not the owner's own name: KubeRay gives a RayJob's name to the Kubernetes Job that submits it.
    name = f"{owner}-ray"
    if api.call("GET", f"/{name}") is None:
        other = at_work(api, pattern, name)
        if other is not None:
            say("skipped: an earlier one is at work", rayjob=other)
            return 0
        model = api.call("GET", f"/{pattern}")
        if model is None:
            raise ApiError(f"there is no RayJob {pattern} in the namespace {api.namespace} to make {name} after")
        if api.call("POST", body=made_after(model, name, owner, uid)) is not None:
            say("made", rayjob=name, entrypoint=model["spec"].get("entrypoint", ""))
    return follow(api, name, every)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a RayJob after a suspended one and wait for its end.")
    parser.add_argument("--pattern", required=True, help="name of the suspended RayJob")
    parser.add_argument("--every", type=float, default=15.0, help="seconds between two looks at it")
    given = parser.parse_args()
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT_HTTPS"]
    server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    api = Api(server, (ACCOUNT / "namespace").read_text().strip(), ACCOUNT / "token", ACCOUNT / "ca.crt")
    try:
        return launch(api, given.pattern, os.environ["JOB_NAME"], os.environ["JOB_UID"], given.every)
    except ApiError as e:
        say("error", message=str(e))
        return 1


if __name__ == "__main__":
    sys.exit(main())
